import json
import os
import warnings
from pathlib import Path

import datasets
import lightning
import pytest
import torch
from tokenizers import processors

from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.files import DataUnavailableError
from bmoe_lightning.data.prompts import get_prompt_format
from bmoe_lightning.data.questions import Question, Splits, question_key
from bmoe_lightning.data.tasks.arc import ARC
from bmoe_lightning.data.tokenizer import train_word_tokenizer

TEST_DATA = Path(os.environ.get("BMOE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
LOADERS = ["train", "val", "test", "predict", "calibration", "curvature"]


def make(number: int, part: str = "train", choices: int = 4, words: int = 1) -> Question:
    text = " ".join(["really"] * (words - 1) + [f"number{number}", "of", part, "?"])
    return Question(f"{part}-{number}", text, tuple(f"c{i}" for i in range(choices)), number % choices)


TRAIN = tuple(make(i, words=1 + i % 5) for i in range(23))
CALIBRATION = tuple(make(i, "calibration") for i in range(7))
TEST = tuple(make(i, "test", choices=3 if i % 2 else 4) for i in range(11))


def render(questions, prompt="instruction"):
    return [get_prompt_format(prompt).render(question) for question in questions]


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer(render((*TRAIN, *CALIBRATION, *TEST)), max_vocab=500)


def module(tokenizer, train=TRAIN, calibration=CALIBRATION, test=TEST, **options):
    data = MultipleChoiceDataModule(Splits(tuple(train), tuple(calibration), tuple(test)), tokenizer, **options)
    data.setup()
    return data


def loader(data, name):
    return getattr(data, f"{name}_dataloader")()


def write(folder: Path, **splits) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in splits.items():
        rows = [
            {
                "id": q.id,
                "question": q.question,
                "choices": {"text": list(q.choices), "label": list("ABCDE")[: len(q.choices)]},
                "answerKey": "ABCDE"[q.answer],
            }
            for q in questions
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(folder)


def test_batch_layout(tokenizer):
    data = module(tokenizer, eval_batch_size=4)
    batch = next(iter(data.test_dataloader()))
    assert type(batch) is dict
    assert set(batch) == {"input_ids", "attention_mask", "choice_mask", "label", "index"}
    B, T = batch["input_ids"].shape
    assert B == 4
    assert batch["attention_mask"].shape == (B, T)
    assert batch["choice_mask"].shape == (B, 4)
    assert batch["choice_mask"].dtype == torch.bool
    for name in ("input_ids", "attention_mask", "label", "index"):
        assert batch[name].dtype == torch.int64
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["label"].tolist() == [q.answer for q in TEST[:4]]


@pytest.mark.parametrize("name", LOADERS)
def test_batches_say_what_their_questions_say(tokenizer, name):
    data = module(tokenizer)
    part = {"train": "train", "curvature": "train", "val": "calibration", "calibration": "calibration"}.get(
        name, "test"
    )
    for batch in loader(data, name):
        for row, index in enumerate(batch["index"].tolist()):
            question = data.questions(part)[index]
            kept = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            assert kept.tolist() == tokenizer(render([question])[0])["input_ids"]
            assert batch["label"][row] == question.answer
            assert batch["choice_mask"][row].sum() == len(question.choices)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_left_whatever_the_tokenizer_says_and_its_setting_stays(tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    data = module(tokenizer, batch_size=23)
    batch = next(iter(data.train_dataloader()))
    mask = batch["attention_mask"]
    assert bool((mask == 0).any())
    assert bool((mask.diff(dim=1) >= 0).all())
    assert set(batch["input_ids"][:, -1].tolist()) == set(tokenizer("Answer:")["input_ids"])
    assert set(batch["input_ids"][mask == 0].tolist()) == {tokenizer.pad_token_id}
    assert tokenizer.padding_side == side


def test_a_tokenizer_without_padding_token_is_left_without(tokenizer):
    bare = train_word_tokenizer(render(TRAIN), max_vocab=500)
    bare.pad_token = None
    data = module(bare)
    assert next(iter(data.train_dataloader()))["input_ids"].min() >= 0
    assert bare.pad_token is None


def test_an_end_of_sequence_token_never_stands_last():
    tokenizer = train_word_tokenizer([*render((*TRAIN, *TEST)), "end"], max_vocab=500)
    end = tokenizer("end")["input_ids"][0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A end", special_tokens=[("end", end)]
    )
    assert tokenizer("Answer:")["input_ids"][-1] == end
    batch = next(iter(module(tokenizer).test_dataloader()))
    assert end not in batch["input_ids"]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("size", [4, 10])
def test_every_question_comes_once_also_in_a_last_small_batch(tokenizer, name, size):
    data = module(tokenizer, batch_size=size, eval_batch_size=size)
    indices = torch.cat([batch["index"] for batch in loader(data, name)]).tolist()
    count = {"train": 23, "curvature": 23, "val": 7, "calibration": 7}.get(name, 11)
    assert count % size
    assert sorted(indices) == list(range(count))
    assert loader(data, name).drop_last is False
    if name != "train":
        assert indices == list(range(count))


def test_batch_sizes(tokenizer):
    data = module(tokenizer, batch_size=5, eval_batch_size=3)
    assert {name: loader(data, name).batch_size for name in LOADERS} == dict.fromkeys(LOADERS, 3) | {"train": 5}
    assert loader(module(tokenizer, batch_size=5), "test").batch_size == 5


def test_training_order_follows_the_seed(tokenizer):
    def order(seed):
        return [i for batch in module(tokenizer, seed=seed).train_dataloader() for i in batch["index"].tolist()]

    assert order(1) == order(1) != order(2)
    assert order(1) != sorted(order(1))


def test_the_order_of_an_epoch_depends_on_its_number_alone(tokenizer):
    data = module(tokenizer, batch_size=23)

    def order(train):
        return next(iter(train))["index"].tolist()

    whole = data.train_dataloader()
    orders = [order(whole) for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.sampler.set_epoch(2)
    assert order(resumed) == orders[2] != orders[1]


def test_a_second_pass_has_another_order(tokenizer):
    train = module(tokenizer, batch_size=23).train_dataloader()
    first, second = (next(iter(train))["index"].tolist() for _ in range(2))
    assert first != second


@pytest.mark.parametrize("name", LOADERS)
def test_the_global_random_state_is_left_alone(tokenizer, name):
    before = torch.get_rng_state()
    list(loader(module(tokenizer), name))
    assert torch.equal(torch.get_rng_state(), before)


def test_absent_choices_are_masked_by_the_widest_question_of_any_part(tokenizer):
    data = module(tokenizer, calibration=(make(0, "calibration", choices=5),))
    assert data.num_choices == 5
    assert data.answer_token_ids.shape == (5,)
    batch = next(iter(data.test_dataloader()))
    for row, question in enumerate(TEST[:8]):
        assert batch["choice_mask"][row].tolist() == [i < len(question.choices) for i in range(5)]
    # A softmax over five letters would give the fifth some of the probability of a four-choice question.
    logits = torch.zeros(8, 5).masked_fill(~batch["choice_mask"], -torch.inf)
    torch.testing.assert_close(logits.softmax(-1)[0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))
    present = batch["choice_mask"].gather(1, batch["label"][:, None])
    assert bool(present.all())


def test_answer_tokens_are_the_letters(tokenizer):
    data = module(tokenizer)
    assert data.num_choices == 4
    assert tokenizer.convert_ids_to_tokens(data.answer_token_ids.tolist()) == ["A", "B", "C", "D"]


def test_encoding_happens_once(tokenizer, monkeypatch):
    data = module(tokenizer)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("encoded again"))
    data.setup("fit")
    data.setup("test")
    for name in LOADERS:
        list(loader(data, name))


def test_truncation_keeps_choices_and_the_end_and_says_how_often(tokenizer):
    long = make(1, "test", words=80)
    with pytest.warns(UserWarning, match="1 of 2 test prompts were longer than max_length=50"):
        data = module(tokenizer, test=(make(0, "test"), long), max_length=50)
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape[1] == 50
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][1].tolist())
    assert " ".join(words).endswith("of test ? Choices : A . c0 B . c1 C . c2 D . c3 Answer:")


def test_choices_too_long_for_max_length_are_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match=r"question 'train-0': .* tokens, and max_length is 12"):
        module(tokenizer, max_length=12)


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
    with pytest.warns(UserWarning, match="were dropped from") as caught:
        data.setup()
    messages = [str(warning.message) for warning in caught]
    if validation:
        assert any("1 of 8 calibration questions are also asked in the test split" in m for m in messages)
        assert any("3 of 26 train questions are also asked in the calibration or test split" in m for m in messages)
    else:
        assert any("2 of 25 train questions are also asked in the test split" in m for m in messages)
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"eval_batch_size": 0}, ValueError, "eval_batch_size is 0"),
        ({"max_length": 0}, ValueError, "max_length is 0"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"num_workers": -1}, ValueError, "num_workers is -1"),
        ({"calibration_fraction": 1.0}, ValueError, "calibration_fraction is 1.0"),
        ({"prompt": "mmlu"}, ValueError, "unknown prompt 'mmlu'; choose from letters, instruction"),
        ({"data": "folder", "task": "ark"}, ValueError, "unknown task 'ark', did you mean 'arc'"),
        ({"data": "folder", "task": 3}, TypeError, "a task is a name or an instance"),
        ({"tokenizer": 3}, TypeError, "tokenizer is a int"),
        ({"data": list(TRAIN)}, TypeError, "data is a list"),
    ],
)
def test_arguments_are_checked_at_construction(tokenizer, options, error, message):
    arguments = {"data": Splits(TRAIN, CALIBRATION, TEST), "tokenizer": tokenizer} | options
    with pytest.raises(error, match=message):
        MultipleChoiceDataModule(**arguments)


