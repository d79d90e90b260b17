"""What a served model says of questions."""

from __future__ import annotations

import json

import torch

from bmoe_lightning.data import Question
from bmoe_lightning.serving import ServedPredictions

LOGITS = torch.tensor([[1.0, 3.0, -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
SCORES = {"mutual_information": torch.tensor([0.1, 0.2]), "other": torch.tensor([1.0, 1.0])}
QUESTIONS = [Question("ä", "is it ?", ("yes", "no"), 0), Question("b", "is it ?", ("x", "y", "z"), 0)]


def test_scores_and_rows():
    found = ServedPredictions.of(LOGITS.log_softmax(-1), SCORES)
    probability = torch.tensor([1.0, 3.0], dtype=torch.float64).softmax(0)
    expected = torch.stack([-(probability * probability.log()).sum(), torch.tensor(3.0, dtype=torch.float64).log()])
    torch.testing.assert_close(found.entropy, expected)
    assert found.logit_variance is None
    first, second = json.loads(json.dumps(list(found.rows(QUESTIONS))))
    assert first["probabilities"] == found.probabilities[0, :2].tolist()
    assert list(first) == ["id", "prediction", "probabilities", "entropy", "mutual_information"]
    assert (first["id"], first["prediction"], second["prediction"]) == ("ä", "B", "A")
    assert len(second["probabilities"]) == 3


def test_batches_are_joined_in_order():
    parts = [ServedPredictions.of(LOGITS[i : i + 1].log_softmax(-1), {k: v[i : i + 1] for k, v in SCORES.items()})
             for i in (0, 1)]  # fmt: skip
    joined, whole = ServedPredictions.joined(parts), ServedPredictions.of(LOGITS.log_softmax(-1), SCORES)
    for name in ("log_probs", "entropy", "mutual_information"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert joined.logit_variance is None
