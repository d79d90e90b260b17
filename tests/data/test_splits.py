"""The parts that each protocol makes of real layouts: local folders, the hub, and data that lack a split."""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from datamodule_cases import render

from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.protocols import HeldOutShare, Parts, Protocol, get_protocol
from bmoe_lightning.data.protocols.blob import BLoB
from bmoe_lightning.data.protocols.paper import Paper
from bmoe_lightning.data.questions import split_train
from bmoe_lightning.data.splits import download_splits, load_splits
from bmoe_lightning.data.tokenizer import train_word_tokenizer

TEST_DATA = Path(os.environ.get("BMOE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
KEYS = "ABCD"


def science(split, size):
    return [
        {
            "id": f"{split}-{i}",
            "question_stem": f"which number follows {i} in {split}",
            "choices": {"text": [f"n{i + k}" for k in range(4)], "label": list(KEYS)},
            "answerKey": KEYS[i % 4],
        }
        for i in range(size)
    ]


def blanks(first, last):
    return [
        {"sentence": f"Ada met Mina in room {i} and _ sat.", "option1": "Ada", "option2": "Mina", "answer": "12"[i % 2]}
        for i in range(first, last)
    ]


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return write(
        tmp_path / "obqa", train=science("train", 100), validation=science("validation", 20), test=science("test", 30)
    )


@pytest.fixture
def nested(tmp_path):
    """Winogrande's configurations: nested training sets, one validation split, and hidden answers of the test split."""
    hidden = [{**row, "answer": ""} for row in blanks(900, 910)]
    for config, size in (("winogrande_s", 20), ("winogrande_l", 40), ("winogrande_xl", 60)):
        folder = tmp_path / "winogrande" / config
        write(folder, train=blanks(0, size), validation=blanks(800, 812), test=hidden)
    return str(tmp_path / "winogrande")


def ids(questions):
    return {question.id for question in questions}


def test_the_paper_s_reports_validation_and_calibrates_on_a_fifth_of_train(data, caplog):
    with caplog.at_level(logging.INFO, "bmoe_lightning.data.splits"):
        splits = load_splits(data, "paper")
    assert [q.id for q in splits.test] == [f"validation-{i}" for i in range(20)]
    assert (len(splits.train), len(splits.calibration)) == (80, 20)
    assert ids(splits.train) | ids(splits.calibration) == {f"train-{i}" for i in range(100)}
    assert caplog.messages == [
        "protocol paper: 80 questions of train to train on, 20 to calibrate (20 % of train), 20 of validation to report"
    ]
    assert load_splits(data, Paper(seed=1)).calibration != splits.calibration
    assert len(load_splits(data, Paper(fraction=0.5)).calibration) == 50


def test_blob_s_trains_on_all_of_train_and_on_its_anchors(data):
    with pytest.warns(UserWarning, match="the protocol blob trains on the 30 calibration questions too: the model is"):
        splits = load_splits(data, BLoB(anchors=30))
    assert [q.id for q in splits.train] == [f"train-{i}" for i in range(100)]
    assert ids(splits.calibration) < ids(splits.train)
    assert len(splits.calibration) == 30
    assert splits.calibration_in_train
    assert {q.id.split("-")[0] for q in splits.test} == {"validation"}
    with pytest.warns(UserWarning, match="on the 100 calibration questions"):
        assert len(load_splits(data, "blob").calibration) == 100  # fewer than 500


def test_bayesadapt_s_reports_test_and_calibrates_on_validation(data):
    splits = load_splits(data, "bayesadapt")
    assert [{q.id.split("-")[0] for q in part} for part in (splits.train, splits.calibration, splits.test)] == [
        {"train"},
        {"validation"},
        {"test"},
    ]


def test_the_default_is_holdout(data, tmp_path):
    splits = load_splits(data)
    assert splits == load_splits(data, "holdout") == load_splits(data, "bayesadapt")
    (tmp_path / "obqa" / "validation.jsonl").unlink()
    fit, calibration = split_train((*splits.train,), 0.2, seed=0)
    found = load_splits(data)
    assert (found.train, found.calibration, found.test) == (fit, calibration, splits.test)


@pytest.mark.parametrize("protocol", ["paper", "blob", "bayesadapt"])
def test_a_split_of_the_protocol_that_is_missing_is_named(data, tmp_path, protocol):
    (tmp_path / "obqa" / "validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=f"the protocol {protocol} uses the validation split of .*has none"):
        load_splits(data, protocol)


@pytest.mark.parametrize("protocol", ["holdout", "paper"])
def test_winogrande_reports_validation_and_never_reads_the_hidden_answers(nested, protocol, caplog):
    with caplog.at_level(logging.INFO, "bmoe_lightning.data.splits"):
        splits = load_splits(f"{nested}:winogrande_s", protocol)
    assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == [16, 4, 12]
    assert caplog.messages[0].endswith("12 of validation to report")


@pytest.mark.parametrize("named", ["{}:winogrande_s", "{}/winogrande_s"])
def test_bayesadapt_s_calibrates_winogrande_on_what_xl_adds_to_l(nested, named):
    splits = load_splits(named.format(nested), "bayesadapt")
    assert [q.question for q in splits.calibration] == [row["sentence"] for row in blanks(40, 60)]
    assert [q.question for q in splits.train] == [row["sentence"] for row in blanks(0, 20)]
    assert len(splits.test) == 12


def test_bayesadapt_s_cannot_train_on_what_it_calibrates_on(nested, tmp_path):
    with pytest.raises(ValueError, match=r"calibrates on train of winogrande_xl .*winogrande_xl is trained on; choose"):
        load_splits(f"{nested}:winogrande_xl", "bayesadapt")
    alone = write(tmp_path / "alone" / "winogrande_s", train=blanks(0, 9), validation=blanks(9, 12))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*alone/winogrande_xl; download"):
        load_splits(alone, "bayesadapt")


@pytest.mark.filterwarnings("ignore:the protocol blob trains on:UserWarning")
def test_duplicates_leave_train_and_calibration_under_every_protocol(tmp_path):
    again = [{**row, "id": f"again-{row['id']}"} for row in (*science("test", 3), *science("validation", 4))]
    data = write(
        tmp_path / "leaky",
        train=science("train", 60) + again,
        validation=science("validation", 20) + again[:3],
        test=science("test", 30),
    )
    for protocol in ("holdout", "paper", "blob", "bayesadapt"):
        with pytest.warns(
            UserWarning, match="train questions are also asked in the .* same choices.*were left out"
        ) as caught:
            splits = load_splits(data, protocol)
        reported = "validation" if protocol in ("paper", "blob") else "test"
        assert f"{reported} split" in str(caught[0].message)
        later = {q.question for q in splits.test}
        assert len(splits.test) == (23 if protocol in ("paper", "blob") else 30)
        assert not later & {q.question for q in (*splits.train, *splits.calibration)}
        if not splits.calibration_in_train:
            assert not {q.question for q in splits.calibration} & {q.question for q in splits.train}


def test_the_data_module_takes_a_protocol_by_name_or_instance(data):
    tokenizer = train_word_tokenizer(render(load_splits(data).train), max_vocab=500)
    by_name = MultipleChoiceDataModule(data, tokenizer, protocol="paper", seed=7)
    instance = MultipleChoiceDataModule(data, tokenizer, protocol=Paper())
    for made in (by_name, instance):
        made.setup()
        splits = load_splits(data, "paper")
        assert made.questions("train") == splits.train
        assert made.questions("calibration") == splits.calibration
        assert made.questions("test") == splits.test
    anchored = MultipleChoiceDataModule(data, tokenizer, protocol=BLoB(anchors=10))
    with pytest.warns(UserWarning, match="on the 10 calibration questions"):
        anchored.setup()
    assert len(anchored.questions("train")) == 100
    assert set(anchored.questions("calibration")) <= set(anchored.questions("train"))
    with pytest.raises(ValueError, match="calibration_fraction applies without a protocol only"):
        MultipleChoiceDataModule(data, tokenizer, protocol="paper", calibration_fraction=0.3)
    with pytest.raises(ValueError, match="unknown protocol 'blub'"):
        MultipleChoiceDataModule(data, tokenizer, protocol="blub")


def test_configurations_of_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, **_):
        calls.append((name, config))
        size = {"winogrande_s": 20, "winogrande_l": 40, "winogrande_xl": 60}[config]
        parts = {"train": blanks(0, size), "validation": blanks(800, 812)}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    download_splits("allenai/winogrande:winogrande_s", "bayesadapt")
    assert set(calls) == {("allenai/winogrande", f"winogrande_{size}") for size in ("s", "l", "xl")}
    splits = load_splits("allenai/winogrande:winogrande_s", "bayesadapt")
    assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == [20, 20, 12]
    calls.clear()
    download_splits("allenai/winogrande:winogrande_s", "paper")
    assert set(calls) == {("allenai/winogrande", "winogrande_s")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openbookqa", "23 of 4957 train questions are also asked in the test split (14 with the same choices)"),
        ("arc_easy", "8 of 2251 train questions are also asked in the test split (3 with the same choices)"),
    ],
)
def test_duplicates_of_the_public_files(name, expected):
    """The numbers of docs/tasks.md."""
    if not (TEST_DATA / name).is_dir():
        pytest.skip(f"no {name} at hand; set BMOE_TEST_DATA to a folder that has it")
    with pytest.warns(UserWarning, match=re.escape(expected)):
        load_splits(TEST_DATA / name)
    page = " ".join((Path(__file__).parents[2] / "docs" / "tasks.md").read_text().split())
    again, total, same = re.findall(r"\d+", expected)
    assert re.search(rf"{again} of {total}\b[^.]*\b{same} (of them )?with the same choices", page)


@dataclass(frozen=True)
class Turned(Protocol):
    """Trains on validation, as a test of what a protocol of somebody else's may say."""

    name: str = "turned"
    label: str = "Turned"

    def parts(self, task):
        return Parts(HeldOutShare(0.5), "test", train="validation")


def test_a_protocol_of_one_s_own(data):
    splits = load_splits(data, Turned())
    assert ids(splits.train) | ids(splits.calibration) == {f"validation-{i}" for i in range(20)}
    assert get_protocol(Turned()) == Turned()


def test_data_without_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no questions; its files are empty"):
        load_splits(write(tmp_path / "empty", train=[], test=[]))
    with pytest.raises(FileNotFoundError, match="has no train split"):
        load_splits(write(tmp_path / "nothing"))
