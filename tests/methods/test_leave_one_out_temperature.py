"""The leave-one-out temperature: its formulas against models that are fitted again without each example."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from forked_processes import run
from methods_cases import RANK3, predict
from oracles.models import answer_logits, split, taken, toy_batch, toy_model
from oracles.training import train_only
from workbench_cases import Untouchable

from bmoe_lightning.curvature import Curvature, GradientShare
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace.predictive import mean_variance
from bmoe_lightning.methods import BatchView, LeaveOneOutTemperature, fit_methods
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.leave_one_out_temperature import (
    confidence_temperature,
    effective_parameters,
    known_kappa,
    leave_one_out_accuracy,
    leave_one_out_logits,
    mean_confidence,
)
from bmoe_lightning.utils.fit_warnings import FitWarning

METHOD = LeaveOneOutTemperature(prior_mean="zero", curvature=RANK3)


class LinearModel:
    """Logits `J w` with a Gaussian prior, at its mode: every posterior and every refit is written out in float64."""

    def __init__(self, precision, size=14, num_classes=3, width=5):
        generator = torch.Generator().manual_seed(0)
        self.jacobian = torch.randn(size, num_classes, width, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(num_classes, (size,), generator=generator)
        self.precision = precision
        self.weights = self.fitted(torch.ones(size, dtype=torch.bool))

    def logits(self, weights=None):
        return self.jacobian @ (self.weights if weights is None else weights)

    def hessian(self, logits):
        p = logits.softmax(-1)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)

    def residuals(self, logits):
        return torch.nn.functional.one_hot(self.labels, logits.shape[1]) - logits.softmax(-1)

    def curvature(self, used, weights):
        blocks = self.jacobian.mT @ self.hessian(self.logits(weights)) @ self.jacobian
        return self.precision * torch.eye(len(weights), dtype=torch.float64) + blocks[used].sum(0)

    def newton_step(self, used, weights):
        pull = (self.jacobian.mT @ self.residuals(self.logits(weights)).unsqueeze(2)).squeeze(2)[used].sum(0)
        return weights + torch.linalg.solve(self.curvature(used, weights), pull - self.precision * weights)

    def fitted(self, used):
        weights = torch.zeros(self.jacobian.shape[2], dtype=torch.float64)
        for _ in range(60):
            weights = self.newton_step(used, weights)
        return weights

    def covariance(self):
        inverse = torch.linalg.inv(self.curvature(torch.ones(len(self.labels), dtype=torch.bool), self.weights))
        return centred(centred(self.jacobian @ inverse @ self.jacobian.mT).mT)

    def without(self, number):
        return torch.arange(len(self.labels)) != number


def centred(values):
    """Of mean zero over the last but one dimension."""
    return values - values.mean(-2, keepdim=True)


class TestLogits:
    def test_are_those_of_a_newton_step_without_the_example_to_first_order(self):
        model = LinearModel(precision=0.5)
        logits, covariance, hessian = model.logits(), model.covariance(), model.hessian(model.logits())
        found = leave_one_out_logits(logits, model.labels, covariance)
        for number in range(len(logits)):
            step = model.newton_step(model.without(number), model.weights)
            change = centred((model.logits(step) - logits)[number].unsqueeze(1)).squeeze(1)
            # The exact one is (1 - Lambda S)^-1 times this one.
            first_order = change - covariance[number] @ hessian[number] @ change
            torch.testing.assert_close((found - logits)[number], first_order, rtol=1e-10, atol=1e-12)

    def test_error_against_a_refit_vanishes_with_the_covariance(self):
        errors = []
        for precision in (100.0, 1000.0, 10000.0):
            model = LinearModel(precision)
            logits = model.logits()
            found = leave_one_out_logits(logits, model.labels, model.covariance()) - logits
            refitted = torch.stack(
                [(model.logits(model.fitted(model.without(number))) - logits)[number] for number in range(len(logits))]
            )
            refitted = refitted - refitted.mean(1, keepdim=True)
            errors.append(float((found - refitted).norm() / refitted.norm()))
        assert errors[0] < 0.06
        assert errors[1] < 0.15 * errors[0]
        assert errors[2] < 0.15 * errors[1]

    def test_of_absent_classes(self):
        logits = torch.tensor([[1.0, -torch.inf, 0.5]], dtype=torch.float64)
        covariance = torch.tensor([[[0.2, 0.0, -0.2], [0.0, 0.0, 0.0], [-0.2, 0.0, 0.2]]], dtype=torch.float64)
        found = leave_one_out_logits(logits, torch.tensor([0]), covariance, scale=0.5, temperature=2.0)
        p = 1 / (1 + math.exp(-0.25))
        assert found[0].tolist() == pytest.approx([1 - 0.5 * 0.4 * (1 - p), -math.inf, 0.5 + 0.5 * 0.4 * (1 - p)])


class TestAccuracy:
    def test_of_the_full_posterior_nothing_is_scaled(self):
        model = LinearModel(precision=0.3)
        everything = torch.ones(len(model.labels), dtype=torch.bool)
        eigenvalues = torch.linalg.eigvalsh(model.curvature(everything, model.weights)) - model.precision
        gamma = effective_parameters([eigenvalues.view(1, 1, -1)], torch.tensor([model.precision], dtype=torch.float64))
        explained = float((model.hessian(model.logits()) * model.covariance()).sum())
        assert explained == pytest.approx(gamma, rel=1e-10)

    @pytest.mark.parametrize("share", [1.0, 0.2])
    def test_is_that_of_written_out_sums(self, share):
        model = LinearModel(precision=0.05)
        logits, covariance = model.logits(), model.covariance()
        explained, variances = 0.0, []
        for f, block in zip(logits, covariance, strict=True):
            p = f.softmax(0)
            explained += float(torch.trace((torch.diag(p) - torch.outer(p, p)) @ block))
            variances.append(float(torch.trace(block)) / (len(f) - 1))
        temperature = math.sqrt(1 + math.pi / 4 * float(torch.tensor(variances).double().median()))
        temperature_of_even = math.sqrt(1 + math.pi / 4 * sum(sorted(variances)[6:8]) / 2)
        hits = 0
        for f, y, block in zip(logits, model.labels, covariance, strict=True):
            residual = torch.eye(3).double()[y] - (f / temperature_of_even).softmax(0)
            hits += int((f - share * block @ residual).argmax() == y)
        assert temperature < temperature_of_even
        found = leave_one_out_accuracy(logits, model.labels, covariance, share * explained)
        assert found == hits / len(logits)

    def test_is_lower_than_that_on_the_training_examples(self):
        model = LinearModel(precision=0.01)
        own = float((model.logits().argmax(1) == model.labels).double().mean())
        found = leave_one_out_accuracy(model.logits(), model.labels, model.covariance(), math.inf)
        refitted = [
            int(model.logits(model.fitted(model.without(n)))[n].argmax() == model.labels[n])
            for n in range(len(model.labels))
        ]
        assert sum(refitted) / len(refitted) <= found < own


def drawn(count=300, ragged=True):
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    if ragged:
        logits[::3, 3] = -torch.inf
    return logits


class TestTemperature:
    @pytest.mark.parametrize("accuracy", [0.35, 0.6, 0.9, 0.99])
    def test_confidence_is_the_accuracy(self, accuracy):
        logits = drawn()
        found = confidence_temperature(logits, accuracy)
        assert mean_confidence(logits, found) == pytest.approx(accuracy, abs=1e-12)
        low, high = 1e-3, 1e3  # by bisection in T itself, and with probabilities that are written out
        for _ in range(200):
            middle = (low + high) / 2
            p = torch.where(logits > -torch.inf, ((logits - logits.amax(1, keepdim=True)) / middle).exp(), 0.0)
            confident = float((1 / p.sum(1)).mean()) > accuracy
            low, high = (middle, high) if confident else (low, middle)
        assert found == pytest.approx(low, rel=1e-9)

    @pytest.mark.parametrize(
        ("accuracy", "expected", "message"),
        [
            (0.2, 100.0, r"accuracy of 0.200, which is no better than chance \(0.278\).* end of its range \(100\)"),
            (0.2781, 100.0, "hardly better than chance"),
            (1.0, 0.01, r"accuracy of 1.000, which no temperature reaches.*\(0.01\)"),
        ],
    )
    def test_ends_of_the_range_carry_a_warning(self, accuracy, expected, message):
        with pytest.warns(FitWarning, match=message):
            assert confidence_temperature(drawn(), accuracy) == expected


class TestFit:
    def data(self):
        """Training labels that the model predicts, but for every fifth."""
        train = toy_batch(num_rows=60, seed=3)
        with torch.no_grad():
            predicted = answer_logits(toy_model(), train)[0].argmax(1)
        train["labels"] = torch.where(torch.arange(60) % 5 > 0, predicted, train["labels"])
        return split(train, 20, 20, 20), [toy_batch(num_rows=112, seed=4)]

    def fit(self, method=METHOD, model=None, train=None, **options):
        default, inputs = self.data()
        return fit_methods([method], model or toy_model(), answer_logits, train or default, inputs, **options)

    def test_divides_the_logits(self, model, batches):
        view = BatchView(model, answer_logits, batches[0])
        found = predict(METHOD, model, batches[0], {"temperature": scalar(1.7)})
        assert torch.equal(found, (view.logits / 1.7).log_softmax(-1))

    def test_follows_from_the_posterior_of_the_training_examples(self):
        model = toy_model()
        train, (inputs,) = self.data()
        fit = self.fit()
        kappa = fit.shares[RANK3.digest].kappa
        state = fit.state_of(METHOD)
        assert float(state["kappa"]) == kappa > 1
        posterior = fit.posteriors[RANK3.digest]
        zero = [
            weights.square().flatten(1).sum(1)
            for weights in (model.get_submodule(layer.name).down_proj.detach() for layer in find_expert_layers(model))
        ]
        scaled = posterior.fit_prior_evidence(zero)
        scaled = scaled.with_prior_precision(scaled.prior_precision / kappa)
        parts = [scaled.logit_covariance(model, answer_logits, batch, centred=True) for batch in train]
        logits, covariance = (torch.cat(values) for values in zip(*parts, strict=True))
        labels = torch.cat([batch["labels"] for batch in train])
        gamma = effective_parameters(scaled.curvature, scaled.prior_precision)
        accuracy = leave_one_out_accuracy(logits, labels, covariance, gamma)
        assert float(state["accuracy"]) == accuracy
        assert 0.3 < accuracy < 0.8
        assert float(mean_variance(logits, covariance).median()) > 0.1
        with torch.no_grad():
            held_out = answer_logits(model, inputs)[0]
        assert mean_confidence(held_out, float(state["temperature"])) == pytest.approx(accuracy, abs=1e-9)

    def test_held_out_labels_are_not_used(self):
        train, (inputs,) = self.data()
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        fits = [fit_methods([METHOD], toy_model(), answer_logits, train, [x]) for x in (inputs, unlabelled)]
        assert len({float(fit.state_of(METHOD)["temperature"]) for fit in fits}) == 1
        assert fits[1].calibration[1] is None
        assert METHOD.refit({}, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)) == {}

    def test_takes_whole_batches_up_to_the_number_of_training_inputs(self):
        calls = []

        def class_logits(model, batch):
            calls.append(len(batch["labels"]))
            return answer_logits(model, batch)

        train, inputs = self.data()
        few, all_of_them = replace(METHOD, train_inputs=30), replace(METHOD, train_inputs=60)
        fit_methods([few], toy_model(), class_logits, train, inputs)
        # The check of the held-out inputs, the curvature and its share of the gradient, two training batches, and a
        # plain pass over the held-out inputs.
        assert calls == [112, *[20] * 8, 112]
        calls.clear()
        fit_methods([all_of_them], toy_model(), class_logits, train, inputs)
        assert calls == [112, *[20] * 9, 112]

    def test_completes_a_fit_with_its_own_number(self):
        fit = self.fit(replace(METHOD, name="first", label="First"))
        completed = self.fit(earlier=fit)
        assert completed.state_of(METHOD) == fit.methods["first"].state

    def test_two_processes_find_what_one_finds(self, tmp_path):
        run(partial(_of_rank, tmp_path), 2, tmp_path)
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first == second
        train, inputs = self.data()
        expected = fit_methods([METHOD], train_only(toy_model(), "down_proj"), answer_logits, train, inputs)
        state = expected.state_of(METHOD)
        assert float(state["kappa"]) == 1
        for name, value in state.items():
            assert float(first[name]) == pytest.approx(float(value), rel=1e-6)


def _of_rank(folder, rank, world_size):
    train, inputs = TestFit().data()
    mine = slice(rank, None, world_size)
    shares = [[taken(batch, mine) for batch in batches] for batches in (train, inputs)]
    model = train_only(toy_model(), "down_proj")
    fit = fit_methods([METHOD], model, answer_logits, *shares, distributed=True)
    torch.save(dict(fit.state_of(METHOD)), folder / f"{rank}.pt")


class TestRefused:
    def test_options(self):
        with pytest.raises(ValueError, match="fisher='exact', got 'mc'"):
            LeaveOneOutTemperature(curvature=Curvature(fisher="mc"))
        with pytest.raises(ValueError, match="train_inputs of at least 1, got 0"):
            LeaveOneOutTemperature(train_inputs=0)
        with pytest.raises(ValueError, match="min_inputs of at least 1, got 0"):
            LeaveOneOutTemperature(min_inputs=0)

    def test_before_training_if_the_trained_weights_are_not_covered(self, tmp_path):
        METHOD.check_run(toy_model(), tmp_path)
        METHOD.check_run(train_only(toy_model(), "down_proj"), tmp_path)
        with pytest.raises(ValueError, match="covers none of them; choose a curvature over layers that were trained"):
            METHOD.check_run(train_only(toy_model(), "head"), tmp_path)
        with pytest.raises(ValueError, match="unknown: no weight requires gradients; remove the method"):
            METHOD.check_run(train_only(toy_model()), tmp_path)

    def test_weights_that_no_optimizer_has_do_not_count_as_trained(self, tmp_path):
        model = toy_model()
        assert all(parameter.requires_grad for parameter in model.parameters())
        METHOD.check_run(model, tmp_path, trained=list(model.parameters()))
        with pytest.raises(ValueError, match="covers none of them"):
            METHOD.check_run(model, tmp_path, trained=[model.head.weight])

    def test_nothing_is_said_of_weights_that_may_be_unfrozen_during_training(self, tmp_path):
        model = train_only(toy_model(), "head")
        METHOD.check_run(model, tmp_path, trained=list(model.parameters()))

    def test_unknown_kappa(self):
        assert known_kappa("it", GradientShare(0.25)) == 4
        with pytest.raises(ValueError, match=r"it scales .* is unknown: a gradient is not finite"):
            known_kappa("it", GradientShare(None, reason="a gradient is not finite"))

    def test_training_examples_without_labels(self):
        train = [{name: x for name, x in batch.items() if name != "labels"} for batch in TestFit().data()[0]]
        with pytest.raises(ValueError, match="labels of training examples are needed"):
            TestFit().fit(train=train)

    def test_training_data_that_are_used_up(self):
        with pytest.raises(ValueError, match="pass over the training data, which can be iterated over only once"):
            TestFit().fit(train=iter(TestFit().data()[0]))

    def test_a_fit_of_an_earlier_version(self):
        fit = TestFit().fit(replace(METHOD, name="first", label="First"))
        with pytest.raises(ValueError, match="does not have: the fit was written by an earlier version; fit into"):
            TestFit().fit(earlier=replace(fit, shares={}), train=Untouchable())

    def test_layers_that_are_skipped_after_the_pass(self):
        fit = TestFit().fit(replace(METHOD, name="first", label="First"))
        part = replace(METHOD, curvature=replace(METHOD.spec, skip_layers=(0,)))
        with pytest.raises(ValueError, match="its layers were chosen after the pass"):
            TestFit().fit(part, earlier=fit, train=Untouchable())

    def test_a_curvature_without_a_pass(self):
        with pytest.raises(ValueError, match="rank 1 or more, got rank 0"):
            replace(METHOD, curvature=replace(METHOD.spec, rank=0))
