"""Report of the comparison: Markdown, JSON, and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from bmoe_lightning.metrics import Estimate
from bmoe_lightning.report import library_versions
from recipes.common.report_parts import Section, markdown_table, write_sections
from recipes.generation.comparison import MEASURES, ScoreValue, TaskComparison
from recipes.generation.experiment import ScoredAnswers
from recipes.generation.settings import GenerationSettings

TITLE = "Which score finds wrong answers in generated text"
LABELS: Mapping[str, str] = {
    "sequence_probability": "Sequence probability",
    "length_normalised": "Sequence probability for each token",
    "token_entropy": "Mean token entropy",
    "posterior_variance": "Variance under the posterior",
    "isotropic_variance": "Isotropic variance",
    "variance_ratio": "Posterior over isotropic variance",
    "lower_bound": "Sequence probability and standard deviation",
}
"""Display names of the scores."""

_INTRODUCTION = """\
Small mixtures of experts answer generated questions in text, greedily, and each answer gets the scores below, of which
higher is more uncertain. PRR is the prediction rejection ratio with right = 1 and wrong = 0: 1 for the best order, 0
for a random one. AUROC is that of wrong answers (positive) against right ones: .5 for a random order. Both are means
over seeds, with a 95 % interval over new questions and new seeds. Differences are to the sequence probability, paired
by question and seed; each interval is about one difference, without a correction for their number."""


def write_report(
    answers: Sequence[ScoredAnswers], comparisons: Sequence[TaskComparison], settings: GenerationSettings
) -> Path:
    """Write `report.md`, `results.json` and the events of TensorBoard; returns the report.

    Args:
        answers: Scored answers of all tasks and seeds.
        comparisons: What was made from them.
        settings: Options of the run.
    """
    output = Path(settings.output_dir)
    title = f"DRY RUN, the numbers mean nothing: {TITLE}" if settings.dry_run else TITLE
    sections = [_section(found, [a for a in answers if a.task == found.task]) for found in comparisons]
    content = {"settings": asdict(settings), "versions": library_versions(), "comparisons": _plain(comparisons)}
    report, *_ = write_sections(output, title, _INTRODUCTION, sections, content)
    _write_events(output / "tensorboard", comparisons, report.read_text(encoding="utf-8"))
    return report


def comparison_table(found: TaskComparison) -> str:
    """The table of a task in Markdown."""
    head = ["score"]
    for measure in MEASURES.values():
        head += [measure.title, f"{measure.title} less the baseline's"]
    rows = [
        [label, *(cell for measure in MEASURES for cell in _cells(found.values[name][measure]))]
        for name, label in LABELS.items()
    ]
    return markdown_table(head, rows)


def verdict(found: TaskComparison) -> str:
    """What the differences to the baseline decide, in sentences."""
    sentences = []
    for measure, of_measure in MEASURES.items():
        by_verdict: dict[str, list[str]] = {}
        for name, label in LABELS.items():
            by_verdict.setdefault(found.values[name][measure].verdict, []).append(label.lower())
        parts = [f"{kind}: {', '.join(by_verdict[kind])}" for kind in ("better", "worse") if kind in by_verdict]
        if undecided := by_verdict.get("no difference is decided"):
            parts.append(f"no difference is decided for {', '.join(undecided)}")
        sentences.append(f"By {of_measure.title}, against the sequence probability: {'; '.join(parts)}.")
    gains = [
        f"{of_measure.title} {_interval(found.curvature[name], signed=True)}" for name, of_measure in MEASURES.items()
    ]
    sentences.append(f"The variance under the posterior less the isotropic variance: {', '.join(gains)}.")
    return " ".join(sentences)


def _section(found: TaskComparison, answers: Sequence[ScoredAnswers]) -> Section:
    accuracy = ", ".join(f"{100 * value:.0f} %" for value in found.accuracy)
    introduction = (
        f"{found.num_questions} questions, {len(found.seeds)} seed{'s' * (len(found.seeds) > 1)}; right answers: "
        f"{accuracy}."
    )
    examples = [[a["prompt"], a["answer"], a["written"]] for a in answers[0].description["answers"]]
    shown = markdown_table(["prompt", "right answer", f"written (seed {answers[0].seed})"], examples)
    text = (introduction, comparison_table(found), verdict(found), shown)
    return Section(found.task.capitalize(), text=text)


def _cells(value: ScoreValue) -> list[str]:
    if value.difference is None:
        return [_interval(value.estimate, upper=1.0), ""]
    return [_interval(value.estimate, upper=1.0), _interval(value.difference, signed=True)]


def _interval(found: Estimate, *, upper: float = float("inf"), signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (f"{number:{sign}.3f}" for number in (found.value, found.low, min(found.high, upper)))
    return f"{value} [{low}, {high}]"


def _plain(comparisons: Sequence[TaskComparison]) -> list[dict[str, Any]]:
    return [
        {
            **asdict(found),
            "values": {
                name: {measure: {**asdict(value), "verdict": value.verdict} for measure, value in values.items()}
                for name, values in found.values.items()
            },
        }
        for found in comparisons
    ]


def _write_events(folder: Path, comparisons: Sequence[TaskComparison], report: str) -> None:
    """One sub-run a score, with the value of each seed; those of an earlier report are replaced."""
    for path in folder.glob("**/events.out.tfevents.*"):
        path.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("report", report)
    for name in dict.fromkeys(name for found in comparisons for name in found.values):
        with SummaryWriter(str(folder / name)) as writer:
            for found in comparisons:
                for measure, value in found.values[name].items():
                    for seed, of_seed in zip(found.seeds, value.by_seed, strict=True):
                        writer.add_scalar(f"{found.task}/{measure}", of_seed, seed)
