"""Generate the sections of README and documentation that hold numbers, from a run or from a command's output.

A place is a generated section: the text between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.common.cli import UsageError, command, option, parse

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS_PAGE = ROOT / "docs" / "reading_the_results.md"
FIGURES = ("reliability.png", "label_budget.png")
DESCRIPTION = """\
Put numbers into the README and the documentation, between `<!-- NAME -->` and `<!-- end of NAME -->`.

  python -m recipes.common.readme --output-dir runs/qwen_obqa
      a run's figures, its table of scores (README: without intervals) and NLL by number of labels
  COMMAND | python -m recipes.common.readme --page docs/PAGE.md --place NAME
      the output of a command
"""


@dataclass(frozen=True)
class ReadmeSettings:
    """Source and target of the generated sections."""

    output_dir: str = option("runs/qwen_obqa", "folder of a finished run")
    page: str | None = option(None, "markdown file that takes the standard input instead; needs --place")
    place: str | None = option(None, "name of the place in --page")

    def __post_init__(self) -> None:
        if (self.page is None) != (self.place is None):
            raise UsageError("--page and --place belong together; give both or neither")


@command
def main(arguments: Sequence[str]) -> int:
    """Fill the places; returns the exit status: 0, 1 (failed, with the reason on stderr) or 2 (wrong usage)."""
    settings = parse(ReadmeSettings, arguments, program="python -m recipes.common.readme", description=DESCRIPTION)
    try:
        if settings.page is None or settings.place is None:
            _fill_readme(Path(settings.output_dir))
        else:
            fill(Path(settings.page), settings.place, sys.stdin.read())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fill(page: Path, place: str, content: str) -> None:
    """Replace the content of a place in a markdown file.

    Args:
        page: Markdown file.
        place: Name of the place.
        content: New text.

    Raises:
        OSError: If the file cannot be read or written.
        ValueError: If the content is empty, or the file does not have exactly one place of that name.
    """
    if not content.strip():
        raise ValueError(f"there is nothing to put at {place!r}; check the command, {page} is unchanged")
    try:
        text = between(page.read_text(encoding="utf-8"), place, content)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    page.write_text(text, encoding="utf-8")


def between(text: str, name: str, content: str) -> str:
    """Replace the text between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: If the text does not have exactly one such place.
    """
    pattern = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    new, count = pattern.subn(lambda m: f"{m[1]}\n{content.strip()}\n\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"there must be one place marked `<!-- {name} -->`, found {count}")
    return new


def scores(results: str) -> str:
    """The table of metrics and its caption, without the table of fitted numbers, notes and bold type."""
    table, *others = results.strip().split("\n\n")
    caption = next(other for other in others if not other.startswith("|"))
    return f"{table}\n\n{caption}".replace("**", "").replace(" Bold: best mean.", "")


def budget_table(points: Sequence[dict[str, object]]) -> str:
    """Markdown table of the median test NLL by method and number of labels."""
    budgets = list(dict.fromkeys(point["num_labels"] for point in points))
    cells = {(point["label"], point["num_labels"]): f"{point['median']:.3f}" for point in points}
    head = ["NLL ↓ with n labels", *("all" if budget is None else str(budget) for budget in budgets)]
    lines = [head, ["---"] * len(head)]
    lines += [
        [str(label), *(cells[label, budget] for budget in budgets)]
        for label in dict.fromkeys(point["label"] for point in points)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_short(table: str) -> str:
    """A table of metrics and its caption without the intervals."""
    return re.sub(r" In brackets[^.]*\.", "", re.sub(r" \[[-\d.]+, [-\d.]+\]", "", table))


def models(run: Path) -> str:
    """A sentence with the hashes of the pre-trained weights of a run's seeds; empty if the run has none."""
    hashes = json.loads((run / "results.json").read_text("utf-8"))["config"].get("pretrained_weights", {})
    if not hashes or not all(hashes.values()):
        return ""
    return f" Pre-trained weights of the seeds: {', '.join(hashes.values())}."


def _fill_readme(run: Path) -> None:
    """Update the results in README and documentation, and `recipes/figures`, from a finished run."""
    if not (run / "results.md").is_file():
        raise ValueError(f"{run} holds no finished run; give its folder as --output-dir")
    table = scores((run / "results.md").read_text(encoding="utf-8")) + models(run)
    fill(README, "results", in_short(table))
    fill(RESULTS_PAGE, "results", table)
    fill(RESULTS_PAGE, "label budget", budget_table(json.loads((run / "label_budget.json").read_text("utf-8"))))
    for name in FIGURES:
        shutil.copyfile(run / "figures" / name, ROOT / "recipes" / "figures" / name)


if __name__ == "__main__":
    sys.exit(main())
