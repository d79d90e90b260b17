"""The index of a study on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bmoe_lightning.data import Question
from bmoe_lightning.methods import FitResult, Predictions, get_method
from bmoe_lightning.report import library_versions
from recipes.common.errors import RecipeError
from recipes.paper.outcomes import Study
from recipes.paper.stored_study import STUDY_FILE, begin_study, read_study, stored_outcomes, write_study
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import Settings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.zero_shot import ZERO_SHOT

MAP = get_method("map")
QUESTIONS = tuple(Question(f"q{number}", f"Question {number}?", ("no", "yes"), number % 2) for number in range(6))


def predictions(seed):
    logits = torch.randn(len(QUESTIONS), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.tensor([question.answer for question in QUESTIONS])
    return Predictions(logits.log_softmax(-1), labels, logits)


def finished(output, *, zero_shot):
    chosen = Settings(model="somebody/model", methods=("map",), zero_shot=zero_shot, seeds=2, first_seed=3)
    settings = chosen.resolved()
    source = Source(settings, "somebody/model", "", QUESTIONS, QUESTIONS, QUESTIONS, "")
    runs = [SeedRun(settings, source, (MAP,), output / "runs" / "mine-experts", seed, "identity") for seed in (3, 4)]
    for run in runs:
        run.predictions.write(MAP, FitResult(seed=run.seed), predictions(run.seed))
    if zero_shot:
        runs[0].predictions.write(ZERO_SHOT, FitResult(seed=3), predictions(0))
    return runs


def read_back(output, *, zero_shot):
    outcomes = stored_outcomes(output, "mine", "experts", finished(output, zero_shot=zero_shot))
    write_study(output, Study("small", "somebody/model", "mine", {"mine": "Mine"}, (1,), (), ()), outcomes)
    return read_study(output).results("mine", "mine")


def study(**changed):
    return replace(Study("small", "somebody/model", "mine", {"mine": "Mine"}, (1,), (), ()), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "qwen"}, "another study: preset 'small' .here 'qwen'.; give another --output-dir, or --overwrite"),
        ({"model": "other/model"}, "model 'somebody/model' .here 'other/model'."),
        ({"home": "yours"}, "first data set 'mine' .here 'yours'."),
    ],
)
def test_a_folder_has_one_study(tmp_path, changed, message):
    begin_study(tmp_path, study(), overwrite=False)
    before = (tmp_path / STUDY_FILE).read_bytes()
    with pytest.raises(RecipeError, match=message):
        begin_study(tmp_path, study(**changed), overwrite=False)
    assert (tmp_path / STUDY_FILE).read_bytes() == before
    begin_study(tmp_path, study(**changed), overwrite=True)
    with pytest.raises(RecipeError, match="another study"):
        begin_study(tmp_path, study(), overwrite=False)


def test_other_tables_and_labels_are_the_same_study(tmp_path):
    write_study(tmp_path, study(), stored_outcomes(tmp_path, "mine", "experts", finished(tmp_path, zero_shot=False)))
    before = (tmp_path / STUDY_FILE).read_bytes()
    begin_study(tmp_path, study(tables=(1, 3), labels={"mine": "Ours", "yours": "Yours"}), overwrite=False)
    assert (tmp_path / STUDY_FILE).read_bytes() == before


def test_a_damaged_index_is_written_again(tmp_path):
    begin_study(tmp_path, study(), overwrite=False)
    whole = (tmp_path / STUDY_FILE).read_bytes()
    (tmp_path / STUDY_FILE).write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match=r"study\.json is not a complete study file.* It is written again"):
        begin_study(tmp_path, study(), overwrite=False)
    assert (tmp_path / STUDY_FILE).read_bytes() == whole


def test_a_study_without_outcomes_is_not_finished(tmp_path):
    begin_study(tmp_path, study(), overwrite=False)
    with pytest.raises(FileNotFoundError, match="holds no finished study"):
        read_study(tmp_path)


def test_what_the_numbers_were_made_from_is_read_back(tmp_path):
    outcomes = stored_outcomes(tmp_path, "mine", "experts", finished(tmp_path, zero_shot=False))
    hashes = {"mine-experts": {"data": {"test": "abc"}}}
    write_study(tmp_path, study(), outcomes, hashes)
    found = read_study(tmp_path)
    assert found.hashes == hashes
    assert found.versions == library_versions()


def test_predictions_that_are_missing_are_named(tmp_path):
    read_back(tmp_path, zero_shot=False)
    (path,) = tmp_path.rglob("seed-4/**/map.safetensors")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path}.*run the command that made it again"):
        read_study(tmp_path)


def test_predictions_are_those_of_each_seed(tmp_path):
    results = read_back(tmp_path, zero_shot=False)
    assert [(result.method, result.seed) for result in results] == [("map", 3), ("map", 4)]
    for result in results:
        torch.testing.assert_close(result.log_probs, predictions(result.seed).log_probs)


def test_all_seeds_have_the_predictions_before_fine_tuning_that_the_first_one_has_made(tmp_path):
    results = read_back(tmp_path, zero_shot=True)[2:]
    assert [(result.method, result.label, result.seed) for result in results] == [
        ("zero_shot", "Zero-shot", 3),
        ("zero_shot", "Zero-shot", 4),
    ]
    for result in results:
        assert result.ids == tuple(question.id for question in QUESTIONS)
        torch.testing.assert_close(result.log_probs, predictions(0).log_probs)
