"""Layers on several devices, as `device_map` puts them: nothing is mixed, and the numbers are those of one device."""

import pytest
import torch
from oracles.models import answer_logits, as_modules, choice_batch, choices_permuted, split, toy_batch, toy_model
from oracles.places import PretendedDevices

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import find_expert_layers, squared_distances, weight_fingerprint
from bmoe_lightning.experts.dropout import _Dropout
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import (
    EvidenceTemperature,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceTemperature,
    MCDropout,
    ShrunkTemperature,
    evaluate,
    fit_methods,
    get_method,
)

layouts = pytest.mark.parametrize("layout", ["fused", "modules"])
METHODS = (
    get_method("map"),
    MCDropout(num_samples=2),
    get_method("temperature"),
    LaplaceEvidence(prior_mean="zero", num_samples=50),
    LaplaceLPO(num_samples=50),
    LaplaceTemperature(prior_mean="zero", num_samples=50),
    EvidenceTemperature(prior_mean="zero"),
    ShrunkTemperature(),
)
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def built(layout, num_layers=3):
    model = toy_model(num_layers=num_layers)
    return model if layout == "fused" else as_modules(model)


def spread(devices, model, head=SECOND):
    """Embeddings and two layers on the first device, a layer on the second one, the head on either."""
    for module in (model.words, model.places, model.layers[0], model.layers[2]):
        devices.put_module(module, FIRST)
    devices.put_module(model.layers[1], SECOND)
    devices.put_module(model.head, head)
    return model


def there(batch):
    return {name: value.to(FIRST) for name, value in batch.items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# -- the pretence itself


def test_mixing_raises():
    with PretendedDevices() as devices:
        x, y, cpu = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"), torch.ones(3)
        assert (x.device, y.device, cpu.device) == (FIRST, SECOND, torch.device("cpu"))
        for other in (y, cpu, torch.ones((), device="cuda:1")):
            with pytest.raises(RuntimeError, match=r"expected all tensors of aten.\w+ to be on the same device"):
                x * other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, y])
        with pytest.raises(RuntimeError, match="same device"):
            cpu[torch.zeros(1, dtype=torch.long, device="cuda:0")]
        with pytest.raises(RuntimeError, match="same device"):
            x[torch.zeros(1, dtype=torch.long, device="cuda:1")]
        with pytest.raises(TypeError, match="to numpy"):
            x.numpy()
        assert (x * torch.tensor(2.0)).device == FIRST
        assert x[torch.tensor([0, 2])].device == FIRST
        assert (x.double().view(3, 1)[0] + 1).device == FIRST
        assert x.new_zeros(2).device == torch.zeros_like(x).device == x.to(torch.float64).device == FIRST
        assert (x.to(y) + y).device == x.to("cuda:1", torch.float64).device == SECOND
        assert x.cpu().numpy().sum() == 3
        assert devices.waits == 1
        assert bool(x.any())
        assert devices.waits == 2
    assert x.device == torch.device("cpu")
    assert (x * y).tolist() == [1, 1, 1]


def test_gradients_cross_with_what_was_moved():
    with PretendedDevices():
        x = torch.ones(3, device="cuda:0", requires_grad=True)
        y = (x * 2).to("cuda:1")
        (gradient,) = torch.autograd.grad((y * torch.ones(3, device="cuda:1")).sum(), x)
        assert gradient.device == FIRST
        assert gradient.tolist() == [2, 2, 2]


def test_a_model_that_mixes_is_noticed():
    with PretendedDevices() as devices:
        model = built("fused")
        spread(devices, model)
        devices.put(model.layers[1].query.weight.data, "cuda:2")
        with pytest.raises(RuntimeError, match="same device"):
            answer_logits(model, there(toy_batch()))


# -- the library


@layouts
@pytest.mark.parametrize("head", [FIRST, SECOND])
@pytest.mark.parametrize(
    "options", [{}, {"fisher": "mc"}, {"fisher": "empirical", "approximation": "reduce"}, {"sketch": "rsvd"}], ids=str
)
def test_curvature_and_prediction(layout, head, options):
    batches = split(toy_batch(num_rows=6), 4, 2)

    def answers(model, batches):
        factors = collect_factors(model, answer_logits, batches, rank=3, **options)
        posterior = LaplacePosterior(factors, torch.tensor([0.5, 1.0, 2.0]))
        return factors, [posterior.logit_covariance(model, answer_logits, batch) for batch in batches]

    expected = answers(built(layout), batches)
    with PretendedDevices() as devices:
        model = spread(devices, built(layout), head)
        factors, found = answers(model, [there(batch) for batch in batches])
        assert [layer.a_basis.device for layer in factors.layers] == [FIRST, SECOND, FIRST]
        assert {part.device for pair in found for part in pair} == {head}
        assert weight_fingerprint(model, find_expert_layers(model)) == expected[0].fingerprint
        on_cpu = collect_factors(model, answer_logits, [there(batches[0])], rank=3, device="cpu", **options)
        assert {t.device.type for layer in on_cpu.layers for t in layer.tensors().values()} == {"cpu"}
    for layer, wanted in zip(factors.layers, expected[0].layers, strict=True):
        for name in ("slots", "a_eigenvalues", "g_eigenvalues", "a_trace", "g_trace"):
            close(getattr(layer, name), getattr(wanted, name))
    for pair, wanted_pair in zip(found, expected[1], strict=True):
        for part, wanted_part in zip(pair, wanted_pair, strict=True):
            close(part, wanted_part)


