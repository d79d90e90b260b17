"""Measuring costs, on a model with random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.paper import costs
from recipes.paper.costs import measure_costs, outstanding_costs
from recipes.paper.report import Cost, Timing
from recipes.paper.stored_costs import COSTS_FILE, read_costs, write_costs

METHODS = ("map", "deep_ensemble", "laplace_mixture", "laplace_lpo")


@pytest.fixture(scope="module")
def study(finished_run):
    """A finished run, its measured costs, and the files before and after these were measured."""
    output, run = finished_run
    before = files(output)
    measure(output, run)
    return output, run, before, files(output)


@pytest.fixture
def measured(monkeypatch):
    """The methods that are measured, with made-up costs."""
    names = []

    def record(run, methods, done):
        names.extend(method.name for method in methods)
        for method in methods:
            done(method, Cost(predict=Timing((1.0,), (1.0,))))

    monkeypatch.setattr(costs, "_measure_run", record)
    return names


@pytest.fixture
def stored(study):
    """The stored costs, restored afterwards."""
    output, run, _, _ = study
    content = (output / COSTS_FILE).read_bytes()
    yield output, run, list(read_costs(output).entries)
    (output / COSTS_FILE).write_bytes(content)


def measure(output, run):
    """Measure what is outstanding."""
    outstanding = outstanding_costs(output, {"experts": run})
    if outstanding:
        measure_costs(output, {"experts": run}, outstanding)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_method_has_costs_and_no_other_file_changes(study):
    output, _, before, after = study
    assert after.keys() - before.keys() == {COSTS_FILE}
    assert before == {name: content for name, content in after.items() if name != COSTS_FILE}
    rows = read_costs(output).shown().rows
    assert tuple(rows) == METHODS
    assert all(row.predict and row.predict_bytes and row.latency for row in rows.values())
    assert all(len(row.predict.reference) == 3 and min(row.latency.reference) > 0 for row in rows.values())
    reference, ensemble, mixture, posterior = (rows[name] for name in METHODS)
    assert {row.reference_bytes for row in rows.values()} == {reference.predict_bytes}
    assert reference.predict.ratio == reference.latency.ratio == 1
    assert (reference.fit, reference.fit_bytes, reference.further_runs) == (None, None, 0)
    assert ensemble.further_runs == mixture.further_runs == 1
    assert posterior.fit.ratio > 0
    # The weights of one member more, and what a backward pass stores: no times, these are the same on any machine.
    assert min(ensemble.predict_bytes, posterior.predict_bytes, posterior.fit_bytes) > reference.predict_bytes


def test_what_was_measured_is_not_measured_again(stored, measured):
    output, run, entries = stored
    measure(output, run)
    assert measured == []
    write_costs(output, entries[:2])
    measure(output, run)
    assert measured == list(METHODS[2:])
    assert [entry.method for entry in read_costs(output).entries] == list(METHODS)


def test_costs_of_methods_that_are_not_asked_for_now_stay(stored, measured):
    output, run, entries = stored
    write_costs(output, entries[1:])
    measure(output, replace(run, methods=run.methods[:2]))
    assert measured == ["map"]
    assert [entry.method for entry in read_costs(output).entries] == list(METHODS)


def test_times_of_two_machines_are_not_compared(stored, measured):
    output, run, entries = stored
    elsewhere = [replace(entry, conditions=replace(entry.conditions, host="elsewhere")) for entry in entries]
    write_costs(output, elsewhere)
    measure(output, run)
    assert measured == []
    write_costs(output, elsewhere[:2])
    measure(output, run)
    assert measured == list(METHODS)


def test_a_measurement_that_was_stopped_says_what_is_missing_and_resumes(stored, monkeypatch):
    output, run, _ = stored
    write_costs(output, [])

    def one(_run, methods, done):
        done(methods[0], Cost(predict=Timing((1.0,), (1.0,))))
        raise KeyboardInterrupt

    monkeypatch.setattr(costs, "_measure_run", one)
    for number, method in enumerate(METHODS, 1):
        with pytest.raises(KeyboardInterrupt):
            measure(output, run)
        found = read_costs(output)
        assert len(found.entries) == number
        assert f"{method} (experts)" not in found.left_out
        assert all(f"{later} (experts)" in found.left_out for later in METHODS[number:])
    assert read_costs(output).left_out == ""


def test_damaged_costs_are_measured_again(stored, measured):
    output, run, _ = stored
    (output / COSTS_FILE).write_text("{}")
    with pytest.warns(UserWarning, match="The costs are measured again"):
        measure(output, run)
    assert measured == list(METHODS)


def test_methods_whose_weights_are_gone_are_left_out_and_named(stored, measured):
    output, run, _ = stored
    write_costs(output, [])
    member, aside = run.folder / "member-1.safetensors", run.folder / "aside"
    member.rename(aside)
    try:
        measure(output, run)
    finally:
        aside.rename(member)
    assert measured == ["map", "laplace_lpo"]
    assert read_costs(output).left_out.startswith(
        "Without deep_ensemble (experts), laplace_mixture (experts), whose fine-tuned weights"
    )


def test_on_several_processes_nothing_is_measured_and_the_report_says_why(stored, measured, monkeypatch):
    output, run, _ = stored
    monkeypatch.setattr(costs, "num_processes", lambda: 2)
    measure(output, run)
    assert measured == []
    assert read_costs(output).entries == ()
    assert "several processes" in read_costs(output).left_out


@pytest.mark.parametrize("change", ["seed", "questions", "batch size", "folder"])
def test_costs_of_another_seed_size_or_data_set_are_measured_again(stored, measured, change):
    output, run, entries = stored
    path = entries[0].predictions
    other = {"seed": {"seed": 7}, "questions": {"test": 1}, "batch size": {"eval_batch_size": 99}}.get(change, {})
    changed = replace(entries[0], conditions=replace(entries[0].conditions, **other))
    if change == "folder":
        copy = output / "runs" / "other-experts" / "map.safetensors"
        copy.parent.mkdir()
        copy.write_bytes((output / path).read_bytes())
        changed = replace(changed, predictions=copy.relative_to(output).as_posix())
    write_costs(output, [changed, *entries[1:]])
    measure(output, run)
    assert measured == list(METHODS)
    assert [entry.predictions for entry in read_costs(output).entries] == [entry.predictions for entry in entries]


def test_a_damaged_fit_of_a_member_stays_as_it_is_and_is_named(stored, measured, recwarn):
    output, run, _ = stored
    write_costs(output, [])
    (index,) = run.folder.glob("member-1-*/index.json")
    content = index.read_bytes()
    index.write_text("{}")
    try:
        measure(output, run)
        assert index.read_text() == "{}"
    finally:
        index.write_bytes(content)
    assert not [warning for warning in recwarn if "fitted again" in str(warning.message)]
    assert measured == ["map", "deep_ensemble", "laplace_lpo"]
    assert "Without laplace_mixture (experts), whose fits to further fine-tuned weights" in read_costs(output).left_out
