"""Choices that are scored by their text, from the DataModule through training and all methods to serving."""

from __future__ import annotations

import json
import logging
from functools import wraps

import pytest
import torch
from finetuner_cases import CALIBRATION, TEST, TRAIN, finetuner, qwen, trainer

from bmoe_lightning import BayesianMoECallback, LaplacePosterior, LoRAFinetuner
from bmoe_lightning.data import MultipleChoiceDataModule, Question, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.methods import get_method, method_names
from bmoe_lightning.methods.mean_field_router import MeanFieldRouter
from bmoe_lightning.models.choice_logits import choice_logits

WORDS = ("red wax", "honey", "a long thread of silk", "bread and butter")
NEEDS = {name: get_method(name).needs for name in method_names()}
# The others need several trainings, and the training of other weights.
METHODS = [name for name, needs in NEEDS.items() if not (needs.runs or needs.lora or needs.router_training)]
TRAINED = MeanFieldRouter(epochs=1, num_samples=2)


def worded(question):
    return Question(question.id, question.question, WORDS[: len(question.choices)], question.answer)


SPLITS = Splits(*(tuple(map(worded, part)) for part in (TRAIN, CALIBRATION, TEST)))


@pytest.fixture(scope="module")
def tokenizer():
    form = get_prompt_format("cloze")
    every = (*SPLITS.train, *SPLITS.calibration, *SPLITS.test)
    return train_word_tokenizer([" ".join([form.render(q), *form.answers(q)]) for q in every], max_vocab=100)


def data_of(tokenizer, splits=SPLITS, **options):
    return MultipleChoiceDataModule(splits, tokenizer, **{"prompt": "cloze", "batch_size": 4, **options})


def loss_of(tokenizer, folder, **options):
    module = finetuner(expert_dropout=0.0)
    run = trainer(folder, max_epochs=2)
    run.fit(module, datamodule=data_of(tokenizer, **options))
    return run.callback_metrics["train/loss"], module


def test_training_is_the_same_with_one_row_and_with_a_row_for_each_choice(tokenizer, tmp_path):
    together, one = loss_of(tokenizer, tmp_path, shared_prompts=True)
    apart, other = loss_of(tokenizer, tmp_path, shared_prompts=False)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    for name, parameter in one.trained_parameters().items():
        torch.testing.assert_close(parameter, other.trained_parameters()[name], rtol=1e-3, atol=1e-4)


def test_training_lowers_the_cross_entropy_over_the_choices(tokenizer, tmp_path):
    data = data_of(tokenizer)
    module = finetuner(expert_dropout=0.0, learning_rate=0.03)
    data.setup()
    batch = data._ready().collate([data._ready().encoded["train"][i] for i in range(12)])
    with torch.no_grad():
        logits = choice_logits(module.model, batch)
        before = torch.nn.functional.cross_entropy(logits, batch["label"])
        alone = -logits.log_softmax(-1)[torch.arange(12), batch["label"]].mean()
    torch.testing.assert_close(before, alone)
    trainer(tmp_path, max_epochs=8).fit(module, datamodule=data)
    with torch.no_grad():
        after = torch.nn.functional.cross_entropy(choice_logits(module.model.eval(), batch), batch["label"])
    assert after < 0.5 * before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_row_is_used_where_it_leaves_the_logits_as_they_are(tokenizer, tmp_path, attention, caplog):
    model = qwen()
    model.set_attn_implementation(attention)
    data = data_of(tokenizer)
    with caplog.at_level(logging.INFO, logger="bmoe_lightning.data"):
        trainer(tmp_path).fit(finetuner(model), datamodule=data)
    assert data.measured_shared_prompts is True
    assert data.measured_padding_side == "left"
    assert "the choices of a question have one row" in caplog.text


def refuses_pairs(mask):
    raise NotImplementedError("no mask of pairs is known")


@pytest.mark.parametrize(
    ("change", "said"), [(refuses_pairs, "no mask of pairs is known"), (lambda mask: mask.any(2)[:, 0].long(), "")]
)
def test_each_choice_has_a_row_where_the_model_takes_no_mask_of_pairs(tokenizer, tmp_path, change, said, caplog):
    """Or takes it for another one."""
    model, plain = qwen(), qwen()

    @wraps(plain.forward)
    def forward(*args, attention_mask, **kwargs):
        mask = change(attention_mask) if attention_mask.dim() == 4 else attention_mask
        return type(model).forward(model, *args, attention_mask=mask, **kwargs)

    model.forward = forward
    data = data_of(tokenizer)
    with caplog.at_level(logging.INFO, logger="bmoe_lightning.data"):
        trainer(tmp_path).fit(finetuner(model), datamodule=data)
    assert data.measured_shared_prompts is False
    assert said in caplog.text
    assert "the choices of a question have a row each" in caplog.text


