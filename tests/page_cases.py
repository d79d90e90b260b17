"""The blocks of docs/integrations.md, which its tests run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
METHODS = ("map", "temperature", "laplace_lpo")


def block(heading, language, containing=""):
    """A block of the page, below a heading."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    [code] = [code for code in found if containing in code]
    return code
