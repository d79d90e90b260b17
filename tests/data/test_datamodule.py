import warnings

import lightning
import pytest
import torch
from datamodule_cases import CALIBRATION, TEST, TRAIN, make, module, render, write
from tokenizers import processors

from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.questions import Splits
from bmoe_lightning.data.tasks.arc import ARC
from bmoe_lightning.data.tokenizer import train_word_tokenizer

LOADERS = ["train", "val", "test", "predict", "calibration", "curvature"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer(render((*TRAIN, *CALIBRATION, *TEST)), max_vocab=500)


def loader(data, name):
    return getattr(data, f"{name}_dataloader")()


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"eval_batch_size": 0}, ValueError, "eval_batch_size is 0"),
        ({"max_length": 0}, ValueError, "max_length is 0"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"num_workers": -1}, ValueError, "num_workers is -1"),
        ({"calibration_fraction": 1.0}, ValueError, "calibration_fraction is 1.0"),
        ({"prompt": "mmlu"}, ValueError, "unknown prompt 'mmlu'; choose from letters, instruction, true_false"),
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
