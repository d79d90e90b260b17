"""Where a run takes its model and its questions from: the splits above all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bmoe_lightning.data.questions import Splits, question_key
from recipes.common.errors import RecipeError
from recipes.qwen_obqa import builtin_model, sources
from recipes.qwen_obqa.builtin_task import World
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.reader_model import read_questions
from recipes.qwen_obqa.settings import Settings
from recipes.qwen_obqa.sources import OtherSet, limited
from recipes.qwen_obqa.sources import prepare_source as prepared

PLAIN = ("map", "temperature", "laplace_lpo")


def rows(split, size, word="number"):
    return [
        {
            "id": f"{split}-{i}",
            "question_stem": f"which {word} follows {i} in {split}",
            "choices": {"text": [f"{word}{i + k}" for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(size)
    ]


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, content in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A folder in the hub's columns, without a validation split."""
    return write(tmp_path / "data", train=rows("train", 200), test=rows("test", 60))


WHOLE = Splits(*(World().questions(name) for name in ("fit", "calibration", "test")))


def settings(tmp_path, **options):
    return Settings(
        **{"output_dir": str(tmp_path / "run"), "dry_run": True, "quiet": True, "methods": PLAIN, **options}
    ).resolved()


def prepare_source(chosen):
    return prepared(chosen, build_methods(chosen))


def order(loader):
    return [index for batch in loader for index in batch["index"].tolist()]


def ids(questions):
    return {question.id for question in questions}


def test_the_banner_names_the_files_of_all_splits(tmp_path, data):
    lines = prepare_source(settings(tmp_path, data=data)).banner.splitlines()[-2:]
    assert lines == [f"Read {n} rows of {data}/{split}.jsonl." for split, n in (("train", 200), ("test", 60))]


def test_true_and_false_answer_the_prompt_of_the_passage(tmp_path):
    yes_no = [
        {"question": f"is {i} more than nine", "passage": f"Here {i} of ten are left.", "answer": i > 9}
        for i in range(160)
    ]
    folder = write(tmp_path / "yes_no", train=yes_no[1::2], validation=yes_no[::2])
    source = prepare_source(settings(tmp_path, data=folder, prompt="true_false"))
    data = source.data(0)
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    assert tokenizer.convert_ids_to_tokens(data.answer_token_ids.tolist()) == ["False", "True"]
    batch = next(iter(data.test_dataloader()))
    for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
        question = data.questions("test")[index]
        assert label == (int(question.question.split()[1]) > 9)


