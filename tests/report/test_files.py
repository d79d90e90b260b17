import csv
import dataclasses
import json
import math
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bmoe_lightning.metrics import negative_log_likelihood
from bmoe_lightning.report import files
from bmoe_lightning.report.results import SummarySettings, summarise
from bmoe_lightning.report.table import results_markdown

SETTINGS = SummarySettings(num_samples=100)


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def written(results, tmp_path):
    rows = summarise(results, SETTINGS)
    config = {"rank": 10, "path": Path("a/b"), "nested": {"lr": 1e-4, "list": (1, 2)}}
    paths = files.write_results(tmp_path / "new" / "run", results, rows, config=config)
    return results, rows, paths


def test_names_and_no_leftovers(written, tmp_path):
    folder = tmp_path / "new" / "run"
    assert sorted(path.name for path in folder.iterdir()) == sorted(written[2])
    assert sorted(written[2]) == ["predictions.jsonl", "results.csv", "results.json", "results.md"]


def test_json(written):
    results, rows, paths = written
    content = strict(paths["results.json"].read_text())
    assert content["config"] == {"rank": 10, "path": "a/b", "nested": {"lr": 1e-4, "list": [1, 2]}}
    assert content["versions"]["torch"] == metadata.version("torch")
    assert set(content["versions"]) == {
        "python",
        "torch",
        "lightning",
        "transformers",
        "torchmetrics",
        "bmoe_lightning",
    }
    assert content["ece_convention"].startswith("top-label confidence, 15 equal-width bins (lo, hi]")
    assert content["num_examples"] == 60
    assert [row["method"] for row in content["rows"]] == ["map", "temperature", "laplace_evidence"]
    assert content["rows"][0]["nll"]["low"] == rows[0].metrics["nll"].low
    assert content["rows"][1]["extra"] == {"temperature": 2.5}
    assert [row["hyperparameters"] for row in content["rows"]] == [{}, {}, {"num_samples": 100}]
    assert [(run["method"], run["seed"]) for run in content["runs"]] == [(r.method, r.seed) for r in results]
    for run, result in zip(content["runs"], results, strict=True):
        assert run["nll"] == pytest.approx(negative_log_likelihood(result.log_probs, result.target).item())


def test_csv(written):
    _, rows, paths = written
    with paths["results.csv"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["label"] for line in lines] == [row.label for row in rows]
    assert float(lines[2]["ece_high"]) == rows[2].metrics["ece"].high
    assert lines[0]["num_seeds"] == "2"
    assert [line["temperature"] for line in lines] == ["", "2.5", ""]


def test_markdown(written):
    assert written[2]["results.md"].read_text() == results_markdown(written[1])


def test_predictions_can_be_read_back(written):
    results, _, paths = written
    lines = [strict(line) for line in paths["predictions.jsonl"].read_text().splitlines()]
    assert len(lines) == sum(len(result.ids) for result in results)
    own = [line for line in lines if line["method"] == "temperature" and line["seed"] == 1]
    result = next(r for r in results if r.method == "temperature" and r.seed == 1)
    assert tuple(line["id"] for line in own) == result.ids
    values = torch.tensor(
        [[-math.inf if v is None else v for v in line["log_probs"]] for line in own], dtype=torch.float64
    )
    assert torch.equal(values, result.log_probs)
    assert torch.equal(torch.tensor([line["label"] for line in own]), result.target)
    assert own[0]["log_probs"][3] is None
    assert set(own[0]) == {"id", "method", "seed", "label", "log_probs"}


def test_infinite_nll_is_written_as_valid_json(make_result, tmp_path):
    result = make_result("map", 0)
    result.log_probs[1] = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    result.target[1] = 1
    with pytest.warns(UserWarning, match="infinite"):
        rows = summarise([result], SETTINGS)
    with pytest.warns(UserWarning, match="infinite"):
        paths = files.write_results(tmp_path, [result], rows, config={})
    assert strict(paths["results.json"].read_text())["rows"][0]["nll"]["mean"] == "inf"


def test_given_versions_are_kept(one_seed, tmp_path):
    paths = files.write_results(tmp_path, one_seed, summarise(one_seed, SETTINGS), config={}, versions={"a": "1"})
    assert strict(paths["results.json"].read_text())["versions"] == {"a": "1"}


def test_a_missing_library_is_named():
    versions = files.library_versions(("torch", "no-such-library"))
    assert versions["no_such_library"] == "not installed"
    assert set(versions) == {"python", "torch", "no_such_library"}


def test_details_of_the_run_and_notes(one_seed, tmp_path):
    rows = summarise(one_seed, SETTINGS)
    paths = files.write_results(
        tmp_path, one_seed, rows, config={}, details={"curvatures": [{"total": math.inf}]}, notes=["Half | is lost."]
    )
    assert strict(paths["results.json"].read_text())["curvatures"] == [{"total": "inf"}]
    assert paths["results.md"].read_text() == results_markdown(rows) + "\nHalf \\| is lost.\n"


def test_rows_of_other_results_are_refused(results, tmp_path):
    rows = summarise(results[:3], SETTINGS)
    with pytest.raises(ValueError, match="call summarise on these results"):
        files.write_results(tmp_path, results, rows, config={})


def test_config_that_is_not_json_is_refused_before_anything_is_written(one_seed, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_results(tmp_path, one_seed, summarise(one_seed, SETTINGS), config={"f": print})
    assert not list(tmp_path.iterdir())


def test_json_has_the_warnings_of_rows_and_runs(results, tmp_path):
    marked = [dataclasses.replace(r, warnings=("at a bound; add labels",) if r.seed else ()) for r in results]
    paths = files.write_results(tmp_path, marked, summarise(marked, SETTINGS), config={})
    content = strict(paths["results.json"].read_text())
    assert content["rows"][0]["warnings"] == ["seed 1: at a bound; add labels"]
    assert {run["seed"]: run["warnings"] for run in content["runs"]} == {0: [], 1: ["at a bound; add labels"]}
