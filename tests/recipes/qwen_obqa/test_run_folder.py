"""Whether a run can begin, and what becomes of an earlier one."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bmoe_lightning.data import Question
from bmoe_lightning.utils.folder_lock import locked_folder
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.safetensors_io import write_tensor_file
from recipes.common.errors import RecipeError
from recipes.qwen_obqa import experiment
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.run_folder import (
    begin,
    check_files,
    check_pretrained,
    check_start,
    plain_notes,
    remove_leftovers_of_killed_runs,
    run_identity,
)
from recipes.qwen_obqa.settings import CurvatureSettings, Settings
from recipes.qwen_obqa.sources import Source

OWN = ("results.json", "results.csv", "results.md", "predictions.jsonl", "label_budget.json")


def settings(folder, **options):
    return Settings(**{"output_dir": str(folder), "methods": ("map",), "accelerator": "cpu", **options}).resolved()


def source(chosen, answer=0, tested=0):
    question, test = (Question("q", "which one", ("this", "that"), given) for given in (answer, tested))
    return Source(chosen, "m", "m", [question], [question], [test], "")


def start(folder, answer=0, tested=0, **options):
    chosen = settings(folder, **options)
    resumes = check_start(chosen, build_methods(chosen), folder)
    begin(chosen, folder, source(chosen, answer, tested), resumes=resumes)
    return resumes


def content(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def earlier(tmp_path):
    """A folder with the files of a run, the small model and something of the person's own."""
    folder = tmp_path / "deep" / "run"
    assert start(folder) is False
    for name in ("seed-0", "seed-12", "tensorboard", "training_curves", "figures", "model"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    for name in (*OWN, "notes.txt"):
        (folder / name).write_text("x")
    return folder


class TestEarlierRun:
    def test_the_same_settings_go_on(self, earlier):
        before = content(earlier)
        assert start(earlier) is True
        assert start(earlier, resume=True, quiet=True) is True
        assert content(earlier) == before

    def test_more_seeds_go_on(self, earlier):
        assert start(earlier, seeds=3, first_seed=1) is True

    def test_how_often_sums_are_written_may_change(self, earlier):
        assert start(earlier, curvature_checkpoint_every=7) is True

    def test_methods_and_their_options_may_change(self, earlier):
        curvature = CurvatureSettings(rank=3)
        assert (
            start(earlier, methods=("map", "laplace_lpo"), set=("laplace_lpo.link=probit",), curvature=curvature)
            is True
        )

    def test_other_settings_are_refused_with_both_ways_out(self, earlier):
        before = content(earlier)
        for resume in (False, True):
            with pytest.raises(RecipeError, match=r"\(epochs=44\).*--overwrite.*--output-dir"):
                start(earlier, epochs=3, resume=resume)
        assert content(earlier) == before

    @pytest.mark.parametrize(
        ("name", "other"),
        [("protocol", "paper"), ("normalise", "bytes"), ("schedule", "cosine"), ("learning_rate", 1e-5)],
    )
    def test_a_run_of_before_an_option_was_added_had_its_default(self, tmp_path, name, other):
        given = {"data": "a folder", "prompt": "cloze"}
        start(tmp_path, **given)
        path = tmp_path / "run.json"
        content = read_json_file(path, format="description of a run", version=1).description
        earlier = {key: value for key, value in content.items() if key != name}
        write_json_file(path, format="description of a run", version=1, description=earlier)
        identity = run_identity(tmp_path)
        for _ in range(2):
            assert start(tmp_path, **given) is True
            assert run_identity(tmp_path) == identity
        with pytest.raises(RecipeError, match=rf"had other settings \({name}="):
            start(tmp_path, **given, **{name: other})
        start(tmp_path, overwrite=True, **given, **{name: other})
        assert run_identity(tmp_path) != identity
        with pytest.raises(RecipeError, match=rf"had other settings \({name}={other!r}\)"):
            start(tmp_path, **given)

    def test_the_identity_is_that_of_settings_and_questions(self, tmp_path):
        found = {start(tmp_path / str(i), **given): run_identity(tmp_path / str(i)) for i, given in enumerate(({}, {}))}
        assert len(set(found.values())) == 1
        same = run_identity(tmp_path / "0")
        start(tmp_path / "0", limit_test=5, tested=1, seeds=3)
        assert run_identity(tmp_path / "0") == same
        start(tmp_path / "2", answer=1)
        assert run_identity(tmp_path / "2") != same

    def test_a_seed_starts_from_the_weights_that_it_has_started_from(self, earlier):
        identity = run_identity(earlier)
        for _ in range(2):
            check_pretrained(earlier, 0, "abc")
            check_pretrained(earlier, 1, "def")
            assert start(earlier) is True
        with pytest.raises(RecipeError, match=r"seed 1 .* weights def, and the model now has abc; give --overwrite"):
            check_pretrained(earlier, 1, "abc")
        assert run_identity(earlier) == identity
        start(earlier, overwrite=True)
        check_pretrained(earlier, 1, "abc")

    def test_a_seed_has_the_configuration_and_the_tokenizer_that_it_has_started_with(self, earlier, tmp_path):
        identity, model = run_identity(earlier), tmp_path / "model"
        model.mkdir()
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            (model / name).write_text("{}")
        for _ in range(2):
            check_files(earlier, 0, str(model))
            assert start(earlier) is True
        (model / "generation_config.json").write_text("{ }")
        check_files(earlier, 0, str(model))
        (model / "tokenizer.json").write_text("{ }")
        (model / "added_tokens.json").write_text("{}")
        with pytest.raises(
            RecipeError, match=r"added_tokens.json, tokenizer.json of .*model changed after seed 0 .* --over"
        ):
            check_files(earlier, 0, str(model))
        check_files(earlier, 1, str(model))
        assert run_identity(earlier) == identity
        start(earlier, overwrite=True)
        check_files(earlier, 0, str(model))

    def test_other_questions_are_refused(self, earlier):
        before = content(earlier)
        with pytest.raises(RecipeError, match=r"questions are not those.*--overwrite"):
            start(earlier, answer=1)
        assert content(earlier) == before

    def test_other_test_questions_are_refused_unless_their_limit_has_changed(self, earlier):
        with pytest.raises(RecipeError, match=r"questions are not those.*--overwrite"):
            start(earlier, tested=1)
        assert start(earlier, tested=1, limit_test=5) is True
        assert start(earlier, tested=1, limit_test=5) is True
        with pytest.raises(RecipeError, match=r"questions are not those"):
            start(earlier, tested=0, limit_test=5)

    def test_overwriting_removes_the_run_s_own_files_alone(self, earlier):
        assert start(earlier, epochs=3, overwrite=True) is False
        assert sorted(path.name for path in earlier.iterdir()) == ["model", "notes.txt", "run.json"]
        assert (earlier / "model" / "file").is_file()
        assert json.loads((earlier / "run.json").read_text())["description"]["epochs"] == 3
        assert start(earlier, epochs=3) is True

    @pytest.mark.parametrize("text", ["{", "[]", ""])
    def test_a_damaged_description(self, earlier, text):
        (earlier / "run.json").write_text(text)
        with pytest.raises(RecipeError, match=r"run\.json.* is damaged; --overwrite"):
            start(earlier)
        assert start(earlier, overwrite=True) is False
        assert not (earlier / "seed-0").exists()

    def test_overwriting_waits_until_the_new_run_can_start(self, earlier):
        before = content(earlier)
        for wrong in ({"data": "/no/such/folder"}, {"model": "/no/such/folder"}, {"precision": "float7"}):
            with pytest.raises(RecipeError):
                experiment.run(settings(earlier, overwrite=True, quiet=True, **wrong))
            assert content(earlier) == before

    def test_a_run_that_could_not_start_is_in_nobody_s_way(self, tmp_path):
        with pytest.raises(RecipeError, match="not there"):
            experiment.run(settings(tmp_path, quiet=True, data="/no/such/folder"))
        (tmp_path / "model").mkdir()  # pre-training may have been cut off later
        assert start(tmp_path) is False

    def test_killed_while_the_description_was_written(self, tmp_path):
        (tmp_path / f".run.json.{'0' * 32}.tmp").touch()
        assert start(tmp_path) is False
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]

    def test_killed_while_an_earlier_run_was_replaced(self, earlier, monkeypatch):
        def killed(path):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                start(earlier, epochs=3, overwrite=True)
        assert start(earlier, epochs=3) is False
        assert not (earlier / "seed-0").exists()
        assert start(earlier, epochs=3) is True

    def test_what_killed_runs_left_is_removed(self, tmp_path):
        (tmp_path / f".run.json.{'0' * 32}.tmp").touch()
        (tmp_path / "model" / ".unfinished-abc").mkdir(parents=True)
        fit = tmp_path / "seed-0" / "bayesian_moe"
        left = [tmp_path / "seed-0" / f".trained.safetensors.elsewhere-1-{'0' * 32}.tmp"]
        left += [fit / f".methods-0123456789ab.safetensors.elsewhere-1-{'0' * 32}.tmp"]
        left += [fit / "snapshots" / f".0-epoch-0000.safetensors.{'0' * 32}.tmp"]
        orphan = fit / "methods-0123456789ab.safetensors"
        write_tensor_file(orphan, {"a": torch.ones(1)}, format="methods", version=1, description={})
        for path in left:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (fit / "methods-fedcba987654.safetensors").write_text("mine")
        remove_leftovers_of_killed_runs(tmp_path)
        assert not any(path.exists() for path in (*left, orphan))
        assert (fit / "methods-fedcba987654.safetensors").exists()
        assert list((tmp_path / "model").iterdir()) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_with_other_things(self, tmp_path, overwrite):
        (tmp_path / "seed-0").mkdir()
        with pytest.raises(RecipeError, match="holds no earlier run"):
            start(tmp_path, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["seed-0"]


class TestChecks:
    def test_a_file_is_no_output_folder(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(RecipeError, match=r"--output-dir .*file cannot be written .it is a file."):
            start(tmp_path / "file")
        with pytest.raises(RecipeError, match=r"--output-dir .*below cannot be written"):
            start(tmp_path / "file" / "below")
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        def denied(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", denied)
        with pytest.raises(RecipeError, match=r"cannot be written .Permission denied."):
            start(tmp_path)

    def test_two_processes_do_not_run_in_one_folder(self, tmp_path):
        script = (
            "import sys, time; from pathlib import Path; from bmoe_lightning.utils.folder_lock import locked_folder\n"
            "with locked_folder(Path(sys.argv[1])) as locked: print(locked, flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as other:
            assert other.stdout.readline() == "True\n"
            with pytest.raises(RecipeError, match=r"another process is running in .*--output-dir"):
                experiment.run(settings(tmp_path, quiet=True))
            other.kill()
        assert list(tmp_path.iterdir()) == []
        with locked_folder(tmp_path) as locked:
            assert locked

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [({"accelerator": "quantum"}, "--accelerator quantum"), ({"precision": "float7"}, "--precision float7")],
    )
    def test_what_lightning_does_not_know(self, tmp_path, wrong, message):
        with pytest.raises(RecipeError, match=f"{message}.* does not work here: ") as caught:
            start(tmp_path, **wrong)
        assert len(str(caught.value).splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_gpu_that_is_not_there(self, tmp_path, monkeypatch):
        for kind in ("cuda.CUDAAccelerator", "mps.MPSAccelerator"):
            monkeypatch.setattr(f"lightning.pytorch.accelerators.{kind}.is_available", staticmethod(lambda: False))
        with pytest.raises(RecipeError, match=r"--accelerator gpu .*does not work here"):
            start(tmp_path, accelerator="gpu")


class TestNotes:
    def test_one_line_without_the_place_and_as_before_afterwards(self, capsys):
        def fails():
            with plain_notes():
                warnings.simplefilter("always")
                warnings.warn("few questions:\n  12 of them", UserWarning, stacklevel=1)
                raise KeyError

        before = warnings.showwarning
        with pytest.raises(KeyError):
            fails()
        assert capsys.readouterr().err == "note: few questions: 12 of them\n"
        assert warnings.showwarning is before

    def test_a_run_shows_its_warnings_so(self, tmp_path, monkeypatch, capsys):
        def warns(*_):
            warnings.warn("odd questions", UserWarning, stacklevel=1)
            raise RecipeError("stop")

        monkeypatch.setattr(experiment, "prepare_source", warns)
        with pytest.raises(RecipeError, match="stop"):
            experiment.run(settings(tmp_path))
        err = capsys.readouterr().err
        assert "note: odd questions\n" in err
        assert Path(__file__).name not in err


def test_a_sketch_that_does_not_add_up_is_refused_on_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.qwen_obqa.run_folder.num_processes", lambda: 2)
    with pytest.raises(RecipeError, match="rsvd"):
        start(tmp_path, curvature=CurvatureSettings(sketch="rsvd"), methods=("laplace_lpo",))
    assert start(tmp_path, curvature=CurvatureSettings(sketch="rsvd")) is False
