"""The report of a study: tables in the layout of papers, figures, and which differences are real."""

from recipes.paper.report.attribution import Attributed
from recipes.paper.report.costs import Cost, Costs, Timing
from recipes.paper.report.write import write_report

__all__ = ["Attributed", "Cost", "Costs", "Timing", "write_report"]
