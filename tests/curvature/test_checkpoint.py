"""A curvature pass that is killed and goes on, and what may not be gone on with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

import bmoe_lightning
from bmoe_lightning.curvature import checkpoint as checkpoint_module
from bmoe_lightning.curvature import collect_factors, kfac, pass_sums, remove_checkpoint
from bmoe_lightning.curvature.checkpoint import FORMAT, VERSION, rank_path
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file

SIZES = (1, 2, 1, 3, 2, 1, 2)  # the first batch is too small for the thorough check of owners


def wide_model():
    """Wide enough for sketches that are no full sums."""
    return toy_model(width=12, inner=10, num_layers=2)


def batches():
    return split(toy_batch(num_rows=sum(SIZES)), *SIZES)


class Killed(Exception):
    pass


def stopping(data, after):
    """Batches that are cut off."""
    for number, batch in enumerate(data):
        if number == after:
            raise Killed
        yield batch


class Counted:
    """`class_logits` that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return answer_logits(model, batch)


def cut_off(path, after, *, model=None, every=2, **options):
    with pytest.raises(Killed):
        collect_factors(
            model or wide_model(),
            answer_logits,
            stopping(batches(), after),
            checkpoint=path,
            checkpoint_every=every,
            **{"rank": 2, **options},
        )


def go_on(path, data=None, *, model=None, class_logits=answer_logits, every=2, **options):
    return collect_factors(
        model or wide_model(),
        class_logits,
        batches() if data is None else data,
        checkpoint=path,
        checkpoint_every=every,
        **{"rank": 2, **options},
    )


def assert_same_bits(found, expected):
    assert found.description() == expected.description()
    for one, other in zip(found.layers, expected.layers, strict=True):
        for name, tensor in other.tensors().items():
            assert torch.equal(one.tensors()[name], tensor), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sums.safetensors"


