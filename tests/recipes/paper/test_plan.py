"""Which runs the tables need, from which settings."""

from __future__ import annotations

import pytest

from recipes.common.cli import UsageError
from recipes.paper.plan import EXPERT_METHODS, PRIOR_METHODS, Columns, PlannedRun, layer_parts, planned_runs
from recipes.paper.presets import PRESETS, chosen_preset
from recipes.paper.run import run_settings
from recipes.paper.settings import PaperSettings
from recipes.paper.sources import Questions

COLUMNS = Columns(("recall", "pairs", "judged"), 8)


def planned(**options):
    return {run.name: run for run in planned_runs(PaperSettings(**options), COLUMNS)}


def names(run):
    return [entry if isinstance(entry, str) else entry["init_args"]["name"] for entry in run.methods]


def test_a_table_in_distribution_trains_each_model_once():
    runs = planned(table=(1,))
    assert set(runs) == {f"{data}-{mode}" for data in COLUMNS.names for mode in ("experts", "lora")}
    assert all(run.others == () for run in runs.values())
    assert runs == planned(table=(2,))  # of another model
    assert runs["pairs-experts"].methods == EXPERT_METHODS


def test_tables_share_their_runs():
    everything = planned(all=True)
    assert set(everything) == set(planned(table=(1,)))
    assert next(iter(everything)) == "recall-experts"
    home = everything["recall-experts"]
    assert home.others == ("pairs", "judged")
    assert names(home) == [*EXPERT_METHODS, *(f"laplace_lpo_without_{number}" for number in (1, 2, 3, 4))]
    assert everything["pairs-experts"].others == ()


def test_tables_alone_need_less():
    assert set(planned(table=(3,))) == {"recall-experts", "recall-lora"}
    assert set(planned(table=(5,))) == set(planned(figure=(1,))) == {"recall-experts"}
    assert [run.methods for run in planned(table=(6,)).values()] == [PRIOR_METHODS] * 3


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        (4, [[0], [1], [2], [3]]),
        (1, []),
        (2, [[0], [1]]),
        (3, [[0], [1], [2]]),
        (6, [[0, 1], [2], [3], [4, 5]]),
        (24, [list(range(6 * part, 6 * part + 6)) for part in range(4)]),
        (27, [list(range(7)), list(range(7, 14)), list(range(14, 20)), list(range(20, 27))]),
    ],
)
def test_parts_cover_all_layers_in_order(layers, parts):
    assert layer_parts(layers) == parts


def test_each_part_is_left_out_by_its_indices():
    run = planned(table=(5,))["recall-experts"]
    skipped = [entry["init_args"]["curvature"]["skip_layers"] for entry in run.methods if isinstance(entry, dict)]
    assert skipped == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --table, --figure or --all"),
        ({"table": (8,)}, "--table: the paper has no 8"),
        ({"figure": (2,)}, "--figure: the paper has no 2"),
        ({"all": True, "data": ("openbookqa",)}, "NAME=FOLDER_OR_ID, got 'openbookqa'"),
        ({"all": True, "data": ("a-b=x",)}, "names are letters"),
        ({"all": True, "data": ("a=x", "a=y")}, "a name twice"),
        ({"report": "folder", "table": (1,)}, "leave --table out"),
        (
            {"report": "folder", "seeds": 3, "preset": "qwen", "dry_run": True, "overwrite": True, "output_dir": "x"},
            "leave --preset, --output-dir, --seeds, --overwrite, --dry-run out",
        ),
        ({"all": True, "data": ("a=x",), "normalise": "bytes"}, "--normalise bytes is .* by their text; add --prompt"),
        ({"all": True, "protocol": "holdout"}, "--protocol applies to --data"),
        ({"all": True, "prompt": "cloze"}, "--prompt applies to --data"),
    ],
)
def test_what_cannot_be_made_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        PaperSettings(**options)


def test_a_model_needs_real_questions():
    with pytest.raises(UsageError, match="cannot answer the generated questions"):
        chosen_preset(PaperSettings(all=True, model="somebody/model"))


def test_given_data_keep_what_is_known_of_them():
    preset = chosen_preset(PaperSettings(all=True, data=("boolq=/folder", "mine=/other")))
    boolq, mine = preset.data
    assert (boolq.label, boolq.source, boolq.prompt, boolq.protocol) == ("BoolQ", "/folder", "true_false", "paper")
    assert (mine.label, mine.source, mine.prompt) == ("mine", "/other", None)
    assert preset.model is None
    other = chosen_preset(PaperSettings(all=True, data=("boolq=/folder",), protocol="holdout"))
    assert [entry.protocol for entry in other.data] == ["holdout"]
    other = chosen_preset(PaperSettings(all=True, data=("boolq=/folder", "mine=/other"), prompt="cloze"))
    assert [entry.prompt for entry in other.data] == ["cloze", "cloze"]
    other = chosen_preset(PaperSettings(all=True, preset="qwen", model="somebody/model"))
    assert (other.model, other.data) == ("somebody/model", PRESETS["qwen"].data)


def planned_settings(mode, **options):
    settings = PaperSettings(table=(1,), data=("mine=/folder",), **options)
    preset = chosen_preset(settings)
    questions = Questions({entry.name: entry for entry in preset.data}, {}, ())
    return run_settings(PlannedRun("mine", mode, ("map",)), preset, settings, questions)


def test_options_reach_the_runs():
    options = {
        "prompt": "cloze",
        "normalise": "characters",
        "precision": "32-true",
        "limit_train": 300,
        "limit_validation": 100,
        "limit_test": 150,
        "epochs": 2,
    }
    given = {"model": "somebody/model", "learning_rate": 2e-4, "lora_learning_rate": 3e-4, **options}
    experts, lora = (planned_settings(mode, **given) for mode in ("experts", "lora"))
    for name, value in options.items():
        assert getattr(experts, name) == getattr(lora, name) == value
    assert (experts.learning_rate, lora.learning_rate) == (2e-4, 3e-4)
    assert (experts.train, lora.train) == ("experts", "lora")


def test_the_model_before_fine_tuning_is_tested_once_and_not_the_small_model():
    assert planned_settings("experts", model="somebody/model").zero_shot
    assert not planned_settings("lora", model="somebody/model").zero_shot
    assert not planned_settings("experts").zero_shot
    assert planned_settings("experts", zero_shot=True).zero_shot
    assert not planned_settings("experts", model="somebody/model", zero_shot=False).zero_shot


def test_another_model_has_neither_the_small_one_s_learning_rate_nor_its_seeds():
    other = planned_settings("lora", model="somebody/model")
    assert (other.learning_rate, other.seeds) == (5e-5, 3)
    small = planned_settings("lora")
    assert (small.learning_rate, small.seeds) == (1e-2, 5)


def test_a_normalisation_without_scored_texts_is_refused():
    with pytest.raises(UsageError, match="add --prompt cloze"):
        planned_settings("experts", model="somebody/model", normalise="characters")
