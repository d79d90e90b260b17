"""The model `bmoe` of lm-evaluation-harness: a served model whose single-token choices a method predicts."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bmoe_lightning.data.batches import Collate, EncodedQuestion
from bmoe_lightning.models.answer_logits import answer_logits
from bmoe_lightning.serving import CalibratedModel
from bmoe_lightning.utils.late_import import how_to_install

try:
    from lm_eval.api.model import CacheHook
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"the model bmoe needs lm-evaluation-harness, which cannot be imported ({error}); {how_to_install('lm-eval')}"
    ) from error

_logger = logging.getLogger(__name__)

_AUTO_BATCH_SIZE = 8
_ROUNDING = 1e-10  # of float64 log-probabilities, and below what the model's float32 ones resolve

_OF_RUN = {
    *(
        "pretrained",
        "backend",
        "revision",
        "subfolder",
        "tokenizer",
        "dtype",
        "trust_remote_code",
        "use_fast_tokenizer",
    ),
    *("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan"),
    *("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "kwargs", "self"),
}

Scored = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding produces it."""


@dataclass(frozen=True)
class Document:
    """A question of a task whose choices are single tokens after one context.

    Attributes:
        context: Token ids of the context.
        choices: Token id of each choice, different ones.
        places: Position of each choice's request among all requests.
    """

    context: tuple[int, ...]
    choices: tuple[int, ...]
    places: tuple[int, ...]


