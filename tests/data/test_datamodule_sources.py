"""Where the questions of a data module come from: folders, the hub and given splits, and how they become parts."""

import os
from pathlib import Path

import datasets
import pytest
import torch
from datamodule_cases import CALIBRATION, TEST, TRAIN, make, module, render, write

from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.files import DataUnavailableError
from bmoe_lightning.data.questions import Question, Splits, question_key
from bmoe_lightning.data.tasks.arc import ARC
from bmoe_lightning.data.tokenizer import train_word_tokenizer

TEST_DATA = Path(os.environ.get("BMOE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer(render((*TRAIN, *CALIBRATION, *TEST)), max_vocab=500)


def test_folder_without_validation_is_split(tokenizer, tmp_path):
    data = MultipleChoiceDataModule(
        write(tmp_path, train=TRAIN, test=TEST), tokenizer, calibration_fraction=0.3, seed=4
    )
    data.setup()
    fit, calibration = data.questions("train"), data.questions("calibration")
    assert len(calibration) == 7
    assert {q.id for q in (*fit, *calibration)} == {q.id for q in TRAIN}
    assert not {q.id for q in fit} & {q.id for q in calibration}
    assert data.questions("test") == TEST


def test_folder_with_validation_uses_it(tokenizer, tmp_path):
    data = MultipleChoiceDataModule(write(tmp_path, train=TRAIN, validation=CALIBRATION, test=TEST), tokenizer)
    data.setup()
    assert data.questions("calibration") == CALIBRATION
    assert data.questions("train") == TRAIN


@pytest.mark.parametrize("validation", [False, True])
def test_no_question_is_on_two_sides_and_test_stays_whole(tokenizer, tmp_path, validation):
    leaks = [Question(f"again-{q.id}", q.question.upper(), q.choices, q.answer) for q in (TEST[0], TEST[3])]
    splits = {"train": (*TRAIN, *leaks), "test": TEST}
    if validation:
        again = Question("again", CALIBRATION[2].question, ("x", "y"), 0)
        splits |= {"train": (*TRAIN, *leaks, again), "validation": (*CALIBRATION, leaks[0])}
    data = MultipleChoiceDataModule(write(tmp_path, **splits), tokenizer)
    with pytest.warns(UserWarning, match="were left out") as caught:
        data.setup()
    expected = "2 of 25 train questions are also asked in the test split (2 with the same choices); they were left out"
    if validation:
        expected = (
            "3 of 26 train questions are also asked in the calibration or test split (2 with the same choices), and "
            "1 of 8 calibration questions are also asked in the test split (1 with the same choices); they were left "
            "out"
        )
    assert [str(warning.message) for warning in caught] == [expected]
    keys = [{question_key(q) for q in data.questions(part)} for part in ("train", "calibration", "test")]
    assert len(keys[0] | keys[1] | keys[2]) == sum(len(part) for part in keys)
    assert data.questions("test") == TEST


def test_limit_takes_a_seeded_choice_of_every_part_and_keeps_the_number_of_choices(tokenizer):
    data = module(tokenizer, calibration=(*CALIBRATION, make(99, "calibration", choices=5)), limit=3, seed=1)
    assert [len(data.questions(part)) for part in ("train", "calibration", "test")] == [3, 3, 3]
    assert "calibration-99" not in {q.id for q in data.questions("calibration")}
    assert data.num_choices == 5
    assert set(data.questions("test")) <= set(TEST)
    assert [i for batch in data.test_dataloader() for i in batch["index"].tolist()] == [0, 1, 2]


@pytest.mark.parametrize("part", ["train", "calibration", "test"])
def test_empty_parts_are_refused_at_construction(tokenizer, part):
    with pytest.raises(ValueError, match=f"the {part} split is empty"):
        module(tokenizer, **{part: ()})


def test_train_that_is_all_in_test_is_refused(tokenizer, tmp_path):
    data = MultipleChoiceDataModule(write(tmp_path, train=TEST, validation=CALIBRATION, test=TEST), tokenizer)
    with (
        pytest.warns(UserWarning, match="11 of 11"),
        pytest.raises(ValueError, match="the train split is empty, or all its questions are asked in a later split"),
    ):
        data.setup()


def test_empty_validation_file_is_refused(tokenizer, tmp_path):
    data = MultipleChoiceDataModule(write(tmp_path, train=TRAIN, validation=(), test=TEST), tokenizer)
    with pytest.raises(ValueError, match="the calibration split is empty"):
        data.setup()


def test_tokenizer_from_a_folder_and_none_from_a_hub_switched_off(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "words")
    data = module(str(tmp_path / "words"))
    assert torch.equal(data.answer_token_ids, module(tokenizer).answer_token_ids)
    missing = MultipleChoiceDataModule(Splits(TRAIN, CALIBRATION, TEST), "someone/not-there")
    with pytest.raises(DataUnavailableError, match="the tokenizer 'someone/not-there' could not be loaded") as caught:
        missing.setup()
    assert caught.value.__suppress_context__


def test_hub_data_are_fetched_in_prepare_data(tokenizer, monkeypatch):
    def rows(questions):
        return [
            {
                "id": q.id,
                "question_stem": q.question,
                "choices": {"text": list(q.choices), "label": list("ABCD")[: len(q.choices)]},
                "answerKey": "ABCD"[q.answer],
            }
            for q in questions
        ]

    parts = {"train": TRAIN, "validation": CALIBRATION, "test": TEST}
    calls = []

    def load_dataset(*arguments, **_):
        calls.append(arguments)
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows(q)) for name, q in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = MultipleChoiceDataModule("allenai/openbookqa", tokenizer)
    data.prepare_data()
    assert calls == [("allenai/openbookqa", "main")]
    data.setup()
    assert [data.questions(p) for p in ("train", "calibration", "test")] == [TRAIN, CALIBRATION, TEST]


def test_hub_data_out_of_reach(tokenizer, tmp_path):
    with pytest.raises(DataUnavailableError, match="local folder"):
        MultipleChoiceDataModule("allenai/openbookqa", tokenizer).prepare_data()
    MultipleChoiceDataModule(write(tmp_path, train=TRAIN, test=TEST), tokenizer).prepare_data()


def test_task_and_revision_reach_the_hub(tokenizer, monkeypatch):
    calls = []

    def load(source, split, **options):
        calls.append((source, split, options))
        return {"train": TRAIN, "validation": CALIBRATION, "test": TEST}[split]

    monkeypatch.setattr("bmoe_lightning.data.splits.load_questions", load)
    data = MultipleChoiceDataModule("someone/copy", tokenizer, task="arc", revision="r1")
    data.prepare_data()
    data.setup()
    assert {split for _, split, _ in calls} == {"train", "validation", "test"}
    assert all(options == {"task": ARC(), "revision": "r1"} for *_, options in calls)


@pytest.mark.parametrize("task", ["arc", ARC(), "bmoe_lightning.data.tasks.arc:ARC"])
def test_task_of_a_folder(tokenizer, tmp_path, task):
    data = MultipleChoiceDataModule(write(tmp_path, train=TRAIN, test=TEST), tokenizer, task=task)
    data.setup()
    assert data.questions("test") == TEST
    other = MultipleChoiceDataModule(str(tmp_path), tokenizer, task="openbookqa")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: question_stem missing"):
        other.setup()


@pytest.mark.parametrize("options", [{"task": "arc"}, {"revision": "main"}, {"protocol": "paper"}])
def test_splits_need_no_task(tokenizer, options):
    with pytest.raises(ValueError, match="task, revision and protocol apply to a folder or hub id, but data are Spl"):
        module(tokenizer, **options)


@pytest.mark.parametrize(("name", "choices"), [("openbookqa", 4), ("arc_easy", 5)])
def test_real_data(name, choices):
    folder = TEST_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {name} at hand; set BMOE_TEST_DATA to a folder that has it")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    tokenizer = train_word_tokenizer([*lines, *render(TRAIN)], max_vocab=2000)
    data = MultipleChoiceDataModule(str(folder), tokenizer)
    with pytest.warns(UserWarning, match="train questions are also asked in the test split"):
        data.setup()
    assert data.num_choices == choices
    fit, calibration = data.questions("train"), data.questions("calibration")
    assert len(calibration) == pytest.approx(0.2 * (len(fit) + len(calibration)), abs=3)
    share = [[sum(q.answer == a for q in part) / len(part) for a in range(4)] for part in (fit, calibration)]
    assert share[0] == pytest.approx(share[1], abs=0.01)
    total = 0
    for batch in data.test_dataloader():
        total += len(batch["index"])
        assert set(batch["input_ids"][:, -1].tolist()) == set(tokenizer("Answer:")["input_ids"])
        assert bool(batch["choice_mask"].gather(1, batch["label"][:, None]).all())
    assert total == len(data.questions("test"))
