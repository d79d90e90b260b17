"""Further passes over the held-out data, for fits that predict them with a model that is changed while it runs.

Shapes: `N` examples, `G` candidates for a fitted number, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.counted_batch import CountedBatch, count_of, lockstep, plain_batch
from bmoe_lightning.experts.logits_contract import checked_labels
from bmoe_lightning.methods.batch_view import BatchView, LastingValues
from bmoe_lightning.methods.data_differences import iterates_once
from bmoe_lightning.methods.routes import probed_routers
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.gaps import NUM_BINS, count_gaps, median_gap
from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.token_rows import watched_tokens
from bmoe_lightning.routers.types import SCORES, Router
from bmoe_lightning.utils.distributed import (
    broadcast_,
    failing_together,
    gather_examples,
    gather_number,
    sum_over_processes,
)
from bmoe_lightning.utils.random_state import unchanged_random_state

_NO_DATA = "a method runs the model on the held-out data, and there are none; pass a calibration split"


class HeldOutPasses:
    """Further passes over the held-out data. Each is a collective, if distributed.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batches: The held-out data, or None.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
        seed: Seed of the views of batches.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        batches: Iterable[Any] | None,
        *,
        distributed: bool,
        seed: int,
    ) -> None:
        self._model = model
        self._class_logits = class_logits
        self._batches = batches
        self._distributed = distributed
        self._seed = seed
        self._routers: list[Router] | None = None
        self._gaps: Tensor | None = None
        self._found: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._lasting = LastingValues()

    def check(self) -> None:
        """Check before the first pass that the data can be iterated over again, and that there are routers.

        Raises:
            ValueError: If they cannot, there are none, or `find_routers` finds no routers.
        """
        if self._batches is None:
            raise ValueError(_NO_DATA)
        if iterates_once(self._batches):
            raise ValueError(
                "a method takes further passes over the held-out data, which can be iterated over only once; pass a "
                "list of batches or a loader"
            )
        find_routers(self._model)

    def log_probs(self, candidates: Callable[[BatchView], Tensor], *, key: Hashable = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the held-out data under several candidates, in one pass.

        Args:
            candidates: Function from the view of a batch to log-probabilities `[G, B, K]`.
            key: What the log-probabilities depend on besides the data; a second call with it takes no pass. None if
                there is no second one.

        Returns:
            Log-probabilities `[G, N, K]` float64, `-inf` for absent classes, and labels `[N]` int64, on the CPU.

        Raises:
            ValueError: If there are no labels.
        """
        if key is not None and key in self._found:
            return self._found[key]
        parts: list[Tensor] = []
        labels = [torch.empty(0, dtype=torch.int64)]

        def predict(view: BatchView, batch: Any) -> None:
            found = candidates(view)
            if view.labels is None:  # of whatever forward pass there was, so that they need none of their own
                raise ValueError("class_logits returned None for held-out labels; return (logits, labels)")
            count = count_of(batch, found.shape[1])
            labels.append(checked_labels(view.labels, found[0])[:count].cpu())
            parts.append(found[:, :count].transpose(0, 1).cpu())

        self._each(predict)
        num_candidates, num_classes = (max((part.shape[dim] for part in parts), default=0) for dim in (1, 2))
        if self._distributed:
            num_candidates, num_classes = (max(gather_number(number)) for number in (num_candidates, num_classes))
        # A rank without a batch contributes no rows.
        parts.append(torch.empty(0, num_candidates, num_classes, dtype=torch.float64))
        found = torch.cat([pad(part, (0, num_classes - part.shape[2]), value=-torch.inf) for part in parts])
        of_all = torch.cat(labels)
        if self._distributed:
            found, of_all = gather_examples(found), gather_examples(of_all)
        result = found.transpose(0, 1), of_all
        if key is not None:
            self._found[key] = result
        return result

    def routers(self) -> list[Router]:
        """The routers of the model, probed on the first batch.

        Raises:
            ValueError: If there are none, or one is not supported.
        """
        if self._routers is None:
            routers = find_routers(self._model)
            numbers = torch.zeros(2, len(routers), dtype=torch.int64)

            def probe(view: BatchView, _batch: Any) -> None:
                for index, router in enumerate(probed_routers(view)):
                    numbers[:, index] = torch.tensor([router.top_k or 0, SCORES.index(router.score or "other")])

            self._each(probe, max_batches=1)
            if self._distributed:
                broadcast_([numbers])  # a rank may have no batch
            self._routers = [
                replace(router, top_k=top_k or None, score=SCORES[score])
                for router, top_k, score in zip(routers, *numbers.tolist(), strict=True)
            ]
        return self._routers

    def on_first_batch(self, measure: Callable[[BatchView], int]) -> int:
        """What a function of a view finds on the first batch; on a rank that has none, what it finds on rank zero."""
        found = torch.zeros((), dtype=torch.int64)

        def keep(view: BatchView, _batch: Any) -> None:
            found.fill_(measure(view))

        self._each(keep, max_batches=1)
        if self._distributed:
            broadcast_([found])
        return int(found)

    def router_gaps(self) -> Tensor:
        """The median gap of each router between the K-th and the next largest logit, `[L]` float64; see `count_gaps`.

        Tokens of padding are left out, and so are those of the examples that a distributed sampler repeats, if all
        examples have as many rows.
        """
        if self._gaps is None:
            self._gaps = self._measured_gaps()
        return self._gaps

    def _measured_gaps(self) -> Tensor:
        routers = self.routers()
        counts = torch.zeros(len(routers), NUM_BINS, dtype=torch.int64)

        def count(view: BatchView, batch: Any) -> None:
            share = batch.num_counted / max(batch.size, 1) if isinstance(batch, CountedBatch) else 1.0

            def counting(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
                real = watch.rows(len(logits)).mask.clone()
                real[round(share * len(real)) :] = False
                counts[router.index] += count_gaps(logits[real.flatten().to(logits.device)], router)
                return logits

            names = [router.name for router in routers]
            with watched_tokens(self._model, names) as watch, intercepted_routers(self._model, routers, counting):
                view.forward()

        self._each(count)
        if self._distributed:
            sum_over_processes([counts])
        return torch.tensor([median_gap(of_router) for of_router in counts], dtype=torch.float64)

    def _each(self, step: Callable[[BatchView, Any], None], max_batches: int | None = None) -> None:
        """Call a function with the view of each batch and the batch."""
        if self._batches is None:
            raise ValueError(_NO_DATA)
        with unchanged_random_state(self._batches), failing_together(distributed=self._distributed):
            for batch in islice(lockstep(self._model, self._batches), max_batches):
                view = BatchView(
                    self._model, self._class_logits, plain_batch(batch), seed=self._seed, lasting=self._lasting
                )
                step(view, batch)
