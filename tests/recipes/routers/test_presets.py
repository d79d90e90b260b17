"""Models and data sets of the study."""

from __future__ import annotations

import json

import pytest

from bmoe_lightning.data.protocols import get_protocol
from bmoe_lightning.data.splits import load_splits
from bmoe_lightning.data.tasks import get_task
from recipes.paper.presets import chosen_preset
from recipes.routers.presets import PRESETS, default_samples, with_preset
from recipes.routers.settings import RouterSettings


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.model is not None])
def test_a_model_that_is_given_alone_has_its_own_preset(name):
    found = with_preset(RouterSettings(model=PRESETS[name].model))
    assert (found.preset, found.model) == (name, None)
    assert chosen_preset(found, PRESETS) == PRESETS[name]
    assert default_samples(PRESETS[name]) == 35


def test_another_model_gets_the_data_of_the_papers_and_none_of_their_numbers():
    preset = chosen_preset(with_preset(RouterSettings(model="my/model")), PRESETS)
    assert [entry.name for entry in preset.data] == ["openbookqa", "arc_easy", "arc_challenge", "medmcqa", "law"]
    assert preset.label == preset.model == "my/model"


def test_what_is_given_stays_as_it_is():
    for settings in (RouterSettings(), RouterSettings(model="my/model", data=("mine=folder",))):
        assert with_preset(settings) == settings
    assert default_samples(PRESETS["small"]) == 8


def test_data_that_are_only_tested_on_need_no_training_split():
    law = PRESETS["granite"].data[-1]
    parts = get_protocol(law.protocol).parts(get_task("mmlu"))
    assert (parts.train, parts.test) == ("validation", "test")


def test_the_medical_questions_are_those_of_the_papers_subject(tmp_path):
    choices = {"opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 0}
    for split, first in (("train", 0), ("validation", 20)):
        rows = [
            {"id": str(number), "question": f"{number}?", **choices, "subject_name": ("Medicine", "Dental")[number % 2]}
            for number in range(first, first + 20)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = RouterSettings(model="my/model", data=(f"medmcqa={tmp_path}",), preset="granite")
    (entry,) = chosen_preset(settings, PRESETS).data
    assert (entry.label, entry.source) == ("MedMCQA", str(tmp_path))
    splits = load_splits(entry.source, entry.protocol, task=entry.task)
    assert sorted(int(question.id) for question in splits.test) == list(range(20, 40, 2))