class TestGoingOn:
    @pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
    @pytest.mark.parametrize(
        ("sketch", "approximation"),
        [("auto", "expand"), ("nystrom", "expand"), ("rsvd", "expand"), ("exact", "expand"), ("rsvd", "reduce")],
    )
    def test_gives_the_bits_of_a_pass_that_was_not_interrupted(self, path, sketch, fisher, approximation):
        options = {"fisher": fisher, "sketch": sketch, "approximation": approximation, "seed": 3}
        expected = collect_factors(wide_model(), answer_logits, batches(), rank=2, **options)
        cut_off(path, 5, **options)
        counted = Counted()
        found = go_on(path, class_logits=counted, **options)
        assert counted.calls == len(SIZES) - 4
        assert_same_bits(found, expected)

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_wherever_and_however_often_it_is_cut_off(self, path, every):
        options = {"fisher": "mc", "sketch": "rsvd", "every": every}
        for after in (1, 3, 3, 4, 6):
            cut_off(path, after, **options)
        counted = Counted()
        found = go_on(path, class_logits=counted, **options)
        assert counted.calls == len(SIZES) - 6 // every * every
        assert_same_bits(
            found, collect_factors(wide_model(), answer_logits, batches(), rank=2, fisher="mc", sketch="rsvd")
        )

    def test_before_the_first_write_it_begins_anew(self, path):
        cut_off(path, 1)
        assert not path.exists()
        assert_same_bits(go_on(path), collect_factors(wide_model(), answer_logits, batches(), rank=2))

    def test_the_last_batches_are_written_too(self, path):
        """A kill while the factors are made use of costs nothing either."""
        expected = go_on(path)
        written = path.stat().st_mtime_ns
        counted = Counted()
        assert_same_bits(go_on(path, class_logits=counted), expected)
        assert counted.calls == 0
        assert path.stat().st_mtime_ns == written  # there is nothing new to write

    def test_a_pass_shorter_than_the_interval_writes_nothing(self, path):
        go_on(path, every=len(SIZES) + 1)
        assert not path.exists()

    def test_more_data_may_follow(self, path):
        go_on(path, batches()[:4])
        assert_same_bits(go_on(path), collect_factors(wide_model(), answer_logits, batches(), rank=2))

    def test_the_interval_and_the_scale_may_be_others(self, path):
        cut_off(path, 5, num_examples=100)
        expected = collect_factors(wide_model(), answer_logits, batches(), rank=2, num_examples=1000)
        assert_same_bits(go_on(path, every=3, num_examples=1000), expected)

    def test_each_write_is_as_late_as_it_can_be(self, path, monkeypatch):
        seen = []
        written = write_tensor_file

        def watched(where, tensors, **options):
            seen.append(options["description"]["progress"]["batches"])
            return written(where, tensors, **options)

        monkeypatch.setattr(checkpoint_module, "write_tensor_file", watched)
        go_on(path, every=3)
        assert seen == [3, 6, 7]

    def test_the_thorough_check_is_not_made_again(self, path, monkeypatch):
        """It is a matter of the model's code, and costs a backward pass for each example."""
        thorough = []
        found = pass_sums.slot_owners

        def watched(tapped, slots, **options):
            thorough.append(options["thorough"])
            return found(tapped, slots, **options)

        monkeypatch.setattr(pass_sums, "slot_owners", watched)
        cut_off(path, 5, approximation="reduce")
        go_on(path, approximation="reduce")
        assert thorough == [True, True, False, False, False, False, False, False]

    def test_a_batch_may_be_changed_by_who_gets_it(self, path):
        def emptied(model, batch):
            return answer_logits(model, {name: batch.pop(name) for name in list(batch)})

        expected = collect_factors(wide_model(), answer_logits, batches(), rank=2)
        with pytest.raises(Killed):
            collect_factors(wide_model(), emptied, stopping(batches(), 5), rank=2, checkpoint=path, checkpoint_every=2)
        assert_same_bits(go_on(path, class_logits=emptied), expected)

    def test_a_killed_process(self, path):
        """A real SIGKILL, in the middle of a batch."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(bmoe_lightning.__file__).parents[1]), str(Path(__file__).parents[1])]
            ),
        }
        script = (
            "import os, signal, sys\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "import test_checkpoint as t\n"
            "calls = []\n"
            "def deadly(model, batch):\n"
            "    calls.append(0)\n"
            "    if len(calls) == 6:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return t.answer_logits(model, batch)\n"
            "t.go_on(sys.argv[1], class_logits=deadly, sketch='rsvd', fisher='mc')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(path), str(Path(__file__).parent)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        counted = Counted()
        found = go_on(path, class_logits=counted, sketch="rsvd", fisher="mc")
        assert counted.calls == len(SIZES) - 4
        options = {"rank": 2, "sketch": "rsvd", "fisher": "mc"}
        assert_same_bits(found, collect_factors(wide_model(), answer_logits, batches(), **options))


class TestFile:
    def test_nothing_else_is_left(self, path):
        cut_off(path, 5)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        go_on(path)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        remove_checkpoint(path)
        assert list(path.parent.iterdir()) == []

    def test_what_a_kill_in_the_middle_of_a_write_left_is_removed(self, path):
        cut_off(path, 5)
        left = path.with_name(f".{path.name}.0123abcd.tmp")
        left.write_bytes(b"half")
        go_on(path)
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_a_write_that_fails_keeps_the_one_before(self, path, monkeypatch):
        cut_off(path, 3)
        before = path.read_bytes()

        def full(*_):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("bmoe_lightning.utils.safetensors_io.save_file", full)
            with pytest.raises(OSError, match="No space left"):
                go_on(path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert_same_bits(go_on(path), collect_factors(wide_model(), answer_logits, batches(), rank=2))

    def test_its_folder_is_made(self, tmp_path):
        go_on(tmp_path / "a" / "b" / "sums.safetensors")
        assert (tmp_path / "a" / "b" / "sums.safetensors").is_file()

    def test_without_a_checkpoint_nothing_is_read(self):
        """Batches and their tensors are handed on as they are."""
        data = iter(batches())
        assert kfac.PassCheckpoint(None, 1, "", {}, distributed=False).remaining(data) is data


class TestRemove:
    def test_nothing_to_remove(self, tmp_path):
        remove_checkpoint(tmp_path / "missing" / "sums.safetensors")

    def test_removes_what_passes_wrote_and_nothing_else(self, tmp_path):
        path = tmp_path / "sums[1].safetensors"
        go_on(path)
        content = path.read_bytes()
        written = ["sums[1]-rank0of2.safetensors", "sums[1]-rank11of16.safetensors"]
        written += ["sums[1]-rank0of2.safetensors.before"]
        leftovers = [".sums[1].safetensors.ff.tmp", ".sums[1]-rank0of2.safetensors.ff.tmp"]
        leftovers += [".sums[1]-rank1of2.safetensors.ff.tmp"]
        others = ["sums1.safetensors", "sums[1].json", "sums[1]-other.safetensors", "posterior.safetensors"]
        others += ["sums[1]-rank10-of-others.safetensors", "my-sums[1].safetensors", "sums[1].safetensors.old"]
        others += [".other.safetensors.ff.tmp", ".sums[1].safetensors.mine.tmp"]
        for name in (*written, *leftovers, *others):
            (tmp_path / name).write_bytes(content)
        remove_checkpoint(path)
        assert {found.name for found in tmp_path.iterdir()} == set(others)

    def test_files_of_others_under_these_names_stay(self, tmp_path):
        """Somebody's own file, or another format of ours."""
        names = ["sums.safetensors", "sums-rank1of2.safetensors", "sums-rank0of2.safetensors.before"]
        (tmp_path / names[0]).write_bytes(b"x")
        write_tensor_file(tmp_path / names[1], {"a": torch.ones(1)}, format="snapshot", version=1, description={})
        (tmp_path / names[2]).mkdir()
        remove_checkpoint(tmp_path / "sums.safetensors")
        assert {found.name for found in tmp_path.iterdir()} == set(names)

    def test_a_truncated_file_is_removed_too(self, path):
        go_on(path)
        path.write_bytes(path.read_bytes()[:-100])
        remove_checkpoint(path)
        assert not path.exists()

    def test_a_folder_in_its_place_is_refused_at_once(self, tmp_path):
        counted = Counted()
        with pytest.raises(IsADirectoryError, match="is a folder, not a curvature checkpoint"):
            go_on(tmp_path, class_logits=counted)
        assert counted.calls == 0

    def test_one_process_writes_to_the_path_itself(self):
        assert rank_path("a/sums.safetensors", distributed=True) == Path("a/sums.safetensors")

    def test_each_of_several_processes_has_its_own_file(self, monkeypatch):
        monkeypatch.setattr(checkpoint_module, "num_processes", lambda: 4)
        monkeypatch.setattr(checkpoint_module, "process_rank", lambda: 3)
        assert rank_path("a/sums.safetensors", distributed=True) == Path("a/sums-rank3of4.safetensors")
        assert rank_path("a/sums.safetensors", distributed=False) == Path("a/sums.safetensors")


