"""Comparison of several methods: table, files, figures and TensorBoard."""

from bmoe_lightning.report.attribution import AttributionMap, attribution_figure, attribution_map
from bmoe_lightning.report.differences import Difference, Paired, SeedValues, paired_difference, seed_difference
from bmoe_lightning.report.figures import (
    LabelBudgetPoint,
    comparison_figure,
    label_budget_figure,
    matplotlib_available,
    reliability_figure,
    reliability_panels,
    save_figure,
    write_figures,
)
from bmoe_lightning.report.files import library_versions, write_results
from bmoe_lightning.report.grid import Cell, Grid, GridBlock, GridRow, NumberFormat, grid_json, grid_markdown
from bmoe_lightning.report.latex import grid_latex
from bmoe_lightning.report.results import MethodResult, MetricSummary, Row, SummarySettings, summarise
from bmoe_lightning.report.router_figures import score_figure, stability_figure
from bmoe_lightning.report.styles import MethodStyle, method_styles
from bmoe_lightning.report.table import results_markdown, results_table
from bmoe_lightning.report.tensorboard import has_comparison, write_tensorboard

__all__ = [
    "AttributionMap",
    "Cell",
    "Difference",
    "Grid",
    "GridBlock",
    "GridRow",
    "LabelBudgetPoint",
    "MethodResult",
    "MethodStyle",
    "MetricSummary",
    "NumberFormat",
    "Paired",
    "Row",
    "SeedValues",
    "SummarySettings",
    "attribution_figure",
    "attribution_map",
    "comparison_figure",
    "grid_json",
    "grid_latex",
    "grid_markdown",
    "has_comparison",
    "label_budget_figure",
    "library_versions",
    "matplotlib_available",
    "method_styles",
    "paired_difference",
    "reliability_figure",
    "reliability_panels",
    "results_markdown",
    "results_table",
    "save_figure",
    "score_figure",
    "seed_difference",
    "stability_figure",
    "summarise",
    "write_figures",
    "write_results",
    "write_tensorboard",
]
