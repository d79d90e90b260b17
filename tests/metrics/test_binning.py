import pytest
import torch

from bmoe_lightning.metrics.binning import Binning, bin_edges, bin_index, bin_totals


def test_edges():
    torch.testing.assert_close(bin_edges(5), torch.arange(6) / 5, check_dtype=False)
    assert bin_edges(5).dtype == torch.float64


@pytest.mark.parametrize(("convention", "expected"), [("right", [0, 0, 1, 1]), ("left", [0, 1, 1, 1])])
def test_the_closed_side_and_both_ends(convention, expected):
    confidence = torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert bin_index(confidence, Binning(2, convention)).tolist() == expected


def test_totals(binary):
    totals = bin_totals(*binary([0.6, 0.62, 0.9], [True, False, True]), Binning(5))
    assert totals.number.tolist() == [0, 0, 1, 1, 1]
    assert totals.correct.tolist() == [0, 0, 1, 0, 1]
    torch.testing.assert_close(totals.confidence, torch.tensor([0, 0, 0.6, 0.62, 0.9], dtype=torch.float64))


def test_sums_of_parts_are_the_sums_of_all(predictions):
    log_probs, target = predictions(60)
    whole = bin_totals(log_probs, target, Binning())
    parts = [bin_totals(log_probs[rows], target[rows], Binning()) for rows in (slice(0, 13), slice(13, 60))]
    for one, two, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(one + two, both)


@pytest.mark.parametrize(("settings", "message"), [((0,), "num_bins must be at least 1"), ((5, "both"), "convention")])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Binning(*settings)