def test_use_before_setup_and_unknown_parts_are_refused(tokenizer):
    data = MultipleChoiceDataModule(Splits(TRAIN, CALIBRATION, TEST), tokenizer)
    for use in (
        data.train_dataloader,
        data.curvature_dataloader,
        lambda: data.num_choices,
        lambda: data.questions("test"),
    ):
        with pytest.raises(RuntimeError, match="call setup"):
            use()
    data.setup()
    with pytest.raises(ValueError, match="unknown split 'validation'; choose from train, calibration, test"):
        data.questions("validation")


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


class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "validation": [], "test": [], "predict": []}

    def training_step(self, batch):
        self.seen["train"].append(batch["index"].tolist())
        return self.weight * batch["label"].float().mean()

    def validation_step(self, batch):
        self.seen["validation"] += batch["index"].tolist()

    def test_step(self, batch):
        self.seen["test"] += batch["index"].tolist()

    def predict_step(self, batch):
        self.seen["predict"] += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("reload", [0, 1])
def test_under_a_trainer(tokenizer, tmp_path, reload):
    data = MultipleChoiceDataModule(Splits(TRAIN, CALIBRATION, TEST), tokenizer, batch_size=23)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=reload,
        default_root_dir=tmp_path,
    )
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(recorder, datamodule=data)
        trainer.test(recorder, datamodule=data, verbose=False)
        trainer.predict(recorder, datamodule=data)
    first, second = recorder.seen["train"]
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    assert recorder.seen["validation"] == list(range(7)) * 2
    assert recorder.seen["test"] == recorder.seen["predict"] == list(range(11))


