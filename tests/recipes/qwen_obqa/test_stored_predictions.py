"""What the files of predictions must have for an evaluation not to be repeated."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.methods import FitResult, Predictions, get_method
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file
from recipes.qwen_obqa.stored_predictions import StoredPredictions

METHOD = get_method("map")
LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([2, 0, 1])


@pytest.fixture
def stored(tmp_path):
    found = StoredPredictions(tmp_path, "run", "questions")
    found.write(METHOD, FitResult(seed=0), Predictions(LOGITS.log_softmax(-1), LABELS, LOGITS))
    return found


def changed(stored, *, tensors=None, **description):
    """Write the file again with some content replaced; None leaves it out."""
    path = stored.folder / "map.safetensors"
    file = read_tensor_file(path, format="predictions", version=1)
    content = [{**file.tensors, **(tensors or {})}, {**file.description, **description}]
    values, fields = ({key: value for key, value in part.items() if value is not None} for part in content)
    write_tensor_file(path, values, format="predictions", version=1, description=fields, fit=file.fit)


def test_are_read_as_they_were_written(stored):
    assert stored.has(METHOD)
    found = stored.read(METHOD, 3, ("a", "b", "c"))
    assert torch.equal(found.log_probs, LOGITS.log_softmax(-1))
    assert torch.equal(found.target, LABELS)
    assert torch.equal(stored.logits(METHOD), LOGITS)


def test_scores_of_uncertainty_are_read_as_they_were_written(tmp_path):
    found = StoredPredictions(tmp_path, "run", "questions")
    scores = {"mutual_information": torch.tensor([0.1, 0.0, 0.3]).double()}
    found.write(METHOD, FitResult(seed=0), Predictions(LOGITS.log_softmax(-1), LABELS, LOGITS, scores))
    assert found.has(METHOD)
    read = found.read(METHOD, 3, ("a", "b", "c")).uncertainty
    assert list(read) == ["mutual_information"]
    assert torch.equal(read["mutual_information"], scores["mutual_information"])


def test_warnings_are_those_of_the_predictions(tmp_path):
    found = StoredPredictions(tmp_path, "run", "questions")
    said = ("of this fit", "of a member's fit")
    found.write(METHOD, FitResult(seed=0), Predictions(LOGITS.log_softmax(-1), LABELS, LOGITS, warnings=said))
    assert found.read(METHOD, 3, ("a", "b", "c")).warnings == said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tensors": {"uncertainty/entropy": LABELS[:2].double()}}, "scores of uncertainty"),
        ({"tensors": {"uncertainty/entropy": LABELS * torch.nan}}, "scores of uncertainty"),
        ({"tensors": {"labels": None}}, "lacks a tensor"),
        ({"tensors": {"logits": None}}, "lacks a tensor"),
        ({"tensors": {"labels": LABELS[:2]}}, "shapes that do not fit together"),
        ({"tensors": {"log_probs": LOGITS[:, :2].clone()}}, "shapes that do not fit together"),
        ({"tensors": {"labels": LABELS.double()}}, "other dtypes"),
        ({"tensors": {"log_probs": LOGITS * torch.nan}}, "do not sum to one"),
        ({"tensors": {"log_probs": LOGITS.clone()}}, "do not sum to one"),
        ({"numbers": None}, "numbers of the method"),
        ({"numbers": {"T": "1"}}, "numbers of the method"),
        ({"warnings": "one"}, "no list of sentences"),
    ],
)
def test_other_content_is_named_and_evaluated_again(stored, change, reason):
    changed(stored, **change)
    with pytest.warns(UserWarning, match=rf"map\.safetensors .*{reason}.*The test split is evaluated again"):
        assert not stored.has(METHOD)
    with pytest.raises(ValueError, match=reason):
        stored.read(METHOD, 0, ("a", "b", "c"))


@pytest.mark.parametrize("change", [{"questions": "others"}, {"options": {}}])
def test_predictions_of_other_questions_or_options_are_evaluated_again(stored, change):
    changed(stored, **change)
    assert not stored.has(METHOD)


def test_predictions_of_a_run_with_other_settings_are_named(stored):
    changed(stored, run="another")
    with pytest.warns(UserWarning, match="from a run with other settings"):
        assert not stored.has(METHOD)
