"""The whole of an upcycling: load, check, write, compare, rename."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2MoeForCausalLM

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.models.loading import check_gguf_packages, load_causal_model, load_tokenizer, model_source
from bmoe_lightning.utils.new_folder import new_folder, remove_unfinished
from recipes.upcycle.architecture import CannotUpcycleError, dense_tensors, empty_model, moe_config
from recipes.upcycle.comparison import SAMPLE_TEXT, Difference, difference, logits_of, text_batch, tokens_per_expert
from recipes.upcycle.report import Summary, count_active, count_parameters, model_card, record
from recipes.upcycle.settings import UpcycleSettings
from recipes.upcycle.shards import write_shards
from recipes.upcycle.weights import Upcycling

RECORD_FILE = "upcycling.json"
"""Options and numbers of an upcycling, in the folder of its model."""

_ROWS, _LENGTH = 8, 64  # of the batch that is compared


def upcycle(settings: UpcycleSettings, say: Callable[[str], None] = print) -> Summary:
    """Make a mixture of experts from a dense model.

    The folder is written under a temporary name, and renamed when its logits have been compared with those of the dense
    model.

    Args:
        settings: Options.
        say: Called with each line of the report.

    Raises:
        CannotUpcycleError: If the model has no exact mixture of experts in the layout, or the output folder is in use.
        ModelUnavailableError: If the model could not be loaded.
        MissingPackageError: If packages that read GGUF files are missing.
        OSError: If the folder cannot be written.
        ValueError: If the model type is unknown to transformers, or the tokenizer does not fit the model.
    """
    output = Path(settings.output)
    _check_output(output)
    check_gguf_packages(settings.gguf_file)
    with model_source(settings.model, ValueError):
        options = {} if settings.gguf_file is None else {"gguf_file": settings.gguf_file}
        dense_config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False, **options)
        tokenizer = load_tokenizer(settings.model, gguf_file=settings.gguf_file)
    config = moe_config(dense_config, settings)
    empty = empty_model(config)
    layers = tuple(find_expert_layers(empty))
    batch = text_batch(tokenizer, config.vocab_size, rows=_ROWS, length=_LENGTH, seed=settings.seed)
    say(f"Loading {settings.model}.")
    dense = load_causal_model(settings.model, settings.dtype, gguf_file=settings.gguf_file)
    if settings.segments > 1 and dense.dtype not in (torch.float32, torch.float64):
        raise CannotUpcycleError(
            f"--segments needs weights in float32, and these are in {str(dense.dtype).removeprefix('torch.')}, where "
            "two copies may have equal routing weights, and a token use segments of both; give --dtype float32"
        )
    dense_parameters, parameters = count_parameters(dense), count_parameters(empty)
    active = count_active(parameters, layers, config)
    with new_folder(output) as folder:
        say(f"Writing {parameters:,} parameters.")
        tokenizer.save_pretrained(folder)
        _check_tokenizer(folder, tokenizer)
        _write(folder, dense, empty, settings)
        found: Difference | None = None
        tokens: dict[str, Tensor] = {}
        if settings.compare:
            say("Comparing its logits with those of the dense model.")
            precision = torch.promote_types(dense.dtype, torch.float32)
            expected = logits_of(nn.Module.to(dense, precision), batch)
            del dense  # so that the two models are never in memory together
            found, tokens = _compared(folder, expected, batch, precision)
            _check_exact(found, settings)
        summary = Summary(dense_parameters, parameters, active, layers, config.num_hidden_layers, found, tokens)
        text = json.dumps(record(settings, summary), indent=2) + "\n"
        (folder / RECORD_FILE).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(model_card(settings, summary), encoding="utf-8")
    for line in summary.lines():
        say(line)
    return summary


def _check_output(output: Path) -> None:
    """Check, before anything is loaded, that the folder can be written, and remove what killed processes have left."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CannotUpcycleError(f"--output {output} exists already; give a new folder, or remove this one")
    output.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output.parent).close()
    remove_unfinished(output)


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    written = load_tokenizer(str(folder))
    if written(SAMPLE_TEXT)["input_ids"] != tokenizer(SAMPLE_TEXT)["input_ids"]:
        raise CannotUpcycleError(
            "its tokenizer makes other tokens once it has been saved beside a Qwen2-MoE model; give a folder in which "
            "tokenizer.json describes the tokenizer"
        )


def _write(folder: Path, dense: PreTrainedModel, empty: Qwen2MoeForCausalLM, settings: UpcycleSettings) -> None:
    empty.config.dtype = dense.dtype
    empty.config.save_pretrained(folder)
    if dense.generation_config is not None:
        dense.generation_config.save_pretrained(folder)
    write_shards(folder, Upcycling(dense_tensors(dense.state_dict(), empty), empty.config, settings))


def _compared(
    folder: Path, expected: Tensor, batch: Tensor, precision: torch.dtype
) -> tuple[Difference, dict[str, Tensor]]:
    moe = load_causal_model(str(folder), "float32" if precision == torch.float32 else "auto")
    if precision == torch.float64:
        moe.set_experts_implementation("eager")  # the default one multiplies no matrices of float64
    with tokens_per_expert(moe) as tokens:
        return difference(expected, logits_of(moe, batch)), tokens


def _check_exact(found: Difference, settings: UpcycleSettings) -> None:
    if settings.is_exact and not found.is_rounding:
        raise CannotUpcycleError(
            f"the logits of the mixture of experts differ from the dense model's by up to {found.largest:.2g} (largest "
            f"logit {found.largest_logit:.3g}), more than rounding explains, so it is not saved; please report the "
            "model's config.json"
        )
