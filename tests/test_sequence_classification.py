"""A sequence classifier of transformers against the plain computation, and with the code of docs/integrations.md."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from oracles.dense import dense_logit_covariance, low_rank_blocks, observe, weight_jacobians
from oracles.factors import assert_dense, assert_same, dense_of
from page_cases import METHODS, block
from torch.utils.data import DataLoader
from toy import trainer
from transformers import AutoModelForSequenceClassification, MixtralConfig, Qwen2MoeConfig

from bmoe_lightning import BayesianMoECallback, PredictionWriter
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.data.files import file_rows
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_labels": 3,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def classifier(family, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(CONFIGS[family]()).to(dtype).eval()
    model.set_experts_implementation("eager")
    return model


def padded(side="right", rows=6, seed=1):
    """Rows of different lengths with padding, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 24, (rows, 7), generator=generator)
    lengths = torch.randint(2, 8, (rows, 1), generator=generator)
    place = torch.arange(7)
    mask = (place < lengths if side == "right" else place >= 7 - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "label": torch.arange(rows) % 3}


def class_logits(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits, batch["label"]


def plain_rows(batch):
    """Each row by itself, without its padding."""
    for row in range(len(batch["label"])):
        kept = batch["attention_mask"][row].bool()
        yield {name: value[row : row + 1, ...][..., kept] if value.dim() > 1 else value[row : row + 1]
               for name, value in batch.items()}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
class TestSequenceClassification:
    def test_factors_are_those_of_the_definition(self, family):
        model, batch = classifier(family), padded()
        layers = find_expert_layers(model)
        assert [layer.num_experts for layer in layers] == [4, 4]
        factors = collect_factors(model, class_logits, [batch], rank=100, sketch="exact")
        assert_dense(factors, dense_of(model, class_logits, batch, "expand"), 1e-6)  # RMSNorm in float32
        # Neither padding nor what follows the pooled token counts.
        alone = collect_factors(model, class_logits, list(plain_rows(batch)), rank=100, sketch="exact")
        assert_same(factors, alone, 1e-9)

    def test_predictions_are_those_of_dense_matrices(self, family):
        model, batch = classifier(family), padded()
        posterior = LaplacePosterior(collect_factors(model, class_logits, [padded(seed=2)], rank=100, sketch="exact"))
        posterior = posterior.with_prior_precision(2.0)
        logits, found = posterior.logit_covariance(model, class_logits, batch)
        expected_logits, _ = observe(model, class_logits, batch)
        torch.testing.assert_close(logits, expected_logits.detach())
        weights = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
        jacobians = weight_jacobians(class_logits(model, batch)[0], weights)
        blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
        torch.testing.assert_close(found, dense_logit_covariance(jacobians, blocks, [2.0, 2.0]), rtol=1e-6, atol=1e-9)
        log_probs = posterior.predict(model, class_logits, batch, link="mc", num_samples=100)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(6, dtype=torch.float64))

    def test_without_variance_they_are_the_model_s(self, family):
        model, batch = classifier(family), padded()
        posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=4), prior_precision=1e20)
        with torch.no_grad():
            expected = class_logits(model, batch)[0].log_softmax(-1)
        for link in ("mc", "probit"):
            found = posterior.predict(model, class_logits, batch, link=link)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, family, side):
        model, batch = classifier(family), padded(side)
        posterior = LaplacePosterior(collect_factors(model, class_logits, [padded(seed=2)], rank=4))
        whole = posterior.logit_covariance(model, class_logits, batch)
        alone = [posterior.logit_covariance(model, class_logits, row) for row in plain_rows(batch)]
        for found, parts in zip(whole, zip(*alone, strict=True), strict=True):
            # Padding on the left shifts positions, whose rotations are rounded to float32.
            torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-6)

    def test_the_page_s_module_with_the_callback(self, family, tmp_path):
        page = {"L": L, "__name__": "page"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(block("Sequence classification", "python").partition("\n# Yours")[0], page)
        model = classifier(family, torch.float32)
        module = page["Classifier"](model)
        callback = BayesianMoECallback(METHODS, predict_method="laplace_lpo", dirpath=str(tmp_path / "fit"))
        writer = PredictionWriter(str(tmp_path / "rows.jsonl"), class_names=["bad", "neutral", "good"])
        data = {name: DataLoader(Rows(size, seed), 8, collate_fn=stack) for name, size, seed in SPLITS}
        run = trainer(tmp_path, [callback, writer], max_epochs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # padding that changes logits is warned of
            warnings.filterwarnings("ignore", "(?s).*(does not have many workers|LeafSpec|few|labels).*")
            run.fit(module, data["train"], data["calibration"])
        metrics = run.test(module, data["test"], verbose=False)[0]
        assert float(callback.fitted.state_of(callback.methods[2])["prior_precision"].min()) > 0
        batches = run.predict(module, data["test"])
        found = torch.cat([batch["log_probs"] for batch in batches])
        torch.testing.assert_close(found, callback.predictions["test"]["laplace_lpo"].log_probs)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(len(found), dtype=torch.float64))
        labels = torch.cat([batch["label"] for batch in data["test"]])
        nll = -found.gather(1, labels.unsqueeze(1)).mean()
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(float(nll), rel=1e-5)
        rows = [row for _, row in file_rows(tmp_path / "rows.jsonl")]
        assert [row["answer"] for row in rows] == [("bad", "neutral", "good")[label] for label in labels.tolist()]


SPLITS = (("train", 24, 5), ("calibration", 16, 6), ("test", 12, 7))


class Rows(torch.utils.data.Dataset):
    def __init__(self, size, seed):
        self.batch = padded(rows=size, seed=seed)

    def __len__(self):
        return len(self.batch["label"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def stack(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
