import dataclasses
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import plugin_data_pb2

from bmoe_lightning.metrics import METRIC_NAMES, accuracy
from bmoe_lightning.report import tensorboard as T
from bmoe_lightning.report.figures import pooled_curve, well_filled
from bmoe_lightning.report.results import SummarySettings, by_method, summarise

SETTINGS = SummarySettings(num_samples=50)
SCORES = {f"test/{name}" for name in METRIC_NAMES}
CURVES = {"reliability/accuracy_by_confidence", "reliability/gap_by_confidence", "selective/risk"}


@pytest.fixture
def written(results, tmp_path):
    rows = summarise(results, SETTINGS)
    T.write_tensorboard(
        tmp_path,
        results,
        rows,
        hyperparameters={"rank": 10, "task": "small", "exact": True},
        step=40,
    )
    return rows, tmp_path


def read(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return events


def hparams_of(events, tag):
    content = events.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_runs_are_the_parent_and_one_a_method(written):
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(written[1]))
    multiplexer.Reload()
    assert set(multiplexer.Runs()) == {".", "map", "temperature", "laplace_evidence"}
    assert sorted(path.name for path in written[1].iterdir() if path.is_dir()) == [
        "laplace_evidence",
        "map",
        "temperature",
    ]


def test_every_method_has_the_same_tags_with_its_scores_at_the_step(written):
    rows, folder = written
    for row in rows:
        events = read(folder / row.method)
        assert set(events.Tags()["scalars"]) == SCORES | CURVES
        for name, metric in row.metrics.items():
            (event,) = events.Scalars(f"test/{name}")
            assert event.step == 40
            assert event.value == pytest.approx(metric.mean, rel=1e-6)
        assert events.Tags()["images"] == []


def test_calibration_curves_have_confidence_in_percent_as_step(written, results):
    rows, folder = written
    curve = well_filled(pooled_curve(by_method(results)["map"], rows[0]))
    filled = (curve.count > 0).nonzero().flatten().tolist()
    events = read(folder / "map")
    points = events.Scalars("reliability/accuracy_by_confidence")
    assert [p.step for p in points] == [round((b + 0.5) / 15 * 100) for b in filled]
    assert [p.value for p in points] == pytest.approx(curve.accuracy[filled].tolist(), rel=1e-6)
    gaps = [p.value for p in events.Scalars("reliability/gap_by_confidence")]
    assert gaps == pytest.approx((curve.accuracy - curve.confidence)[filled].tolist(), abs=1e-6)


def test_risk_has_coverage_in_percent_as_step_and_ends_in_the_error_rate(written, results):
    points = read(written[1] / "map").Scalars("selective/risk")
    assert [p.step for p in points] == list(range(5, 101, 5))
    mean = torch.stack([accuracy(r.log_probs, r.target) for r in by_method(results)["map"]]).mean()
    assert points[-1].value == pytest.approx(1 - mean.item(), abs=1e-6)


def test_hparams_row_of_every_method_once_and_with_the_columns_of_all(written):
    rows, folder = written
    for row in rows:
        events = read(folder / row.method)
        start = hparams_of(events, "_hparams_/session_start_info").session_start_info.hparams
        values = {key: value.string_value or value.number_value for key, value in start.items()}
        expected = {"method": row.method, "rank": 10.0, "task": "small", "exact": "true"}
        if row.method == "laplace_evidence":
            expected["num_samples"] = 100.0
        assert values == expected
        experiment = hparams_of(events, "_hparams_/experiment").experiment
        assert {info.name for info in experiment.hparam_infos} == {"method", "rank", "task", "exact", "num_samples"}
        assert {info.name.tag for info in experiment.metric_infos} == SCORES
        status = hparams_of(events, "_hparams_/session_end_info").session_end_info.status
        assert status == 1  # success
        assert not [path for path in (folder / row.method).iterdir() if path.is_dir()]
        assert len(list((folder / row.method).iterdir())) == 1


def test_options_of_a_method_win_over_shared_settings(make_result, tmp_path):
    results = [make_result("map", 0), make_result("temperature", 0, hyperparameters={"rank": 4})]
    T.write_tensorboard(tmp_path, results, summarise(results, SETTINGS), hyperparameters={"rank": 10})
    ranks = {}
    for method in ("map", "temperature"):
        start = hparams_of(read(tmp_path / method), "_hparams_/session_start_info").session_start_info
        ranks[method] = start.hparams["rank"].number_value
    assert ranks == {"map": 10, "temperature": 4}


def test_parent_has_comparison_first_table_note_and_diagrams_and_no_scores(written):
    rows, folder = written
    events = read(folder)
    tags = events.Tags()
    assert tags["scalars"] == []
    assert tags["images"] == ["best_method/nll", "reliability/all_methods"]
    assert min([*tags["images"], *SCORES, *CURVES, *(f"{row.method}/test/nll" for row in rows)]) == tags["images"][0]
    assert set(tags["tensors"]) == {"results/text_summary", "how_to_read/text_summary"}
    text = events.Tensors("results/text_summary")[0].tensor_proto.string_val[0].decode()
    nll = rows[0].metrics["nll"]
    assert f"{nll.mean:.3f}\u00a0±\u00a0{nll.std:.3f}" in text
    assert f"[{nll.low:.3f},\u00a0{nll.high:.3f}]" in text
    assert text.startswith("| method | ACC ↑ |")
    note = events.Tensors("how_to_read/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(tag in note for tag in CURVES)


def test_without_matplotlib_one_warning_and_no_images(results, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(T, "matplotlib_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        T.write_tensorboard(tmp_path, results, summarise(results, SETTINGS), hyperparameters={})
    assert [record.message for record in caplog.records if "the extra plots" in record.message]
    assert len(caplog.records) == 1
    assert read(tmp_path).Tags()["images"] == []
    assert read(tmp_path / "map").Tags()["images"] == []
    assert set(read(tmp_path / "map").Tags()["scalars"]) == SCORES | CURVES


def test_refusals(results, tmp_path):
    rows = summarise(results, SETTINGS)
    with pytest.raises(ValueError, match="summarise"):
        T.write_tensorboard(tmp_path, results, rows[:1], hyperparameters={})
    assert not list(tmp_path.iterdir())


def test_warnings_are_in_the_text(results, tmp_path):
    marked = [dataclasses.replace(result, warnings=("at a bound; add labels",)) for result in results]
    T.write_tensorboard(tmp_path, marked, summarise(marked, SETTINGS))
    text = read(tmp_path).Tensors("results/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| MAP ¹ |" in text
    assert "¹ at a bound; add labels" in text


def test_a_comparison_that_was_killed_between_its_runs_is_one(written, results):
    """The sub-runs of methods are written before that of the page."""
    rows, folder = written
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    assert T.has_comparison(folder)
    with pytest.raises(ValueError, match="has a comparison already"):
        T.write_tensorboard(folder, results, rows)


def test_a_second_comparison_in_a_folder_is_refused(written, results):
    rows, folder = written
    with pytest.raises(ValueError, match=r"has a comparison already, .* pass another log_dir"):
        T.write_tensorboard(folder, results, rows)
    assert not T.has_comparison(folder / "elsewhere")
