"""The logits of the fine-tuner: answer tokens at the last real position, whatever the padding and the choices."""

import pytest
import torch
from finetuner_cases import CALIBRATION, TEST, TRAIN, finetuner, prepare, qwen, trainer
from published import write_published_folder

from bmoe_lightning.data import MultipleChoiceDataModule, Splits, get_prompt_format, train_word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [get_prompt_format("letters").render(question) for question in (*TRAIN, *CALIBRATION, *TEST)]
    return train_word_tokenizer(prompts, max_vocab=100)


@pytest.fixture
def data(tokenizer):
    return MultipleChoiceDataModule(
        Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt="letters", batch_size=4, eval_batch_size=3
    )


def test_class_logits_are_the_answer_tokens_at_the_last_real_position(data):
    module = finetuner()
    prepare(module, data)
    for batch in data.test_dataloader():
        logits, labels = module.class_logits(batch)
        assert logits.dtype == torch.float32
        assert torch.equal(labels, batch["label"])
        assert torch.equal(logits == -torch.inf, ~batch["choice_mask"])
        for row in range(len(labels)):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            alone = module.model(input_ids=ids[None]).logits[0, -1, data.answer_token_ids]
            present = batch["choice_mask"][row]
            torch.testing.assert_close(logits[row][present], alone[present], rtol=1e-4, atol=1e-5)


def test_right_padding_gives_the_same_logits(data):
    module = finetuner()
    prepare(module, data)
    batch = next(iter(data.train_dataloader()))
    batch["input_ids"][0, :2], batch["attention_mask"][0, :2] = 0, 0
    lengths = batch["attention_mask"].sum(1)
    right = dict(batch)
    for name in ("input_ids", "attention_mask"):
        rows = [row.roll(int(n) - len(row)) for row, n in zip(batch[name], lengths, strict=True)]
        right[name] = torch.stack(rows)
    assert lengths.min() < lengths.max()
    assert not right["attention_mask"][:, -1].all()
    torch.testing.assert_close(module.class_logits(right)[0], module.class_logits(batch)[0], rtol=1e-4, atol=1e-5)


def test_left_padding_asks_the_model_for_one_position_only(data):
    module = finetuner(qwen(output_router_logits=True))
    prepare(module, data)
    widths, seen = [], []
    module.model.lm_head.register_forward_hook(lambda m, inputs, output: widths.append(output.shape[1]))
    module.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    module.class_logits(next(iter(data.test_dataloader())))
    assert widths == [1]
    assert (seen[0]["use_cache"], seen[0]["output_router_logits"]) == (False, False)


def test_a_batch_needs_no_labels_choices_or_index(data):
    module = finetuner()
    prepare(module, data)
    batch = next(iter(data.test_dataloader()))
    bare = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, labels = module.class_logits(bare)
    assert labels is None
    assert bool(logits.isfinite().all())
    with pytest.raises(ValueError, match="no 'label'"):
        module.training_step(bare, 0)


def test_refuses_another_number_of_choices(data):
    module = finetuner(answer_token_ids=[2, 3, 4])
    data.setup()
    with pytest.raises(ValueError, match="3 answer tokens"):
        module.class_logits(next(iter(data.test_dataloader())))


def test_says_what_it_lacks():
    with pytest.raises(RuntimeError, match="answer tokens are not known"):
        finetuner().class_logits({})
    with pytest.raises(RuntimeError, match="not loaded yet"):
        finetuner("some/model").trained_parameters()


def test_test_and_predict_agree_with_class_logits(data, tmp_path):
    module = finetuner()
    run = trainer(tmp_path)
    logged = run.test(module, datamodule=data, verbose=False)[0]
    parts = run.predict(module, datamodule=data)
    assert set(parts[0]) == {"log_probs", "index"}
    log_probs = torch.cat([part["log_probs"] for part in parts])
    assert torch.cat([part["index"] for part in parts]).tolist() == list(range(len(TEST)))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(TEST)))
    labels = torch.tensor([question.answer for question in TEST])
    assert logged["test/loss"] == pytest.approx(float(torch.nn.functional.nll_loss(log_probs, labels)), rel=1e-5)
    assert logged["test/acc"] == pytest.approx(float((log_probs.argmax(-1) == labels).float().mean()))


def test_answer_tokens_come_from_the_datamodule_or_the_argument(data, tmp_path):
    module = finetuner()
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert torch.equal(module._answer_ids, data.answer_token_ids)
    given = finetuner(answer_token_ids=(9, 8, 7, 6))
    trainer(tmp_path).test(given, datamodule=data, verbose=False)
    assert given._answer_ids.tolist() == [9, 8, 7, 6]
    with pytest.raises(ValueError, match="answer tokens are unknown"):
        trainer(tmp_path).test(finetuner(), dataloaders=data.test_dataloader(), verbose=False)


@pytest.fixture
def folder(tmp_path):
    """A model folder in the published layout."""
    return write_published_folder(tmp_path / "published", qwen(seed=2))