class TestSplits:
    @pytest.mark.parametrize("validation", [False, True])
    def test_seeds_share_the_splits_and_differ_in_the_training_order(self, tmp_path, data, validation):
        if validation:
            write(tmp_path / "data", validation=rows("validation", 50))
        source = prepare_source(settings(tmp_path, data=data))
        one, other = source.data(1), source.data(2)
        for split in ("calibration", "test", "train"):
            found = [tuple(q.id for q in made.questions(split)) for made in (one, other)]
            assert found[0] == found[1]
            assert split == "train" or found[0] == tuple(question.id for question in getattr(source, split))
        for stage in ("calibration_dataloader", "test_dataloader"):
            assert order(getattr(one, stage)()) == order(getattr(other, stage)())
        orders = [order(made.train_dataloader()) for made in (one, other, source.data(1))]
        assert orders[0] != orders[1]
        assert orders[0] == orders[2]

    def test_a_fifth_of_train_is_set_aside_without_a_validation_split(self, tmp_path, data):
        source = prepare_source(settings(tmp_path, data=data, methods=("map",)))
        train, calibration = ids(source.train), ids(source.calibration)
        assert len(calibration) == 40
        assert len(train) == 64  # the dry run's limit, of the 160 that remain
        assert not train & calibration
        assert train | calibration <= {f"train-{i}" for i in range(200)}
        assert len(source.test) == 8

    def test_the_validation_split_is_the_calibration_split(self, tmp_path, data):
        write(tmp_path / "data", validation=rows("validation", 50))
        source = prepare_source(settings(tmp_path, data=data))
        assert ids(source.calibration) == {f"validation-{i}" for i in range(50)}

    @pytest.mark.filterwarnings("ignore:.*also asked in:UserWarning")
    @pytest.mark.parametrize("validation", [False, True])
    def test_no_question_is_in_two_splits(self, tmp_path, data, validation):
        extra = rows("test", 10)
        for row in extra:
            row["id"] = "again-" + row["id"]
        write(tmp_path / "data", train=rows("train", 200) + extra)
        if validation:
            write(tmp_path / "data", validation=rows("validation", 50) + extra + rows("train", 10))
        source = prepare_source(settings(tmp_path, data=data))
        train, calibration, test = (
            {question_key(q) for q in part} for part in (source.train, source.calibration, source.test)
        )
        assert not train & calibration
        assert not train & test
        assert not calibration & test
        assert len(test) == 8

    def test_a_protocol_says_what_the_splits_are_for(self, tmp_path, data):
        write(tmp_path / "data", validation=rows("validation", 50))
        sizes = {"limit_train": 400, "limit_validation": 400, "limit_test": 400, "methods": ("map",)}
        source = prepare_source(settings(tmp_path, data=data, protocol="paper", **sizes))
        assert [len(part) for part in (source.train, source.calibration, source.test)] == [160, 40, 50]
        assert ids(source.test) == {f"validation-{i}" for i in range(50)}
        assert source.banner.splitlines()[-1] == (
            "Protocol paper: 160 questions of train to train on, 40 to calibrate (20 % of train), "
            "50 of validation to report."
        )
        with pytest.warns(UserWarning, match="the protocol blob trains on the 200 calibration questions too"):
            anchored = prepare_source(settings(tmp_path, data=data, protocol="blob", **sizes))
        assert [len(part) for part in (anchored.train, anchored.calibration, anchored.test)] == [200, 200, 50]
        assert ids(anchored.data(0).questions("train")) == ids(anchored.train)  # the anchors are not left out
        with pytest.raises(RecipeError, match="unknown protocol 'papers', did you mean 'paper'"):
            prepare_source(settings(tmp_path, data=data, protocol="papers"))

    def test_data_of_a_given_model_are_split_the_same_way(self, tmp_path, data):
        tokenizer = str(read_questions(World().questions("fit"), tmp_path / "tokenizer", steps=0, progress=False))
        sizes = {"batch_size": 8, "eval_batch_size": 8}
        small = prepare_source(settings(tmp_path, data=data, **sizes))
        given = prepare_source(settings(tmp_path, data=data, model=tokenizer, **sizes))
        assert given.model == given.tokenizer == tokenizer
        assert (given.train, given.calibration, given.test) == (small.train, small.calibration, small.test)
        assert given.model_hash(0) == ""
        assert len(small.model_hash(0)) == 12


class TestLimit:
    def test_bounds_every_split_with_the_same_draw(self, tmp_path, data):
        one, other = (prepare_source(settings(tmp_path, data=data, limit=30)) for _ in range(2))
        assert [len(part) for part in (one.train, one.calibration, one.test)] == [30, 30, 8]
        assert (one.train, one.calibration, one.test) == (other.train, other.calibration, other.test)

    def test_chooses_within_the_splits_of_the_whole(self, tmp_path, data):
        whole, part = (
            prepare_source(settings(tmp_path, data=data, limit_train=n, limit_validation=n, limit_test=n))
            for n in (200, 20)
        )
        assert ids(part.calibration) <= ids(whole.calibration)
        assert ids(part.test) <= ids(whole.test)
        assert not ids(part.train) & ids(whole.calibration)
        # Not the first ones: files are often sorted.
        assert [q.id for q in part.test] != [q.id for q in whole.test[:20]]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [64, 128, 8]),
            ({"limit": 500}, [64, 128, 8]),
            ({"limit": 10}, [10, 10, 8]),
            ({"batch_size": 4, "eval_batch_size": 4}, [8, 8, 4]),
            ({"batch_size": 4, "eval_batch_size": 4, "methods": ("map", "evidence_temperature")}, [8, 8, 4]),
            ({"model": "a folder"}, [4, 4, 2]),
            ({"model": "a folder", "batch_size": 8, "eval_batch_size": 16}, [16, 32, 8]),
            ({"limit_train": 70, "limit_validation": 40, "limit_test": 30, "limit": 5}, [70, 40, 30]),
            ({"limit_test": 3}, [64, 128, 3]),
            ({"limit_test": 3, "limit": 9, "dry_run": False}, [9, 9, 3]),
        ],
    )
    def test_of_each_split(self, tmp_path, options, expected):
        chosen = settings(tmp_path, **options)
        splits = limited(chosen, WHOLE, build_methods(chosen))
        assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == expected

    def test_too_few_calibration_questions_for_a_method(self, tmp_path, data):
        with pytest.raises(
            RecipeError,
            match=r"^evidence_temperature needs at least 100 inputs of the validation split, and there are 40.*--limit",
        ):
            prepare_source(settings(tmp_path, data=data, methods=("map", "evidence_temperature")))

    def test_few_calibration_questions_do_for_all_others(self, tmp_path, data):
        others = "map,mc_dropout,temperature,shrunk_temperature,laplace_evidence,laplace_lpo,laplace_temperature"
        assert len(prepare_source(settings(tmp_path, data=data, methods=tuple(others.split(",")))).calibration) == 40

    def test_a_hundred_are_enough_for_the_full_run_and_a_dry_run_takes_fewer(self, tmp_path, data):
        write(tmp_path / "data", validation=rows("validation", 100))
        source = prepare_source(settings(tmp_path, data=data, methods=("map", "evidence_temperature")))
        assert len(source.calibration) == 64  # two batches


