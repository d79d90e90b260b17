"""The whole of an upcycling: the folder that it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import upcycle_cases as cases
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2MoeForCausalLM

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.models.loading import load_causal_model, load_tokenizer
from bmoe_lightning.utils.new_folder import UNFINISHED
from recipes.upcycle import upcycling
from recipes.upcycle.architecture import CannotUpcycleError, moe_config
from recipes.upcycle.upcycling import upcycle


def run(source, output, **changes):
    lines = []
    options = {"model": source, "output": str(output), "experts": 4, **changes}
    return upcycle(cases.settings(**options), lines.append), lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One upcycling that several tests look at."""
    folder = tmp_path_factory.mktemp("upcycling")
    dense = cases.dense_model("llama", tie_word_embeddings=True)
    dense.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=3)
    source = cases.save(folder / "dense", dense)
    summary, lines = run(source, folder / "deep" / "moe")
    return folder / "deep" / "moe", dense, summary, lines


def test_the_folder_loads_with_transformers_and_here(made):
    folder, dense, *_ = made
    expected = cases.logits(dense)
    for model in (AutoModelForCausalLM.from_pretrained(folder), load_causal_model(str(folder))):
        assert type(model) is Qwen2MoeForCausalLM
        assert model.generation_config.max_new_tokens == 7
        torch.testing.assert_close(cases.logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    text = "Plants turn water into sugar ."
    ids = cases.tokenizer()(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    assert load_tokenizer(str(folder))(text)["input_ids"] == ids


def test_the_files_have_the_published_names(made):
    folder, *_ = made
    names = set(load_file(folder / "model.safetensors"))
    mlp = "model.layers.2.mlp"
    assert {f"{mlp}.experts.3.{matrix}_proj.weight" for matrix in ("gate", "up", "down")} < names
    assert {f"{mlp}.gate.weight", f"{mlp}.shared_expert.down_proj.weight", f"{mlp}.shared_expert_gate.weight"} < names
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert "lm_head.weight" not in names
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2MoeForCausalLM"]


def test_numbers_are_those_of_the_model(made):
    folder, dense, summary, lines = made
    moe = load_causal_model(str(folder))
    assert summary.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert summary.parameters == sum(p.numel() for p in moe.parameters())
    # Two layers, in each of which two of the four experts are not used.
    assert summary.active_parameters == summary.parameters - 2 * 2 * 3 * 16 * 24
    assert list(summary.layers) == find_expert_layers(moe)
    assert summary.difference.largest < 1e-4
    assert 0 < summary.difference.largest_logit < 1e3
    text = "\n".join(lines)
    assert f"{summary.dense_parameters:,} before, {summary.parameters:,} after" in text
    assert "Expert layers found: 2 of 3 layers (model.layers.1.mlp.experts to model.layers.2.mlp.experts)" in text
    assert "4 experts each, down_proj 16 x 24" in text
    assert "Largest difference of a logit" in text
    assert "25.0 % on average" in text


def test_the_folder_says_what_it_was_made_from_and_how(made):
    folder, _, summary, lines = made
    card = (folder / "README.md").read_text()
    assert "/dense`" in card
    assert "2 of its 3 layers was copied 4 times" in card
    assert "computes the function of the dense model" in card
    assert lines[-1] in card
    record = json.loads((folder / "upcycling.json").read_text())
    assert record["made_from"]["experts"] == 4
    assert "output" not in record["made_from"]
    assert record["difference"]["largest"] == summary.difference.largest
    assert not list(folder.parent.glob(f"{UNFINISHED}*"))


def test_segments_noise_and_reinitialisation_are_in_the_model_card(tmp_path):
    source = cases.save(tmp_path / "dense", cases.dense_model())
    summary, lines = run(source, tmp_path / "moe", segments=2, noise=0.5)
    assert summary.difference.largest > 0.01
    assert summary.difference.divergence > 1e-3
    assert f"divergence of the next token {summary.difference.divergence:.2g} nats" in "\n".join(lines)
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "split along its hidden dimension into 2 experts" in card
    assert "0.5 times the standard deviation" in card
    assert "**not** the function" in card
    summary, _ = run(source, tmp_path / "other", reinitialise=0.5)
    assert summary.difference.largest > 0.01
    assert "50% of the hidden units" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float64, "auto", torch.float64),
    ],
)
def test_dtypes(stored, asked, written, tmp_path):
    source = cases.save(tmp_path / "dense", cases.dense_model("qwen2", stored))
    summary, _ = run(source, tmp_path / "moe", dtype=asked)
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {written}
    # Compared in float32, in which rounding to half precision is no difference.
    assert summary.difference.largest < 1e-5 * summary.difference.largest_logit
    assert load_causal_model(str(tmp_path / "moe")).dtype == written


def test_logits_need_not_be_compared(tmp_path, monkeypatch):
    source = cases.save(tmp_path / "dense", cases.dense_model())
    monkeypatch.setattr(upcycling, "logits_of", None)
    summary, lines = run(source, tmp_path / "moe", compare=False)
    assert summary.difference is None
    assert "have not been compared" in lines[-1]
    assert "have not been compared" in (tmp_path / "moe" / "README.md").read_text()
    load_causal_model(str(tmp_path / "moe"))


def test_another_function_is_not_saved(tmp_path, monkeypatch):
    def wrong(dense, settings):
        config = moe_config(dense, settings)
        config.rms_norm_eps *= 2
        return config

    source = cases.save(tmp_path / "dense", cases.dense_model())
    monkeypatch.setattr(upcycling, "moe_config", wrong)
    with pytest.raises(CannotUpcycleError, match="more than rounding explains"):
        run(source, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_tokenizer_that_changes_is_not_saved(tmp_path, monkeypatch):
    source = cases.save(tmp_path / "dense", cases.dense_model())

    def other(folder, **options):
        found = load_tokenizer(folder, **options)
        if folder != source:
            found.add_tokens(["sunlight,"])
        return found

    monkeypatch.setattr(upcycling, "load_tokenizer", other)
    with pytest.raises(CannotUpcycleError, match="tokenizer makes other tokens"):
        run(source, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_existing_folder_stays_as_it_is(tmp_path):
    for taken in (tmp_path / "folder", tmp_path / "file"):
        content = taken / "file" if taken.name == "folder" else taken
        content.parent.mkdir(exist_ok=True)
        content.write_text("kept")
        with pytest.raises(CannotUpcycleError, match="exists already; give a new folder"):
            run("no/model", taken)
        assert content.read_text() == "kept"


def test_nothing_stays_when_writing_fails(tmp_path, monkeypatch):
    source = cases.save(tmp_path / "dense", cases.dense_model())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upcycling, "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        run(source, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_segments_in_half_precision_are_refused(tmp_path):
    source = cases.save(tmp_path / "dense", cases.dense_model())
    with pytest.raises(CannotUpcycleError, match="--segments needs weights in float32, and these are in bfloat16"):
        run(source, tmp_path / "moe", dtype="bfloat16", segments=2)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_weights_that_the_dtype_cannot_hold_are_refused(tmp_path):
    dense = cases.dense_model()
    torch.nn.init.constant_(dense.model.layers[0].mlp.up_proj.weight, 1e6)
    with pytest.raises(CannotUpcycleError, match=r"infinite or not a number: model\.layers\.0\.mlp\.up_proj"):
        run(cases.save(tmp_path / "dense", dense), tmp_path / "moe", dtype="float16")