def rewritten(path, change):
    """The file with its description changed by a function, under digests that are right."""
    found = read_tensor_file(path, format=FORMAT, version=VERSION)
    change(found.description, found.tensors)
    write_tensor_file(path, found.tensors, format=FORMAT, version=VERSION, description=found.description)


class TestRefused:
    def refused(self, path, message, **options):
        """Refused with this message, before a batch is looked at, and left as it is."""
        before = path.read_bytes()
        counted = Counted()
        with pytest.raises(ValueError, match=message) as raised:
            go_on(path, class_logits=counted, **{"data": stopping(batches(), 0), **options})
        assert str(path) in str(raised.value)
        assert "elete the file to start the curvature pass from the beginning." in str(raised.value)
        assert counted.calls == 0
        assert path.read_bytes() == before

    def test_damaged(self, path):
        cut_off(path, 5)
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(path, "not a complete curvature checkpoint file.* or delete the file to start")

    @pytest.mark.parametrize(
        "change",
        [
            lambda header, _: header.pop("options"),
            lambda header, _: header.update(progress={"batches": 3}, options=None),
            lambda header, _: header.pop("fingerprint"),
        ],
    )
    def test_a_damaged_description(self, path, change):
        cut_off(path, 5)
        rewritten(path, change)
        self.refused(path, "does not describe a pass")

    def test_other_weights(self, path):
        cut_off(path, 5)
        model = wide_model()
        with torch.no_grad():
            model.layers[0].mixture.crew.down_proj[1] += 1e-3
        self.refused(path, "other weights", model=model)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 3}, r"\(rank=2, now rank=3\)"),
            ({"fisher": "mc"}, r"\(fisher='exact', now fisher='mc'\)"),
            ({"approximation": "reduce"}, r"\(approximation='expand', now approximation='reduce'\)"),
            ({"sketch": "exact"}, r"\(sketch='auto', now sketch='exact'\)"),
            ({"seed": 1, "rank": 4}, r"\(rank=2, seed=0, now rank=4, seed=1\)"),
        ],
    )
    def test_other_options(self, path, options, message):
        cut_off(path, 5)
        self.refused(path, f"other settings {message}", **options)

    def test_other_layers(self, path):
        cut_off(path, 5)
        model = wide_model()
        message = r"layers=\['layers.0.mixture.crew', 'layers.1.mixture.crew'\], now layers=\['layers.0.mixture.crew'\]"
        self.refused(path, message, model=model, layers=find_expert_layers(model)[:1])

    def test_another_process(self, path):
        cut_off(path, 5)
        rewritten(path, lambda header, _: header["options"].update(process=1, processes=2))
        self.refused(path, r"\(process=1, processes=2, now process=0, processes=1\)")

    @pytest.mark.parametrize("order", [[1, 0, 2, 3, 4, 5, 6], [0, 1, 2, 4, 3, 5, 6]])
    def test_another_order(self, path, order):
        cut_off(path, 5)
        data = batches()
        self.refused(path, "came in another order", data=[data[i] for i in order])

    def test_another_order_of_what_has_not_been_added_is_none(self, path):
        cut_off(path, 5, sketch="exact")
        data = batches()
        go_on(path, [*data[:4], data[6], data[5], data[4]], sketch="exact")

    def test_other_values(self, path):
        cut_off(path, 5)
        data = batches()
        data[0]["labels"][0] += 1
        self.refused(path, "came in another order", data=data)

    def test_too_few_batches(self, path):
        cut_off(path, 5)
        self.refused(path, "over at least 4 batches, and now there are only 3", data=batches()[:3])

    def test_weights_of_another_dtype(self, path):
        """The fingerprint does not tell them apart, and the sums are of another precision."""
        model = wide_model().float()
        cut_off(path, 5, model=model)
        self.refused(
            path, r"does not fit this pass \('inputs.gram' .*float32", model=model.double(), data=batches()[:4]
        )

    @pytest.mark.parametrize(
        "change",
        [
            lambda header, tensors: tensors.pop("generator"),
            lambda header, tensors: tensors.update(generator=torch.zeros(3, dtype=torch.uint8)),
            lambda header, tensors: tensors.pop("1.gradients.gram"),
            lambda header, tensors: tensors.update({"0.slots": torch.zeros(9, dtype=torch.float64)}),
        ],
    )
    def test_missing_and_misshapen_sums(self, path, change):
        cut_off(path, 5)
        rewritten(path, change)
        self.refused(path, "does not fit this pass", data=batches()[:4])

    def test_an_interval_that_is_none(self, path):
        with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
            go_on(path, every=0)


def test_what_a_later_release_adds_is_left_alone(path):
    cut_off(path, 5)

    def add(header, tensors):
        header["progress"].update(more=1)
        header.update(more=1)
        tensors.update(more=torch.ones(1))

    rewritten(path, add)
    assert_same_bits(go_on(path), collect_factors(wide_model(), answer_logits, batches(), rank=2))


def test_the_file_names_what_it_is(path):
    go_on(path, sketch="rsvd")
    found = read_tensor_file(path, format="curvature checkpoint", version=1)
    assert found.description["progress"]["examples"] == sum(SIZES)
    assert {"generator", "0.slots", "1.inputs.factor", "1.gradients.trace"} <= found.tensors.keys()