class TestSmallModel:
    @pytest.fixture
    def read(self, monkeypatch):
        """The questions that the small model was given to read."""
        seen = []

        def record(questions, folder, **options):
            seen.extend(questions)
            return read_questions(questions, folder, **{**options, "steps": 0})

        monkeypatch.setattr(sources, "read_questions", record)
        return seen

    @pytest.mark.filterwarnings("ignore:.*also asked in:UserWarning")
    @pytest.mark.parametrize("validation", [False, True])
    def test_reads_no_answer_of_the_calibration_or_test_split(self, tmp_path, data, read, validation):
        write(tmp_path / "data", train=rows("train", 200) + rows("test", 10))
        if validation:
            write(tmp_path / "data", validation=rows("validation", 50) + rows("train", 10))
        source = prepare_source(settings(tmp_path, data=data, dry_run=False))
        known = {question_key(q) for q in read}
        assert known >= {question_key(q) for q in source.train}
        assert not known & {question_key(q) for q in source.calibration}
        assert not known & {question_key(q) for q in source.test}

    def test_other_data_in_the_same_folder_get_another_model(self, tmp_path, data):
        other = write(tmp_path / "other", train=rows("train", 200, "colour"), test=rows("test", 60, "colour"))
        one, two = (prepare_source(settings(tmp_path, data=source)) for source in (data, other))
        assert one.model != two.model
        assert "colour7" in AutoTokenizer.from_pretrained(two.tokenizer).get_vocab()

    @pytest.mark.parametrize("source", [None, "data"])
    def test_another_prompt_gets_a_tokenizer_that_knows_it(self, tmp_path, data, source):
        data = data if source else None
        models = {prepare_source(settings(tmp_path, data=data, prompt=p)).model for p in ("instruction", "letters")}
        assert len(models) == 2

    def test_random_weights_of_a_dry_run_are_not_taken_for_trained_ones(self, tmp_path, data, read):
        models = {prepare_source(settings(tmp_path, data=data, dry_run=dry)).model for dry in (True, False)}
        assert len(models) == 2

    def test_the_same_run_again_finds_its_model(self, tmp_path, data, monkeypatch):
        first = prepare_source(settings(tmp_path, data=data))
        monkeypatch.setattr("recipes.qwen_obqa.reader_model.Qwen2MoeForCausalLM", None)
        assert prepare_source(settings(tmp_path, data=data)).model == first.model

    def test_too_few_questions_are_noticed_before_it_reads(self, tmp_path, data, read):
        with pytest.raises(RecipeError, match="at least 100"):
            prepare_source(settings(tmp_path, data=data, dry_run=False, methods=("evidence_temperature",)))
        assert read == []


class TestBuiltIn:
    def test_banner_says_what_it_is_and_how_to_get_the_paper_s(self, tmp_path):
        banner = prepare_source(settings(tmp_path)).banner
        assert "small built-in model" in banner
        assert "not\nthe paper's experiment" in banner
        assert "--model Qwen/Qwen1.5-MoE-A2.7B --data allenai/openbookqa" in banner

    def test_splits_are_the_world_s(self, tmp_path):
        source = prepare_source(settings(tmp_path))
        for part, split in ((source.train, "fit"), (source.calibration, "calibration"), (source.test, "test")):
            assert ids(part) <= ids(World().questions(split))

    def test_a_full_run_pretrains_in_the_output_folder(self, tmp_path, monkeypatch):
        calls = []

        def pretrain(world, _config, *, cache_dir, seed, progress):
            calls.append((world, cache_dir, seed, progress))
            return read_questions(world.questions("fit"), tmp_path / "pretrained", steps=0, progress=False)

        monkeypatch.setattr(builtin_model, "pretrain", pretrain)
        source = prepare_source(settings(tmp_path, dry_run=False))
        assert calls == [(World(), tmp_path / "run" / "model", 0, False)]
        source.model_of(3)
        assert calls[-1][2] == 3  # every seed starts from a model of its own
        assert source.model == source.tokenizer == str(tmp_path / "pretrained")
        assert [len(part) for part in (source.train, source.calibration)] == [259, 172]

    @pytest.mark.parametrize("given", [False, True])
    def test_quiet_is_quiet(self, tmp_path, data, given, capsys):
        prepare_source(settings(tmp_path, data=data if given else None))
        assert "The small model" not in "".join(capsys.readouterr())


