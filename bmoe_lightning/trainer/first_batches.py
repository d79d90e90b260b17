"""The check of `class_logits` on the first batch of every loader, before the first training or test step.

A mistake in `class_logits` or in the labels would otherwise show when training is over. Training batches are checked as
they come, just before the first step: nothing is drawn from the training loader. Those of other loaders are drawn
without changing what the loader gives next (see `first_batch`); where that is impossible, the first one that the
trainer draws is checked. Of several ranks some may have no batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L

from bmoe_lightning.experts import ClassLogits, ExpertLayer
from bmoe_lightning.experts.contract_check import check_class_logits
from bmoe_lightning.experts.example_check import check_examples
from bmoe_lightning.experts.fsdp import has_shards
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Available, check_needs
from bmoe_lightning.methods.routes import probed_routers
from bmoe_lightning.trainer.data_passes import as_list, on_device, validation_pass
from bmoe_lightning.trainer.loaders import first_batch
from bmoe_lightning.utils.distributed import failing_together, gather_number


class FirstBatches:
    """Checks one batch of each loader of a run; every rank raises what one rank finds.

    Args:
        methods: Methods to fit, or to evaluate.
        class_logits: Function `(module, batch) -> (logits [B, K], labels [B] or None)`.
    """

    def __init__(self, methods: Sequence[Method], class_logits: ClassLogits) -> None:
        self._methods = tuple(methods)
        self._class_logits = class_logits
        self._checked: set[tuple[str, int]] = set()
        self._awaited: set[int] = set()
        self._failure: Exception | None = None

    def check_fit(self, trainer: L.Trainer, module: L.LightningModule, *, trains: bool = True) -> None:
        """Check one batch of each validation loader. A collective.

        Args:
            trainer: Trainer within a fit, with its data set up.
            module: The module.
            trains: Whether training steps follow, with batches that `check` gets; otherwise one is drawn.

        Raises:
            TypeError: If `class_logits` breaks its contract; see `check_class_logits`.
            ValueError: Likewise, or if there are too few held-out inputs.
            RuntimeError: Likewise.
        """
        if not trains:
            self._draw(trainer, module, "training", 0, trainer.train_dataloader)
        if not trainer.enable_validation:
            return
        needing = [method for method in self._methods if method.needs.calibration_inputs]
        validation = validation_pass(trainer, "Calibration") if needing else None
        for index, loader in enumerate(as_list(trainer.val_dataloaders)):
            drawn = self._draw(trainer, module, "validation", index, loader)
            entries = None if validation is None else validation.num_entries
            with failing_together(distributed=trainer.world_size > 1):
                if drawn is not None and entries is not None:
                    inputs, of_entries = drawn
                    # An entry of the data set may have several examples.
                    count = math.ceil(entries * inputs / of_entries)
                    check_needs(needing, Available(calibration_inputs=count, runs=True))

    def check_evaluation(
        self, trainer: L.Trainer, module: L.LightningModule, stage: str, loaders: Sequence[Any]
    ) -> None:
        """Check one batch of each loader of a test or validation run. A collective."""
        for index, loader in enumerate(loaders):
            self._draw(trainer, module, stage, index, loader)

    def check(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, stage: str, index: int = 0) -> None:
        """Check a batch that the trainer has drawn, unless one of this loader was checked.

        A collective, except in validation, where a rank may have no batch: what is found there, `end_validation`
        raises. Warns of what changes the logits of a row; see `check_examples`.
        """
        if (stage, index) in self._checked:
            return
        if index in self._awaited and stage == "validation":
            self._checked.add((stage, index))
            try:
                self._examples(module, batch, stage, index)
            except Exception as error:  # noqa: BLE001  (raised in end_validation)
                self._failure = self._failure or error
            return
        self._check(trainer, module, [batch], stage, index)

    def end_validation(self) -> None:
        """Raise what `check` found in validation. A collective after the first validation."""
        if not self._awaited:
            return
        self._awaited.clear()
        failure, self._failure = self._failure, None
        with failing_together():
            if failure is not None:
                raise failure

    def _draw(
        self, trainer: L.Trainer, module: L.LightningModule, stage: str, index: int, loader: Any
    ) -> tuple[int, int] | None:
        """Check the first batch of a loader; the numbers of its examples and entries, if both are known."""
        if (stage, index) in self._checked:
            return None
        several = trainer.world_size > 1
        found, batches = None, []
        with failing_together(distributed=several):
            found = first_batch(loader)
            if found is not None:
                batches = [on_device(trainer, found.batch, index)]
        drawn = gather_number(len(batches)) if several else [len(batches)]
        if not any(drawn):
            if several and stage == "validation":
                self._awaited.add(index)
            return None
        if not all(drawn) and has_shards(module):
            # Ranks without a batch do not run the model, which all-gathers its weights.
            self._checked.add((stage, index))
            return None
        examples = self._check(trainer, module, batches, stage, index)
        return None if found is None or found.entries is None else (examples, found.entries)

    def _check(
        self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[Any], stage: str, index: int
    ) -> int:
        """Check one batch, or none on a rank that has none; the number of its examples. A collective."""
        self._checked.add((stage, index))
        with failing_together(distributed=trainer.world_size > 1):
            return sum(self._examples(module, batch, stage, index) for batch in batches)

    def _examples(self, module: L.LightningModule, batch: Any, stage: str, index: int) -> int:
        try:
            return self._contract(module, batch, stage)
        except Exception as raised:
            raised.add_note(f"This was found on the first batch of the {stage} data (loader {index}).")
            raise

    def _contract(self, module: L.LightningModule, batch: Any, stage: str) -> int:
        taps = stage == "training" or not any(c.collects for method in self._methods for c in method.curvatures)
        logits = check_class_logits(
            module,
            self._class_logits,
            batch,
            layers=self._layers(module) if taps and stage in ("training", "validation") else (),
            labelled=stage != "validation",
            needing_labels=self._needing_labels(stage),
        )
        # The code is the same for all loaders, and the padding is not.
        check_examples(module, self._class_logits, batch, logits, repeats=stage != "validation")
        using = [method for method in self._methods if method.needs.routers]
        if stage == "validation" and using:
            view = BatchView(module, self._class_logits, batch)
            routers = probed_routers(view)
            for method in using:
                method.check_routers(module, routers, lambda: view.forward()[0])
        return len(logits)

    def _layers(self, module: L.LightningModule) -> list[ExpertLayer]:
        found = [layer for m in self._methods for curvature in m.curvatures for layer in curvature.find_layers(module)]
        return list({layer.name: layer for layer in found}.values())

    def _needing_labels(self, stage: str) -> list[str]:
        if stage == "training":
            empirical = [
                m.name for m in self._methods if any(c.collects and c.fisher == "empirical" for c in m.curvatures)
            ]
            using = [method.name for method in self._methods if method.needs.training_labels]
            return [f"the empirical Fisher of {', '.join(empirical)}", *using] if empirical else using
        if stage == "validation":
            return [method.name for method in self._methods if method.needs.calibration_labels]
        return ["metrics"]


@contextmanager
def no_logging(module: Any) -> Iterator[None]:
    """Refuse `self.log` within `class_logits`, which also runs where Lightning allows no logging.

    Args:
        module: The module.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "class_logits calls self.log, but it also runs outside of the steps, where nothing may be logged; log in "
            "training_step, validation_step and test_step"
        )

    names = [name for name in ("log", "log_dict") if isinstance(module, L.LightningModule)]
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        vars(module)[name] = refuse
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(own)