def test_workers_read_the_same_batches(tokenizer):
    plain, workers = module(tokenizer), module(tokenizer, num_workers=1)
    for name in ("train", "test"):
        for a, b in zip(loader(plain, name), loader(workers, name), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_task_and_revision_reach_the_hub(tokenizer, monkeypatch):
    calls = []

    def load(source, split, **options):
        calls.append((source, split, options))
        return {"train": TRAIN, "validation": CALIBRATION, "test": TEST}[split]

    monkeypatch.setattr("bmoe_lightning.data.datamodule.load_questions", load)
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


@pytest.mark.parametrize("options", [{"task": "arc"}, {"revision": "main"}])
def test_splits_need_no_task(tokenizer, options):
    with pytest.raises(ValueError, match="task and revision apply to a folder or hub id, but data are Splits"):
        module(tokenizer, **options)


def test_the_constructor_can_be_driven_from_a_command_line(tokenizer, tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    tokenizer.save_pretrained(tmp_path / "words")
    folder = write(tmp_path / "data", train=TRAIN, test=TEST)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultipleChoiceDataModule, "data")
    arguments = [f"--data.data={folder}", f"--data.tokenizer={tmp_path / 'words'}", "--data.limit=5"]
    arguments.append("--data.task=arc")
    # Named instantiate_classes before 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    data = instantiate(parser.parse_args(arguments)).data
    data.setup()
    assert len(data.questions("train")) == 5
    assert data.task == ARC()


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