class TestRealData:
    def test_banner_of_the_small_model_says_what_to_expect(self, tmp_path, data):
        banner = prepare_source(settings(tmp_path, data=data)).banner
        assert data in banner
        assert "near chance" in banner
        assert "--model Qwen/Qwen1.5-MoE-A2.7B" in banner

    def test_banner_of_a_given_model_names_both(self, tmp_path, data):
        model = prepare_source(settings(tmp_path, data=data)).model
        banner = prepare_source(settings(tmp_path, data=data, model=model)).banner
        assert banner.splitlines()[0] == f"Model {model} on {data}."

    @pytest.mark.parametrize("missing", ["train", "test"])
    def test_a_missing_split_is_one_sentence(self, tmp_path, data, missing):
        (tmp_path / "data" / f"{missing}.jsonl").unlink()
        with pytest.raises(RecipeError, match=missing):
            prepare_source(settings(tmp_path, data=data))

    def test_data_that_are_nowhere(self, tmp_path):
        with pytest.raises(RecipeError, match="not there"):
            prepare_source(settings(tmp_path, data=str(tmp_path / "no" / "such" / "folder")))

    def test_a_model_without_a_tokenizer(self, tmp_path, data):
        made = prepare_source(settings(tmp_path, data=data)).model
        (tmp_path / "empty").mkdir()
        shutil.copy(Path(made) / "config.json", tmp_path / "empty")
        with pytest.raises(RecipeError, match="tokenizer"):
            prepare_source(settings(tmp_path, data=data, model=str(tmp_path / "empty")))


class TestModelFirst:
    """What is wrong with the model is said before the data are asked for, which here are nowhere."""

    @pytest.fixture(autouse=True)
    def _no_data(self, monkeypatch):
        def never(*_):
            raise AssertionError("the data were asked for")

        monkeypatch.setattr(sources, "load_splits", never)

    @pytest.mark.parametrize("model", ["/no/such/folder", "./model", "~/model", "a/b/c", "models/"])
    def test_a_folder_that_is_not_there(self, tmp_path, model):
        with pytest.raises(RecipeError, match=f"^there is no folder '{model}', and it is no hub id"):
            prepare_source(settings(tmp_path, model=model))

    @pytest.mark.parametrize("model", ["Qwen/Qwen1.5-MoE-A2.7B", "mymodel"])
    def test_a_hub_id_that_cannot_be_had(self, tmp_path, model):
        with pytest.raises(
            RecipeError, match=f"^the model '{model}' could not be loaded .*local folder works"
        ) as caught:
            prepare_source(settings(tmp_path, model=model))
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize("config", [None, "{", '{"model_type": "unheard_of"}'])
    def test_a_folder_without_a_usable_configuration(self, tmp_path, config):
        folder = tmp_path / "model"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config)
        with pytest.raises(
            RecipeError, match=f"^the model '{folder}' could not be loaded .*are all its files"
        ) as caught:
            prepare_source(settings(tmp_path, model=str(folder)))
        assert len(str(caught.value).splitlines()) == 1


def test_how_choices_are_scored_and_laid_out_is_of_the_run_s_prompt_alone(tmp_path, data):
    """What was measured before training must not refuse another data set after it."""
    source = prepare_source(settings(tmp_path, data=data, prompt="cloze", normalise="characters"))
    splits = Splits(tuple(source.train), tuple(source.calibration), tuple(source.test))
    source = replace(source, others={"letters": OtherSet(splits, "letters"), "same": OtherSet(splits)})
    run = source.data(0, shared_prompts=True)
    same, letters = (source.data_of(name, shared_prompts=True) for name in ("same", "letters"))
    for module in (run, same):
        assert (module.prompt_format.name, module.normalise, module.shared_prompts) == ("cloze", "characters", True)
        assert module.answer_token_ids is None
    assert (letters.prompt_format.name, letters.normalise, letters.shared_prompts) == ("letters", "sum", "auto")
    assert len(letters.answer_token_ids) == 4
