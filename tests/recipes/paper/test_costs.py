"""Measuring costs, on a model with random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.paper import costs
from recipes.paper.costs import measure_costs
from recipes.paper.report import Cost
from recipes.paper.stored_costs import COSTS_FILE, read_costs, write_costs
from recipes.qwen_obqa.experiment import completed_run
from recipes.qwen_obqa.settings import Settings

# One that is not fitted, one with a further run, and one whose fit uses the weights from before fine-tuning.
METHODS = ("map", "deep_ensemble", "laplace_evidence")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished run, its measured costs, and the files before and after these were measured."""
    output = tmp_path_factory.mktemp("costs")
    folder = output / "runs" / "recall-experts"
    settings = Settings(
        methods=METHODS,
        output_dir=str(folder),
        seeds=1,
        dry_run=True,
        quiet=True,
        accelerator="cpu",
        zero_shot=False,
        batch_size=4,
        eval_batch_size=4,
    )
    with completed_run(settings.resolved(), announce=False) as (run,):
        before = files(output)
        measure_costs(output, {"experts": run})
        return output, run, before, files(output)


@pytest.fixture
def measured(monkeypatch):
    """The methods that are measured, with made-up costs."""
    names = []

    def record(run, methods, done):
        names.extend(method.name for method in methods)
        for method in methods:
            done(method, Cost(predict_seconds=1.0))

    monkeypatch.setattr(costs, "_measure_run", record)
    return names


@pytest.fixture
def stored(study):
    """The stored costs, restored afterwards."""
    output, run, _, _ = study
    content = (output / COSTS_FILE).read_bytes()
    yield output, run, list(read_costs(output).entries)
    (output / COSTS_FILE).write_bytes(content)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_method_has_costs_and_no_other_file_changes(study):
    output, _, before, after = study
    assert after.keys() - before.keys() == {COSTS_FILE}
    assert before == {name: content for name, content in after.items() if name != COSTS_FILE}
    rows = read_costs(output).shown().rows
    assert tuple(rows) == METHODS
    assert all(row.predict_seconds and row.predict_bytes and row.latency_seconds for row in rows.values())
    reference, ensemble, posterior = (rows[name] for name in METHODS)
    assert (reference.fit_seconds, reference.fit_bytes, reference.further_runs) == (None, None, 0)
    assert ensemble.further_runs == 1
    assert posterior.fit_seconds > 0
    # The weights of one member more, and what a backward pass stores: no times, these are the same on any machine.
    assert min(ensemble.predict_bytes, posterior.predict_bytes, posterior.fit_bytes) > reference.predict_bytes


def test_what_was_measured_is_not_measured_again(stored, measured):
    output, run, entries = stored
    measure_costs(output, {"experts": run})
    assert measured == []
    write_costs(output, entries[:2])
    measure_costs(output, {"experts": run})
    assert measured == list(METHODS[2:])
    assert [entry.method for entry in read_costs(output).entries] == list(METHODS)


def test_costs_of_methods_that_are_not_asked_for_now_stay(stored, measured):
    output, run, entries = stored
    write_costs(output, entries[1:])
    measure_costs(output, {"experts": replace(run, methods=run.methods[:2])})
    assert measured == ["map"]
    assert [entry.method for entry in read_costs(output).entries] == list(METHODS)


def test_times_of_two_machines_are_not_compared(stored, measured):
    output, run, entries = stored
    elsewhere = [replace(entry, conditions=replace(entry.conditions, host="elsewhere")) for entry in entries]
    write_costs(output, elsewhere)
    measure_costs(output, {"experts": run})
    assert measured == []
    write_costs(output, elsewhere[:2])
    measure_costs(output, {"experts": run})
    assert measured == list(METHODS)


def test_a_measurement_that_was_stopped_says_what_is_missing_and_resumes(stored, monkeypatch):
    output, run, _ = stored
    write_costs(output, [])

    def one(_run, methods, done):
        done(methods[0], Cost(predict_seconds=1.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(costs, "_measure_run", one)
    for number, method in enumerate(METHODS, 1):
        with pytest.raises(KeyboardInterrupt):
            measure_costs(output, {"experts": run})
        found = read_costs(output)
        assert len(found.entries) == number
        assert f"{method} (experts)" not in found.left_out
        assert all(f"{later} (experts)" in found.left_out for later in METHODS[number:])
    assert read_costs(output).left_out == ""


def test_damaged_costs_are_measured_again(stored, measured):
    output, run, _ = stored
    (output / COSTS_FILE).write_text("{}")
    with pytest.warns(UserWarning, match="The costs are measured again"):
        measure_costs(output, {"experts": run})
    assert measured == list(METHODS)


def test_methods_whose_weights_are_gone_are_left_out_and_named(stored, measured):
    output, run, _ = stored
    write_costs(output, [])
    member, aside = run.folder / "member-1.safetensors", run.folder / "aside"
    member.rename(aside)
    try:
        measure_costs(output, {"experts": run})
    finally:
        aside.rename(member)
    assert measured == ["map", "laplace_evidence"]
    assert read_costs(output).left_out.startswith("Without deep_ensemble (experts)")


def test_on_several_processes_nothing_is_measured_and_the_report_says_why(stored, measured, monkeypatch):
    output, run, _ = stored
    monkeypatch.setattr(costs, "num_processes", lambda: 2)
    measure_costs(output, {"experts": run})
    assert measured == []
    assert read_costs(output).entries == ()
    assert "several processes" in read_costs(output).left_out
