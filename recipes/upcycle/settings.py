"""Options of an upcycling; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from recipes.common.cli import UsageError, check_bounds, option


@dataclass(frozen=True, kw_only=True)
class UpcycleSettings:
    """Options of `python -m recipes.upcycle`.

    Raises:
        UsageError: If a value is out of range, or two exclude each other.
    """

    model: str = option(help="hub id or local folder of a dense Llama, Mistral or Qwen2 causal LM")
    gguf_file: str | None = option(
        None, "name of a GGUF file in that folder or repository, to be read instead of safetensors"
    )
    output: str = option(help="folder of the mixture of experts, missing or empty")
    experts: int = option(8, "copies of the MLP in an upcycled layer", least=2)
    top_k: int = option(2, "copies that each token is routed to", least=1)
    layers: str = option(
        "upper-half", "layers that are upcycled: all, upper-half (rounded up), or the number of uppermost layers"
    )
    segments: int = option(
        1,
        "fine-grained experts: each copy is split along its hidden dimension into this many experts (a power of two), "
        "all of which a token that is routed to the copy uses",
        least=1,
    )
    router_std: float = option(0.02, "standard deviation of the router's weights")
    noise: float = option(
        0.0,
        "make the experts different: standard deviation of the Gaussian noise on their weights, as a fraction of the "
        "standard deviation of each matrix",
    )
    reinitialise: float = option(
        0.0,
        "make the experts different: fraction of each expert's hidden dimension whose weights are drawn anew from a "
        "normal of the same mean and standard deviation (Drop-Upcycling)",
    )
    seed: int = option(0, "seed of routers, noise and the batch that is compared", least=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype of the weights; auto keeps it")
    compare: bool = option(
        True,
        "load what has been written and compare its logits with those of the dense model, in float32; takes memory for "
        "the mixture of experts in float32",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.top_k > self.experts:
            raise UsageError(f"--top-k must be at most --experts, which is {self.experts}, got {self.top_k}")
        if self.layers not in ("all", "upper-half") and not (self.layers.isdecimal() and int(self.layers) > 0):
            raise UsageError(f"--layers must be all, upper-half or a number of layers above 0, got {self.layers}")
        if self.segments & (self.segments - 1):
            raise UsageError(f"--segments must be a power of two, got {self.segments}: others round the weights")
        if not 0 < self.router_std < math.inf:
            raise UsageError(f"--router-std must be a number above 0, got {self.router_std}")
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"--noise must be a number of at least 0, got {self.noise}")
        if not 0 <= self.reinitialise <= 1:
            raise UsageError(f"--reinitialise must be from 0 to 1, got {self.reinitialise}")
        if self.noise and self.reinitialise:
            raise UsageError("--noise and --reinitialise exclude each other; give one of the two")

    @property
    def is_exact(self) -> bool:
        """Whether the mixture of experts starts as the function of the dense model."""
        return self.noise == 0 and self.reinitialise == 0
