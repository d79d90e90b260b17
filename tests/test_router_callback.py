"""The callback that trains Bayesian routers in a user's module: gradients, what is attached, logged and refused."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import lightning as L
import pytest
import torch
from finetuner_cases import trainer as plain_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from router_cases import BETA, SEED, Gradients, OwnModule, UsersModule, batches, explicit, perturbed
from toy import ToyModule, loader, toy_model, trainer

from bmoe_lightning import BayesianMoECallback, RouterFinetuner, RouterTrainingCallback
from bmoe_lightning.experts import find_expert_layers, weight_fingerprint
from bmoe_lightning.routers import attached_routers, trained_routers


def run_once(folder, module, data, *callbacks, **options):
    found = Gradients()
    callback = RouterTrainingCallback(beta=BETA, seed=SEED, kind=module.bayesian_routers.options.kind)
    run = trainer(folder, [*callbacks, callback, found], max_epochs=1, limit_val_batches=0, **options)
    run.fit(module, data)
    return found.found, run


def same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    assert any(name.startswith("bayesian_routers.") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * 1e-2, msg=name)
    nets = [value for name, value in expected.items() if name.startswith("bayesian_routers.")]
    assert min(float(value.abs().max()) for value in nets) > 1e-5


class Scaled(MixedPrecision):
    """Scales losses as 16-mixed does on an accelerator, without its autocast."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def autocast_context_manager(self):
        return nullcontext()