def test_letters_are_unknown_to_a_module_without_a_datamodule_of_choices(tokenizer):
    module = finetuner()
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(RuntimeError, match="answer tokens are not known yet"):
        module.class_logits(batch)


@pytest.fixture(scope="module", params=[True, False], ids=["one row", "a row a choice"])
def fitted(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cloze")
    calibration = tuple(
        Question(f"c{i}", f"is held number{i} or {i % 7} ?", WORDS[: 3 + i % 2], i % 3) for i in range(100)
    )
    splits = Splits(SPLITS.train, calibration, SPLITS.test)
    form = get_prompt_format("cloze")
    every = (*splits.train, *splits.calibration, *splits.test)
    words = train_word_tokenizer([" ".join([form.render(q), *form.answers(q)]) for q in every], max_vocab=300)
    data = data_of(words, splits, shared_prompts=request.param, eval_batch_size=16, normalise="characters")
    callback = BayesianMoECallback(methods=(*METHODS, TRAINED), dirpath=str(folder / "fit"))
    module = finetuner(qwen(vocab_size=len(words)))
    run = trainer(folder, callback, max_epochs=2)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    return run, callback, module, data, folder / "fit"


def test_every_method_predicts(fitted):
    _, callback, _, _, _ = fitted
    found = callback.predictions["test"]
    assert set(found) == {*METHODS, TRAINED.name}
    for name, predictions in found.items():
        log_probs = predictions.log_probs
        assert log_probs.shape == (7, 4), name
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(7, dtype=log_probs.dtype), msg=name)
        assert (log_probs[1::2, 3] == -torch.inf).all(), name
        assert log_probs[:, :3].isfinite().all(), name


def test_map_is_the_softmax_of_the_scores(fitted):
    run, callback, module, data, _ = fitted
    with torch.no_grad():
        expected = torch.cat([module.class_logits(b)[0].log_softmax(-1) for b in data.test_dataloader()])
    torch.testing.assert_close(callback.predictions["test"]["map"].log_probs.float(), expected, rtol=1e-4, atol=1e-5)
    predicted = torch.cat([batch["log_probs"] for batch in run.predict(module, datamodule=data)])
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


def test_the_stored_posterior_serves_the_same_predictions(fitted):
    _, _, module, data, folder = fitted
    posterior = LaplacePosterior.load(folder / "posterior.safetensors")
    (batch,) = data.test_dataloader()
    found = posterior.predict(module.model, lambda model, batch: (choice_logits(model, batch), None), batch, seed=0)
    one_by_one = torch.cat(
        [
            posterior.predict(
                module.model,
                lambda model, batch: (choice_logits(model, batch), None),
                {name: value[[row]] for name, value in batch.items()},
                seed=0,
            )
            for row in range(7)
        ]
    )
    torch.testing.assert_close(found, one_by_one, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "index.json").read_text())


def test_early_checks_compare_examples_of_several_rows(tokenizer, tmp_path):
    """Logits that depend on the other questions of a batch are refused before the first step."""

    class Mixing(type(finetuner())):
        def class_logits(self, batch):
            logits, labels = super().class_logits(batch)
            mean = torch.where(logits.isfinite(), logits, 0).mean(0).detach()
            return logits - 2 * mean * torch.arange(1, 5), labels

    module = Mixing(qwen(), learning_rate=0.01)
    callback = BayesianMoECallback(methods=("laplace_evidence",), dirpath=str(tmp_path / "fit"))
    with pytest.raises(ValueError, match="other logits for the same example in a smaller batch"):
        trainer(tmp_path, callback).fit(
            module, datamodule=data_of(tokenizer, shared_prompts=False, padding_side="left")
        )


def test_low_rank_updates_are_trained_and_predicted_with_them_too(tokenizer, tmp_path):
    pytest.importorskip("peft")
    data = data_of(tokenizer)
    callback = BayesianMoECallback(methods=("map", "bayesian_lora"), dirpath=str(tmp_path / "fit"))
    module, run = LoRAFinetuner(qwen(), learning_rate=0.01), trainer(tmp_path, callback)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    plain, averaged = (callback.predictions["test"][name].log_probs for name in ("map", "bayesian_lora"))
    torch.testing.assert_close(averaged.exp().sum(1), torch.ones(7, dtype=averaged.dtype))
    assert not torch.allclose(averaged.exp(), plain.exp(), atol=1e-4)
