"""Frequencies of position embeddings are as exact in half precision as transformers leaves them."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from oracles.models import tiny_qwen
from torch import nn
from torch.utils.data import DataLoader
from toy import ToyData
from transformers import AutoModelForCausalLM

from bmoe_lightning import ExpertFinetuner
from bmoe_lightning.models.answer_logits import answer_logits
from bmoe_lightning.models.buffers import unrounded_buffers


class Batches(ToyData):
    def __getitem__(self, index):
        ids = self.ids[index].repeat(30)[:250]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("32-true", torch.float32)])
def test_a_trainer_predicts_what_transformers_does_in_that_dtype(tmp_path, precision, dtype):
    """At 250 tokens rounded frequencies change the logits by far more than the arithmetic's rounding."""
    tiny_qwen(0, vocab_size=24, moe_intermediate_size=16, dtype=torch.float32).save_pretrained(tmp_path / "model")
    module = ExpertFinetuner(str(tmp_path / "model"), answer_token_ids=[1, 2, 3])
    loader = DataLoader(Batches(4, 0), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", precision=precision, default_root_dir=tmp_path, **quiet)
    found = torch.cat([batch["log_probs"] for batch in trainer.predict(module, loader)])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).eval()
    with torch.no_grad():
        expected = torch.cat([answer_logits(model, batch, torch.tensor([1, 2, 3])) for batch in loader])
    assert torch.equal(found, expected.log_softmax(-1).float())
    assert module.model.dtype == dtype
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_only_computed_buffers_are_kept_and_only_against_rounding():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.rand(3))
            self.register_buffer("computed", torch.rand(3), persistent=False)
            self.register_buffer("count", torch.tensor(1), persistent=False)
            self.register_buffer("none", None, persistent=False)

    model = nn.Sequential(Norm(), nn.Linear(2, 2))
    exact = model[0].computed.clone()
    with unrounded_buffers(model):
        model.to(torch.float16)
    assert (model[0].mean.dtype, model[0].computed.dtype, model[1].weight.dtype) == (
        torch.float16,
        torch.float32,
        torch.float16,
    )
    assert torch.equal(model[0].computed, exact)
    with unrounded_buffers(model):
        model.double()
    assert model[0].computed.dtype == torch.float64
    with unrounded_buffers(model):
        model.to("meta")
    assert model[0].computed.device.type == "meta"
