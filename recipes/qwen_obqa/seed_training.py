"""Modules, data, trainers and fits of one fine-tuning seed, and the files of its weights."""

from __future__ import annotations

import gc
import hashlib
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, LoRAFinetuner, MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.curvature.checkpoint import FORMAT as PASS_FORMAT
from bmoe_lightning.data.batches import PaddingSide
from bmoe_lightning.methods import FitResult, Method
from bmoe_lightning.methods.fit_index import INDEX_FILE, has_fit
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer.progress import LoopProgressLines
from bmoe_lightning.utils.distributed import is_rank_zero
from bmoe_lightning.utils.safetensors_io import remove_tensor_file
from recipes.qwen_obqa.distributed import agreed, first_then_others, trainer_options
from recipes.qwen_obqa.methods import run_curvature
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.stored_weights import LoadTrained, StopAtSignal

_CURVES = "training_curves"


@dataclass
class SeedTraining:
    """Modules, data, trainers and fits of one fine-tuning seed; member 0 is its run, others are those of ensembles.

    Attributes:
        settings: Resolved settings.
        source: Model and data.
        output: Folder of the run.
        seed: Fine-tuning seed.
        identity: Digest of the settings and questions that trained weights and fits depend on.
        padding_side: Side on which prompts are padded, where a DataModule of this seed has measured it.
        shared_prompts: Whether prompts are shared by the choices of a question, where one has measured it.
    """

    settings: ResolvedSettings
    source: Source
    output: Path
    seed: int
    identity: str
    padding_side: PaddingSide | None = field(default=None, init=False, repr=False)
    shared_prompts: bool | None = field(default=None, init=False, repr=False)

    @property
    def folder(self) -> Path:
        """Folder of this seed's files."""
        return self.output / f"seed-{self.seed}"

    def model(self) -> tuple[str, str]:
        """The model that this seed starts from, and the hash of its weights."""
        return first_then_others(lambda: (self.source.model_of(self.seed), self.source.model_hash(self.seed)))

    def weights(self, member: int) -> Path:
        """The file with the weights of a fine-tuning run: this one, or a further one for an ensemble."""
        return self.folder / (f"member-{member}.safetensors" if member else "trained.safetensors")

    def stage(self, member: int) -> str:
        """Digest of everything that determines the weights of a fine-tuning run."""
        return hashlib.sha256(f"{self.identity} {self.seed} {member}".encode()).hexdigest()

    def callback(self, methods: Sequence[Method], folder: Path) -> BayesianMoECallback:
        """The callback that fits and evaluates methods, with its files in a folder."""
        return BayesianMoECallback(
            methods=methods,
            curvature=run_curvature(self.settings),
            curvature_checkpoint_every=self.settings.curvature_checkpoint_every,
            dirpath=str(folder),
            seed=self.seed,
        )

    def fit(
        self,
        methods: Sequence[Method],
        weights: Path,
        folder: Path,
        module: Finetuner,
        data: MultipleChoiceDataModule,
    ) -> None:
        """Complete the fit of a folder to fine-tuned weights, with a module before fine-tuning."""
        callback = self.callback(methods, folder)
        # The callback first captures the weights from before fine-tuning; then the fine-tuned ones are loaded.
        trainer = self.trainer([callback, LoadTrained(weights)])
        callback.fit_posterior(module, trainer=trainer, datamodule=data)
        self.detach(module, data)

    def unfitted(self, methods: Sequence[Method], folder: Path) -> list[str]:
        """The names of the methods that the fit of a folder lacks."""
        fit = self.fitted(folder) if is_rank_zero() else None
        missing = [m.name for m in methods if not agreed(fit is not None and fit.is_finished(m))]
        if not missing and is_rank_zero():
            for path in folder.glob("curvature_state-*"):  # of a process that was killed after the fit
                remove_tensor_file(path, format=PASS_FORMAT)
        return missing

    def fitted(self, folder: Path) -> FitResult | None:
        """The fit of an earlier run; the index of a damaged one is removed, so that everything is fitted again."""
        if not has_fit(folder):
            return None
        try:
            return load_fit(folder)[0]
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(f"{error} The methods are fitted again", stacklevel=2)
            (folder / INDEX_FILE).unlink()
            return None

    def fresh(self, member: int) -> tuple[Finetuner, MultipleChoiceDataModule]:
        """A module before fine-tuning, and the DataModule with this member's training order."""
        seed = 1000 * self.seed + member
        L.seed_everything(seed, workers=True, verbose=False)
        data = self.source.data(seed, self.padding_side, self.shared_prompts)
        return self.module(data), data

    def other_data(self, other: str) -> MultipleChoiceDataModule:
        """The DataModule of another data set, which this seed is tested on."""
        return self.source.data_of(other, self.padding_side, self.shared_prompts)

    def module(self, data: MultipleChoiceDataModule) -> Finetuner:
        """A module before fine-tuning; all of them start from the same weights."""
        settings, model = self.settings, self.model()[0]
        common: dict[str, Any] = {
            "answer_token_ids": data.answer_token_ids,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "schedule": settings.schedule,
            "half_precision_updates": settings.half_precision_updates,
        }
        if settings.train == "lora":
            return LoRAFinetuner(model, dropout=settings.expert_dropout, seed=self.seed, **common)
        return ExpertFinetuner(model, train=settings.train, expert_dropout=settings.expert_dropout, **common)

    def detach(self, module: Finetuner, data: MultipleChoiceDataModule) -> None:
        """Free what a finished trainer holds: gradients, and the optimizer with its moments and copies of weights.

        Trainer, module and DataModule refer to one another, so without this they would be freed at any later time.
        """
        # What was given is not measured again, and prompts of another format tell nothing about sharing.
        self.padding_side = data.measured_padding_side or self.padding_side
        if data.measured_shared_prompts is not None and data.prompt_format.name == self.settings.prompt:
            self.shared_prompts = data.measured_shared_prompts
        module.trainer = None
        data.trainer = None
        module.zero_grad()
        gc.collect()

    def trainer(self, callbacks: list[L.Callback], curves: str | None = None, **options: Any) -> L.Trainer:
        """A trainer; `curves` names its training curves, without which nothing is logged."""
        version = f"seed-{self.seed}-{curves}"
        if curves is not None and is_rank_zero():
            # TensorBoard would draw the events of a training that was killed beside those of this one.
            shutil.rmtree(self.output / _CURVES / version, ignore_errors=True)
        logger = curves is not None and TensorBoardLogger(
            self.output, name=_CURVES, version=version, default_hp_metric=False
        )
        return L.Trainer(
            max_epochs=self.settings.epochs,
            accelerator=self.settings.accelerator,
            precision=self.settings.precision,
            gradient_clip_val=1.0,
            callbacks=[StopAtSignal(), LoopProgressLines(), *callbacks],
            logger=logger,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=not self.settings.quiet,
            # Nothing depends on the validation loss, so validate once, at the end.
            check_val_every_n_epoch=self.settings.epochs,
            num_sanity_val_steps=0,
            default_root_dir=str(self.output),
            **trainer_options(self.settings),
            **options,
        )

    def say(self, what: str) -> None:
        """Print a line on rank zero."""
        if is_rank_zero():
            print(f"[seed {self.seed}] {what}", flush=True)
