"""What held-out labels say against a fit."""

import warnings

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import MAP, Isotropic, LaplaceEvidence, LaplaceLPO, Needs, TemperatureScaling, fit_methods
from bmoe_lightning.methods.label_warnings import warn_of_chance, warn_of_few_labels
from bmoe_lightning.methods.registry import get_method, method_names
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.utils.fit_warnings import FitWarning


def test_fewer_labels_than_advised_are_said_with_both_numbers():
    with pytest.warns(FitWarning, match="fitted on 24 held-out labels, and 25 or more are advised"):
        warn_of_few_labels(Needs(calibration_labels=True, advised_labels=25), 24)


@pytest.mark.parametrize(
    ("needs", "count"), [(Needs(calibration_labels=True, advised_labels=25), 25), (Needs(advised_labels=25), 0)]
)
def test_enough_labels_and_none_that_are_used_are_fine(needs, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_labels(needs, count)


@pytest.mark.parametrize(("count", "warned"), [(24, ["temperature"]), (25, [])])
def test_the_fit_carries_the_warning_of_each_method(count, warned):
    model, batch = toy_model(), toy_batch(num_rows=count)
    methods = [MAP(), TemperatureScaling()]
    fit = fit_methods(methods, model, answer_logits, [], split(batch, count))
    found = [m.name for m in methods if any("advised" in sentence for sentence in fit.warnings_of(m))]
    assert found == warned


def test_methods_without_labels_are_never_warned_about():
    model, batch = toy_model(), toy_batch(num_rows=8)
    before = {name: weight.detach() + 0.1 for name, weight in model.named_parameters() if "down_proj" in name}
    methods = [LaplaceEvidence(curvature=RANK3), Isotropic(curvature=RANK3, use_labels=False, tolerance=1.0)]
    fit = fit_methods(methods, model, answer_logits, [batch], [batch], prior_mean=before)
    assert not any("advised" in sentence for method in methods for sentence in fit.warnings_of(method))
    assert torch.isfinite(fit.state_of(methods[0])["prior_precision"]).all()


def test_every_method_that_is_fitted_on_labels_advises_a_number():
    for name in method_names():
        needs = get_method(name).needs
        assert bool(needs.advised_labels) == needs.calibration_labels, name
    assert LaplaceLPO().needs.advised_labels > TemperatureScaling().needs.advised_labels


class TestChance:
    METHODS = (MAP(), TemperatureScaling(), LaplaceEvidence(curvature=RANK3))

    def fit(self, model, batches, methods=METHODS, **options):
        before = {name: weight.detach() + 0.1 for name, weight in model.named_parameters() if "down_proj" in name}
        return fit_methods(methods, model, answer_logits, batches, batches, prior_mean=before, **options)

    def batches(self, model, share_right, count=60):
        batch = toy_batch(num_rows=count)
        with torch.no_grad():
            found = answer_logits(model, batch)[0].argmax(1)
        batch["labels"] = torch.where(torch.arange(count) < share_right * count, found, (found + 1) % 4)
        return split(batch, count)

    @pytest.mark.parametrize(("share_right", "warned"), [(0.2, True), (0.9, False)])
    def test_every_method_carries_it(self, caplog, tmp_path, share_right, warned):
        model = toy_model()
        fit = self.fit(model, self.batches(model, share_right))
        save_fit(tmp_path, fit)
        for found in (fit, load_fit(tmp_path)[0]):
            for method in self.METHODS:  # without labels, and without a fit, too
                said = [sentence for sentence in found.warnings_of(method) if "is not above" in sentence]
                assert len(said) == warned
        lines = [record.message for record in caplog.records if "is not above" in record.message]
        assert len(lines) == warned

    def test_it_is_said_once(self, caplog):
        model = toy_model()
        batches = self.batches(model, 0.2)
        first = self.fit(model, batches)
        caplog.clear()
        more = self.fit(model, batches, (*self.METHODS, TemperatureScaling(name="again")), earlier=first)
        assert more.warnings == first.warnings
        assert not any("is not above" in record.message for record in caplog.records)

    def test_labels_that_no_method_uses_may_be_placeholders(self):
        model = toy_model()
        batches = self.batches(model, 0.2)
        fit = self.fit(model, batches, (MAP(), Isotropic(curvature=RANK3, use_labels=False, tolerance=1.0)))
        assert fit.warnings == ()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_chance(torch.zeros(4, 3), None)

    def test_elsewhere_it_is_a_warning(self):
        with pytest.warns(FitWarning, match="is not above chance"):
            warn_of_chance(torch.eye(3), torch.tensor([1, 2, 0]))