@layouts
@pytest.mark.parametrize("offload", [False, True])
def test_factors_are_where_they_are_used(layout, offload):
    batch = toy_batch()
    with PretendedDevices() as devices:
        model = spread(devices, built(layout))
        factors = collect_factors(model, answer_logits, [there(batch)], rank=3).to("cpu")
        posterior = LaplacePosterior(factors, offload=offload)
        expected = posterior.logit_covariance(model, answer_logits, there(batch))[1]
        kept = [layer.a_basis.device for layer in posterior._bind(model).factors]
        assert kept == ([torch.device("cpu")] * 3 if offload else [FIRST, SECOND, FIRST])
        again = LaplacePosterior(factors, offload=not offload).logit_covariance(model, answer_logits, there(batch))[1]
        assert torch.equal(again, expected)


def test_rows_in_an_order_of_their_own():
    """Owners are read from gradients on one device and used on others."""
    batch = choice_batch()
    for layout in ("fused", "modules"):
        model = built(layout)
        factors = collect_factors(model, choices_permuted, [batch], rank=3, approximation="reduce")
        expected = LaplacePosterior(factors).logit_covariance(model, choices_permuted, batch)[1]
        with PretendedDevices() as devices:
            model = spread(devices, built(layout))
            factors = collect_factors(model, choices_permuted, [there(batch)], rank=3, approximation="reduce")
            found = LaplacePosterior(factors).logit_covariance(model, choices_permuted, there(batch))[1]
        close(found, expected)


@layouts
def test_a_layer_that_is_not_reached_at_first(layout):
    """Its sums are made where the layer is, and later slots find them there."""
    batches = split(toy_batch(num_rows=6), 3, 3)

    def class_logits(model, batch):
        if batch["first"]:
            layers, model.layers = model.layers, model.layers[:1]
        try:
            return answer_logits(model, batch)
        finally:
            if batch["first"]:
                model.layers = layers

    def run(model, batches):
        marked = [{**batch, "first": index == 0} for index, batch in enumerate(batches)]
        factors = collect_factors(model, class_logits, marked, rank=3)
        return [LaplacePosterior(factors).logit_covariance(model, class_logits, batch)[1] for batch in marked]

    expected = run(built(layout), batches)
    with PretendedDevices() as devices:
        found = run(spread(devices, built(layout)), [there(batch) for batch in batches])
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize(
    ("layout", "options"),
    [("fused", {}), ("modules", {"factor_dtype": "bfloat16", "offload": True})],
    ids=["fused", "modules, lean"],
)
def test_fitting_and_evaluating_with_every_method(layout, options):
    methods = [method.with_defaults(Curvature(rank=3, **options)) for method in METHODS]
    train, calibration, test = split(toy_batch(num_rows=130), 20, 104, 6)

    def run(model, moved=dict):
        fitted = fit_methods(methods, model, answer_logits, [moved(train)], [moved(calibration)])
        found = evaluate(methods, fitted, model, answer_logits, [moved(test)])
        return fitted, {name: predictions.log_probs for name, predictions in found.items()}

    expected, log_probs = run(built(layout))
    with PretendedDevices() as devices:
        fitted, found = run(spread(devices, built(layout)), there)
        assert all(value.device.type == "cpu" for value in found.values())
        states = [fitted.state_of(method) for method in methods]
        assert {value.device.type for state in states for value in state.values()} == {"cpu"}
    scalars = fitted.scalars(methods)
    assert len(scalars) > len(METHODS)
    for name, value in expected.scalars(methods).items():
        if name.startswith("posterior/"):
            assert scalars[name] == pytest.approx(value, rel=1e-6), name
    for method in methods:
        if method.name != "mc_dropout":  # each device has a stream of its own
            torch.testing.assert_close(found[method.name], log_probs[method.name], rtol=1e-5, atol=1e-7)
    assert fitted.fingerprint == expected.fingerprint


def test_masks_of_dropout_differ_between_devices():
    with PretendedDevices():
        dropout = _Dropout(0.5, seed=0)
        masks = [dropout(torch.ones(1000, device=device), training=False).cpu() for device in (FIRST, SECOND, FIRST)]
        assert not torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])


@layouts
def test_distances(layout):
    expected = squared_distances(built(layout), find_expert_layers(built(layout)), None)
    with PretendedDevices() as devices:
        model = spread(devices, built(layout))
        found = squared_distances(model, find_expert_layers(model), None)
    close(found, expected)


@layouts
def test_one_wait_a_device_for_the_sizes_of_groups(layout):
    """Twice as many layers wait no more often."""
    waits = []
    for num_layers in (3, 6):
        with PretendedDevices() as devices:
            model = spread(devices, built(layout, num_layers))
            for layer in model.layers[3:]:
                devices.put_module(layer, SECOND)
            posterior = LaplacePosterior(collect_factors(model, answer_logits, [there(toy_batch())], rank=3))
            posterior.batch_terms(model, answer_logits, there(toy_batch()))
            before = devices.waits
            posterior.batch_terms(model, answer_logits, there(toy_batch()))
            waits.append(devices.waits - before)
    assert waits[0] == waits[1]
