"""Options of the comparison; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from recipes.common.cli import UsageError, check_bounds, option

TASKS = ("addition", "recall")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Options of `python -m recipes.generation`.

    Raises:
        UsageError: If a value is out of range, or a task is not known.
    """

    output_dir: str = option("runs/generation", "output folder; answers found there are not generated again")
    tasks: tuple[str, ...] = option(TASKS, "generated tasks, separated by commas")
    seeds: int = option(3, "number of seeds, each with a model of its own", least=1)
    first_seed: int = option(0, "first seed", least=0)
    steps: int = option(600, "training steps of each model", least=1)
    questions: int = option(400, "test questions of each task", least=2)
    rank: int = option(10, "eigenpairs of each Kronecker factor", least=1)
    fisher: Literal["mc", "empirical"] = option(
        "mc",
        "answers of the curvature: sampled from the model after the training prompts, or those of the training data",
    )
    num_samples: int = option(1000, "bootstrap resamples", least=1)
    dry_run: bool = option(False, "checks that everything runs, with meaningless numbers")
    quiet: bool = option(False, "no progress bars")

    def __post_init__(self) -> None:
        check_bounds(self)
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise UsageError(f"--tasks must be some of {', '.join(TASKS)}, got {','.join(self.tasks) or 'none'}")
        if len(set(self.tasks)) < len(self.tasks):
            raise UsageError(f"--tasks names one twice: {','.join(self.tasks)}")

    def resolved(self) -> GenerationSettings:
        """The options of the run: those of a dry run are small."""
        return replace(self, steps=2, questions=12, num_samples=20) if self.dry_run else self

    def of_answers(self) -> dict[str, Any]:
        """The options that answers and scores depend on."""
        names = ("steps", "questions", "rank", "fisher")
        return {name: value for name, value in asdict(self).items() if name in names}