@register_model("bmoe")
class CalibratedLM(HFLM):
    """A served model in which a fitted method predicts the choices of each question.

    Where the choices of a document are two or more different single tokens after one context, the value of choice c is
    `log p(c | choices) + log p(choices)`: the method's log-probability over these choices, plus the logarithm of the
    probability that the plain model gives to all of them together. So the values stay log-likelihoods, and their
    softmax over the choices is the method's prediction, which is what `acc` and `brier_score` are computed from.
    `acc_norm` divides by the length of a choice's text, as always, and is `acc` where all have the same length. A
    choice is greedy if the method finds it most probable and greedy decoding of the plain model produces one of them.

    Where the method predicts what the plain model does, to rounding, the values are those of the harness's model `hf`,
    bit for bit; so are all other log-likelihoods, perplexities and generated texts, for which there is no prediction of
    the method. A warning says so once.

    Args:
        run: Folder that `CalibratedModel.from_pretrained` loads.
        method: Name of the method; by default the first that was fitted.
        device: Device of the model; by default a GPU if there is one.
        **options: Options of `HFLM`, but for those that say where the model comes from and how it is loaded. With
            `batch_size=auto`, methods predict batches of 8: their backward passes are not what is measured.

    Raises:
        ValueError: If there is no such option, or no such method; and as `CalibratedModel.from_pretrained`.
    """

    cache_hook: Any

    def __init__(
        self, run: str, method: str | None = None, device: str | torch.device | None = None, **options: Any
    ) -> None:
        _check_options(options)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.served = CalibratedModel.from_pretrained(str(run), device=device)
        self._predictor = self.served.predictor(method)
        self._encoded: Sequence[tuple[Any, list[int], list[int]]] = ()
        self._has_warned = False
        options.setdefault("mixed_precision_dtype", self.served.autocast_dtype)
        super().__init__(pretrained=self.served.model, tokenizer=self.served.tokenizer, device=str(device), **options)

    @property
    def method(self) -> str:
        """Name of the method that predicts."""
        return self._predictor.method.name

    def get_model_info(self) -> dict[str, Any]:
        """What the results of the harness say of the model: as of `hf`, and the method."""
        return {**super().get_model_info(), "method": self.method}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Scored]:
        """Log-likelihoods of continuations.

        Args:
            requests: Requests of the harness.
            disable_tqdm: Whether to show no progress.
        """
        # What is cached while the plain model runs would be taken for the method's values by the next run.
        hook, self.cache_hook = self.cache_hook, CacheHook(None)
        try:
            values = list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
        finally:
            self.cache_hook = hook
        documents = _documents(requests, self._encoded)
        if sum(len(document.places) for document in documents) < len(requests):
            self._warn()
        with tqdm(total=len(documents), disable=disable_tqdm, desc=f"Predicting with {self.method}") as progress:
            for batch in self._batches(documents):
                for document, *found in zip(batch, *self._predicted(batch), strict=True):
                    plain = [values[place] for place in document.places]
                    for place, value in zip(document.places, _log_likelihoods(plain, *found), strict=True):
                        values[place] = value
                progress.update(len(batch))
        return values

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, of the plain model; arguments as of `loglikelihood`."""
        self._warn()
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that the plain model generates; arguments as of `loglikelihood`."""
        self._warn()
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[Scored]:
        self._encoded = requests
        found: list[Scored] = super()._loglikelihood_tokens(requests, *args, **options)
        return found

    def _batches(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """Documents in batches, those with the longest context first."""
        size = _AUTO_BATCH_SIZE if self.batch_size == "auto" else int(self.batch_size)
        ordered = sorted(documents, key=lambda document: -len(document.context))
        return (ordered[begin : begin + size] for begin in range(0, len(ordered), size))

    def _predicted(self, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[B, K]` float64 of the choices under the method, and under the plain model."""
        width, form = max(len(document.choices) for document in documents), self.served.questions
        items = [
            # As the harness cuts a context that is too long.
            EncodedQuestion(document.context[-self.max_length :], len(document.choices), 0, row)
            for row, document in enumerate(documents)
        ]
        batch: dict[str, Any] = {**Collate(form.pad_id, width, form.padding_side)(items)}
        choices = [[*document.choices, *[0] * (width - len(document.choices))] for document in documents]
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "choice_mask")}
        batch["choice_ids"] = torch.tensor(choices)
        batch = {name: value.to(self.served.device) for name, value in batch.items()}
        log_probs, view = self._predictor.predict(self.served.module, self._class_logits, batch)
        return log_probs.cpu(), view.logits.log_softmax(-1).cpu()

    def _class_logits(self, module: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        with self.served.forward_context():
            return answer_logits(module.model, batch, batch["choice_ids"]), None

    def _warn(self) -> None:
        if not self._has_warned:
            _logger.warning(
                "%s predicts choices that are single tokens after one context; what else the tasks ask for is answered "
                "by the plain model, as model hf does",
                self.method,
            )
        self._has_warned = True


def _check_options(options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(HFLM.__init__).parameters) - _OF_RUN
    wrong = sorted(set(options) - known)
    if wrong:
        raise ValueError(
            f"the model bmoe has no option {', '.join(wrong)}: its run says what model it is and how it is loaded; the "
            f"options are run, method, {', '.join(sorted(known))}"
        )


def _documents(requests: Sequence[Any], encoded: Sequence[tuple[Any, list[int], list[int]]]) -> list[Document]:
    """The documents whose choices a method can predict.

    Args:
        requests: Requests of the harness.
        encoded: Token ids of the context and the continuation of each, after something else.
    """
    found: dict[tuple[Any, ...], list[tuple[int, int, list[int]]]] = defaultdict(list)
    for place, (request, (_, context, continuation)) in enumerate(zip(requests, encoded, strict=True)):
        found[request.task_name, request.doc_id, tuple(context)].append((request.idx, place, continuation))
    documents = []
    for (*_, context), entries in found.items():
        entries.sort()  # into the order of the choices: random draws of a method belong to their positions
        tokens = {tuple(continuation) for *_, continuation in entries}
        if len(tokens) == len(entries) > 1 and all(len(token) == 1 for token in tokens):
            choices = tuple(continuation[0] for *_, continuation in entries)
            documents.append(Document(context, choices, tuple(place for _, place, _ in entries)))
    return documents


def _log_likelihoods(plain: Sequence[Scored], log_probs: Tensor, plain_log_probs: Tensor) -> Sequence[Scored]:
    """Values of the choices of a document; see `CalibratedLM`.

    Args:
        plain: Values of the plain model.
        log_probs: Log-probabilities over the choices `[K]` under the method, then perhaps those of absent ones.
        plain_log_probs: The same under the plain model.
    """
    log_probs, plain_log_probs = log_probs[: len(plain)], plain_log_probs[: len(plain)]
    if bool(((log_probs - plain_log_probs).abs() <= _ROUNDING).all()):
        return plain
    all_choices = torch.tensor([value for value, _ in plain], dtype=log_probs.dtype).logsumexp(0)
    is_among_them, best = any(is_greedy for _, is_greedy in plain), int(log_probs.argmax())
    return [
        (value, is_among_them and number == best) for number, value in enumerate((log_probs + all_choices).tolist())
    ]
