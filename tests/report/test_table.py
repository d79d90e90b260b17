import dataclasses
import math

import pytest

from bmoe_lightning.metrics import get_metric
from bmoe_lightning.report.results import MetricSummary, SummarySettings, summarise
from bmoe_lightning.report.table import _best, caption, results_markdown, results_table

SETTINGS = SummarySettings(num_samples=200)


def row_with(row, **metrics):
    return dataclasses.replace(row, metrics={**row.metrics, **metrics})


def test_single_seed_table_is_aligned_with_one_line_a_method(one_seed):
    rows = summarise(one_seed, SETTINGS)
    lines = results_table(rows).splitlines()
    assert lines[0].split() == ["method", "ACC", "↑", "ECE", "↓", "NLL", "↓", "Brier", "↓"]
    assert lines[2].startswith("MAP ")
    assert len({len(line) for line in lines[:6]}) == 1
    nll = rows[0].metrics["nll"]
    assert f"{nll.mean:.3f} [{nll.low:.3f}, {nll.high:.3f}]" in lines[2]
    assert max(map(len, lines)) <= 120


def test_too_wide_tables_put_the_interval_below(results):
    rows = summarise(results, SETTINGS)
    wide = results_table(rows, width=200).splitlines()
    narrow = results_table(rows, width=100).splitlines()
    assert wide[2].count("[") == 4
    assert wide[2].count("±") == 4
    assert narrow[2].count("±") == 4
    assert narrow[2].count("[") == 0
    assert narrow[3].count("[") == 4
    assert narrow[3].startswith(" ")
    assert max(map(len, narrow)) <= 100


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_long_label_is_cut_to_the_width(results, width):
    rows = [dataclasses.replace(row, label="A very long name " * 8) for row in summarise(results, SETTINGS)]
    text = results_table(rows, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" in text


def test_infinite_nll_is_shown(one_seed):
    rows = summarise(one_seed, SETTINGS)
    rows[0] = row_with(rows[0], nll=MetricSummary(math.inf, None, 1.0, math.inf))
    assert "inf [1.000, inf]" in results_table(rows)


def test_caption_states_the_conventions(results, one_seed):
    text = caption(summarise(one_seed, SETTINGS))
    assert text.startswith("60 test items, 1 seed (0). ECE: top-label confidence, 15 equal-width bins (lo, hi],")
    assert "NLL in nats" in text
    assert "95 % centred percentile bootstrap over test items, 200 resamples" in text
    assert "±" not in text
    assert "2 seeds (0, 1)" in caption(summarise(results, SETTINGS))
    assert "standard deviation over seeds" in caption(summarise(results, SETTINGS))
    assert "1 or 2 seeds (not the same for every method)" in caption(summarise(results[:-1], SETTINGS))


def test_markdown_marks_the_best_as_printed_and_shows_extra(results):
    rows = summarise(results, SETTINGS)
    rows = [
        row_with(row, nll=MetricSummary(nll, 0.1, 0.0, 2.0), acc=MetricSummary(acc, 0.1, 0.0, 1.0))
        for row, nll, acc in zip(rows, (0.7000, 0.7001, 0.9), (0.5, 0.6, 0.7), strict=True)
    ]
    lines = results_markdown(rows).splitlines()
    assert lines[0] == "| method | ACC ↑ | ECE ↓ | NLL ↓ | Brier ↓ |"
    assert "**0.700 ± 0.100** [0.000, 2.000]" in lines[2]
    assert "**0.700 ± 0.100**" in lines[3]
    assert "**0.900" not in lines[4]
    assert "**0.700 ± 0.100** [0.000, 1.000]" in lines[4]  # highest accuracy
    assert "**0.500" not in lines[2]
    assert "| method | temperature |" in lines
    assert "| Temperature scaling | 2.5 |" in lines
    assert "| MAP |  |" in lines
    assert lines[-1].endswith("Bold: best mean.")


def test_markdown_escapes_bars_and_has_no_bold_alone(one_seed):
    rows = [dataclasses.replace(summarise(one_seed, SETTINGS)[0], label="a|b")]
    text = results_markdown(rows)
    assert "| a\\|b |" in text
    assert "**" not in text


def test_refusals(one_seed):
    with pytest.raises(ValueError, match="no rows"):
        results_table([])
    with pytest.raises(ValueError, match="80 columns"):
        results_table(summarise(one_seed, SETTINGS), width=60)


DOUBT = "the fitted temperature is at the end of its range; add labels"


def test_warnings_are_marks_and_footnotes(one_seed):
    marked = [dataclasses.replace(one_seed[0], warnings=(DOUBT,)), *one_seed[1:]]
    marked[2] = dataclasses.replace(one_seed[2], warnings=("another | one", DOUBT))
    rows = summarise(marked, SETTINGS)
    text, markdown = results_table(rows), results_markdown(rows)
    labels = [line[:30] for line in text.splitlines()[2:5]]
    assert labels[0].startswith("MAP ¹ ")
    assert "¹" not in labels[1]
    assert "(evidence) ² ¹" in labels[2]
    assert text.splitlines()[-2:] == [f"¹ {DOUBT}", "² another | one"]
    assert "| MAP ¹ |" in markdown
    assert markdown.endswith(f"\n\n¹ {DOUBT}\n\n² another \\| one\n")


def test_warnings_that_differ_in_numbers_alone_share_a_footnote(one_seed):
    first, second = (f"seed {n}: rank {n} discards {n}1% (in layer {n}); use more" for n in (0, 2))
    marked = [dataclasses.replace(row, warnings=(first, second)) for row in summarise(one_seed, SETTINGS)[:2]]
    text = results_table(marked)
    assert text.count("¹") == 3
    assert "²" not in text
    assert "¹ seeds 0, 2: rank 0 discards 01% (in layer 0); use more (the numbers are those of the first)" in text


def test_rows_without_warnings_have_no_footnotes(one_seed):
    rows = summarise(one_seed, SETTINGS)
    assert not set("¹²³") & set(results_table(rows) + results_markdown(rows))


def test_a_warning_of_some_seeds_says_which(results):
    marked = [dataclasses.replace(result, warnings=(DOUBT,) if result.seed == 1 else ()) for result in results]
    assert summarise(marked, SETTINGS)[0].warnings == (f"seed 1: {DOUBT}",)
    both = [dataclasses.replace(result, warnings=(DOUBT,)) for result in results]
    assert summarise(both, SETTINGS)[0].warnings == (DOUBT,)


def test_a_label_that_is_cut_keeps_its_mark_and_footnotes_are_wrapped(one_seed):
    rows = summarise(one_seed, SETTINGS)
    rows[0] = dataclasses.replace(rows[0], label="A very long name" * 8, warnings=(DOUBT * 3,))
    text = results_table(rows, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "… ¹ " in text
    assert text.splitlines()[-3].startswith("¹ the fitted")


def test_further_metrics_are_a_second_table(results):
    settings = SummarySettings(num_samples=50, further=("nll_refinement", "aurc"))
    rows = summarise(results, settings)
    lines = results_markdown(rows).splitlines()
    at = lines.index("| method | NLL refinement ↓ | AURC ↓ |")
    found = rows[0].metrics["nll_refinement"]
    assert f"| MAP | {found.mean:.3f} ± {found.std:.3f} [{found.low:.3f}, {found.high:.3f}] |" in lines[at + 2]
    assert lines[0] == "| method | ACC ↑ | ECE ↓ | NLL ↓ | Brier ↓ |"
    assert results_table(rows) == results_table(summarise(results, SummarySettings(num_samples=50)))


def test_a_metric_without_an_order_has_neither_arrow_nor_best(results):
    settings = SummarySettings(num_samples=20, further=("set_size_aps", "set_coverage_aps"))
    rows = summarise(results, settings)
    assert "| method | Set size APS ↓ | Set coverage APS |" in results_markdown(rows)
    assert _best(rows, get_metric("set_coverage_aps")) is None
    assert _best(rows, get_metric("set_size_aps")) is not None
