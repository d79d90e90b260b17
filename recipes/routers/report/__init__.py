"""The report of a study of routers: one table for each question of the papers, and what its controls say."""

from recipes.routers.report.section import RouterReport
from recipes.routers.report.write import write_report

__all__ = ["RouterReport", "write_report"]