CASES = {
    "plain": ({}, 1),
    "accumulated": ({"accumulate_grad_batches": 4}, 4),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 1),
    "scaled": ({"plugins": "scaled", "accumulate_grad_batches": 2}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loss_plus_beta_times_the_divergence(tmp_path, case):
    options, number = CASES[case]
    options = {**options, **({"plugins": [Scaled()]} if "plugins" in options else {})}
    data = batches(number)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if case == "bf16-mixed" else nullcontext
    make = UsersModule if case != "bf16-mixed" else lambda: UsersModule().float()
    expected = explicit(perturbed(make()), data, autocast=autocast)
    same(run_once(tmp_path, perturbed(make()), data, **options)[0], expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
def test_gradient_checkpointing_counts_the_divergence_once(tmp_path, checkpointing):
    data = batches(2)
    expected = explicit(perturbed(UsersModule()), data)
    module = perturbed(UsersModule(checkpointing))
    same(run_once(tmp_path, module, data, accumulate_grad_batches=2)[0], expected)


@pytest.mark.parametrize("calls_itself", [False, True])
def test_a_network_of_the_users_own(tmp_path, calls_itself):
    data = batches(2)
    expected = explicit(perturbed(OwnModule()), data)
    for checkpointing in (None, "plain", "reentrant"):
        module = perturbed(OwnModule(checkpointing, calls_itself=calls_itself))
        same(run_once(tmp_path, module, data, accumulate_grad_batches=2)[0], expected)


def test_padding_in_a_network_of_the_users_own():
    module, batch = perturbed(OwnModule(calls_itself=True)), next(iter(batches(1)))
    with trained_routers(module, module.bayesian_routers.nets, seed=SEED) as training:
        training.begin(0)
        module.class_logits(batch)
        module.network(batch["input_ids"], module.mask(batch))
        real = int(module.mask(batch).sum())
        assert 0 < real < batch["input_ids"].numel()
        assert training.num_tokens() == {0: 2 * real, 1: 2 * real}


def test_drawn_experts(tmp_path):
    data = batches(2)
    module = perturbed(UsersModule(), "temperature")
    module.bayesian_routers.probe(module, lambda: module.class_logits(next(iter(data)))[0])
    expected = explicit(module, data)
    same(run_once(tmp_path, perturbed(UsersModule(), "temperature"), data, accumulate_grad_batches=2)[0], expected)


class Runs(Callback):
    """Runs the model where other callbacks do."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            pl_module.class_logits(batch)


def test_calls_of_other_callbacks_are_no_part_of_the_step(tmp_path):
    data = batches(1)
    expected = explicit(perturbed(UsersModule()), data)
    same(run_once(tmp_path, perturbed(UsersModule()), data, Runs())[0], expected)
    late = Gradients()
    callback = RouterTrainingCallback(beta=BETA, seed=SEED)
    trainer(tmp_path, [callback, Runs(), late], max_epochs=1).fit(perturbed(UsersModule()), data)
    same(late.found, expected)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_attaches_trains_logs_and_saves(tmp_path):
    module, saver = ToyModule(), ModelCheckpoint(tmp_path, save_last=True)
    names = set(module.state_dict())
    callback = RouterTrainingCallback()
    options = {"max_epochs": 1, "enable_checkpointing": True}
    run = trainer(tmp_path, [callback, saver], **options)
    data = loader(32, 1, batch_size=8)
    run.fit(module, data, loader(16, 2))
    added = {f"bayesian_routers.{name}" for name in module.bayesian_routers.state_dict()}
    assert set(module.state_dict()) == names | added
    assert all(net.shift.any() for net in module.bayesian_routers.nets)
    assert {"router/kl", "router/changed", "router/scale_ratio", "val_loss"} <= set(run.callback_metrics)
    assert hooks(module.network) == 0
    assert not {"training_step", "configure_model"} & set(vars(module))
    fresh = ToyModule()
    result = trainer(tmp_path, [RouterTrainingCallback()], **options).test(
        fresh, loader(16, 3), ckpt_path=saver.last_model_path, verbose=False
    )
    assert "test_loss" in result[0]
    for name, value in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    with pytest.raises(ValueError, match="has Bayesian routers already"):
        trainer(tmp_path, [RouterTrainingCallback(hidden=3)], max_epochs=1).fit(fresh, data)


def test_a_checkpoint_of_the_users_module_is_its_own(tmp_path):
    class Momentum(ToyModule):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def run(epochs):
        return trainer(tmp_path, [RouterTrainingCallback(hidden=3)], max_epochs=epochs)

    path, data, options = tmp_path / "one.ckpt", loader(16, 1), {"verbose": False}
    whole, part, resumed = Momentum(), Momentum(), Momentum()
    run(2).fit(whole, data)
    first = run(1)
    first.fit(part, data)
    first.save_checkpoint(path)
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(Momentum().state_dict())
    loaded = Momentum.load_from_checkpoint(path)
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in loaded.state_dict().items())
    trainer(tmp_path, []).test(Momentum(), data, ckpt_path=path, **options)
    run(2).fit(resumed, data, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(ValueError, match="the checkpoint has Bayesian routers with"):
        trainer(tmp_path, [RouterTrainingCallback(hidden=4)]).fit(Momentum(), data, ckpt_path=path)
    for given, where in ((Momentum(), {"ckpt_path": path}), (part, {})):
        callback = RouterTrainingCallback(hidden=3, prior_scale=1.0)
        with pytest.raises(ValueError, match=r"trained with \(prior_scale, prior_unit\)"):
            trainer(tmp_path, [callback]).fit(given, data, **where)


class Late(ToyModule):
    """Builds its model in configure_model, and counts."""

    def __init__(self):
        super().__init__()
        self.made, self.network, self.count = self.network, None, 0

    def configure_model(self):
        self.network, self.count = self.made, self.count + 1


def test_a_model_that_is_built_late_and_what_is_left_after_an_exception(tmp_path):
    module = Late()

    class Stop(Callback):
        def on_train_batch_end(self, *_):
            raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        trainer(tmp_path, [RouterTrainingCallback(), Stop()]).fit(module, loader(16, 1))
    assert module.count == 1
    assert attached_routers(module) is not None
    assert hooks(module.network) == 0
    assert not {"training_step", "configure_model"} & set(vars(module))
    trainer(tmp_path, [RouterTrainingCallback()], fast_dev_run=True).fit(module, loader(16, 1), loader(16, 2))
    assert hooks(module.network) == 0


def test_validation_is_the_model_itself_and_frozen_weights_stay(tmp_path):
    class Frozen(UsersModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.bayesian_routers.parameters(), lr=0.1)

    module = Frozen()
    layers = find_expert_layers(module)
    before, data = weight_fingerprint(module, layers), loader(16, 2)
    run = trainer(tmp_path, [RouterTrainingCallback()], max_epochs=1)
    plain = run.validate(module, data, verbose=False)[0]["val_loss"]
    run.fit(module, loader(16, 1), data)
    assert run.callback_metrics["val_loss"].item() == plain
    assert run.validate(module, data, verbose=False)[0]["val_loss"] == plain
    assert weight_fingerprint(module, layers) == before


def test_methods_are_fitted_beside_it(tmp_path):
    module = ToyModule()
    methods = BayesianMoECallback(("map", "laplace_lpo"), dirpath=str(tmp_path))
    run = trainer(tmp_path, [methods, RouterTrainingCallback()], max_epochs=1)
    run.fit(module, loader(32, 1), loader(112, 2))
    result = run.test(module, loader(16, 3), verbose=False)[0]
    assert {"map/test/nll", "laplace_lpo/test/nll", "test_loss"} <= set(result)


def test_refusals(tmp_path):
    class Manual(ToyModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Other(ToyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

    class Nothing(L.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    compiled = ToyModule()
    compiled.network = torch.compile(compiled.network)
    cases = [
        (Manual(), ValueError, "optimizes manually"),
        (Other(), ValueError, r"parameters of the Bayesian routers are in no optimizer of Other"),
        (Nothing(), TypeError, "has no method class_logits"),
        (compiled, ValueError, "compiled"),
    ]
    for module, error, says in cases:
        with pytest.raises(error, match=says):
            plain_trainer(tmp_path, RouterTrainingCallback()).fit(module, loader(16, 1))
    with pytest.raises(ValueError, match="RouterFinetuner trains its Bayesian routers itself"):
        plain_trainer(tmp_path, RouterTrainingCallback()).fit(RouterFinetuner(toy_model(), [1, 2, 3]), loader(16, 1))
    with pytest.raises(ValueError, match="layers must be a sequence"):
        RouterTrainingCallback(layers=1)
    with pytest.raises(ValueError, match="router 0 twice"):
        RouterTrainingCallback(layers=[0, 0])
    with pytest.raises(ValueError, match="unknown kind"):
        RouterTrainingCallback("dropout")
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        RouterTrainingCallback(seed=-1)
