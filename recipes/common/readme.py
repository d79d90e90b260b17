"""Put a run's table and figures into the README, so that no number in it is typed by hand.

python -m recipes.common.readme --output-dir runs/qwen_obqa
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FIGURES = ("reliability.png", "label_budget.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite README.md and recipes/figures from a finished run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.common.readme", description=__doc__)
    parser.add_argument("--output-dir", default="runs/qwen_obqa", help="of the run (default: %(default)s)")
    run = Path(parser.parse_args(arguments).output_dir)
    if not (run / "results.md").is_file():
        print(f"error: {run} holds no finished run", file=sys.stderr)
        return 1
    text = README.read_text(encoding="utf-8")
    text = between(text, "results", scores((run / "results.md").read_text(encoding="utf-8")))
    text = between(text, "label budget", budget_table(json.loads((run / "label_budget.json").read_text("utf-8"))))
    README.write_text(text, encoding="utf-8")
    for name in FIGURES:
        shutil.copyfile(run / "figures" / name, ROOT / "recipes" / "figures" / name)
    return 0


def scores(results: str) -> str:
    """The table of scores and its caption; without the fitted numbers, and without bold type inside the intervals."""
    table, *_, caption = results.strip().split("\n\n")
    return f"{table}\n\n{caption}".replace("**", "").replace(" Bold: best mean.", "")


def between(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: unless the text has exactly one such place.
    """
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    new, count = pattern.subn(lambda m: f"{m[1]}\n{content.strip()}\n\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"README.md must have one place marked {name!r}, found {count}")
    return new


def budget_table(points: Sequence[dict[str, object]]) -> str:
    """Median test NLL by method and number of labels, as markdown."""
    budgets = list(dict.fromkeys(point["num_labels"] for point in points))
    cells = {(point["label"], point["num_labels"]): f"{point['median']:.3f}" for point in points}
    head = ["NLL ↓ with n labels", *("all" if budget is None else str(budget) for budget in budgets)]
    lines = [head, ["---"] * len(head)]
    lines += [
        [str(label), *(cells[label, budget] for budget in budgets)]
        for label in dict.fromkeys(point["label"] for point in points)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
