"""Language models by folder or hub id, whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

# The owner's name may be missing, as with the hub's oldest models.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class ModelUnavailableError(RuntimeError):
    """A model was asked for by its folder or hub id, and could not be had whole."""


def load_causal_model(source: str, dtype: DtypeName = "auto") -> PreTrainedModel:
    """Load a causal language model on the CPU, in evaluation mode. Code from the hub is never run.

    Args:
        source: local folder or hub id.
        dtype: of the weights; `auto` is as they were saved.

    Raises:
        ModelUnavailableError: if there is no such folder, the hub cannot give the model, files are missing or cut
            short, or they lack weights of the model, which transformers would leave random.
        ValueError: if transformers does not know the kind of model.
    """
    folder = Path(source).is_dir()
    if not folder and not HUB_ID.fullmatch(source):
        raise ModelUnavailableError(f"there is no folder {source!r}, and it is no hub id, which reads owner/name")
    try:
        # The trainer's device context would make transformers ask for accelerate; the strategy moves the model later.
        with torch.device("cpu"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        remedy = "are all its files there and whole?" if folder else "the path of a local folder works without the hub."
        raise ModelUnavailableError(f"the model {source!r} could not be had ({reason}); {remedy}") from None
    model, report = loaded
    broken = sorted({*report["missing_keys"], *(str(entry) for entry in report["mismatched_keys"])})
    if broken:
        shown = ", ".join(broken[:3]) + (" and more" if len(broken) > 3 else "")
        raise ModelUnavailableError(
            f"the files of {source!r} do not hold all weights of {type(model).__name__}, which would stay random: "
            f"{shown}. Is the download complete, and is it a causal language model?"
        )
    return model
