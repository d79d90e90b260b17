"""The training of Bayesian routers beside a model: what is trained, logged, saved, restored and refused."""

import logging
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from finetuner_cases import CALIBRATION, EXPERTS, TEST, TRAIN, copied, prepare, qwen, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F

from bmoe_lightning import BayesianMoECallback, RouterFinetuner
from bmoe_lightning.data import MultipleChoiceDataModule, Splits, get_prompt_format, train_word_tokenizer
from bmoe_lightning.experts import find_expert_layers, weight_fingerprint
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import get_method
from bmoe_lightning.routers import find_routers, intercepted_routers, step_noise

KINDS = ("mean_field", "full_covariance", "temperature")


def finetuner(model=None, **options):
    defaults = {"learning_rate": 0.01, "router_learning_rate": 0.02, "num_samples": 2}
    return RouterFinetuner(qwen() if model is None else model, **{**defaults, **options})


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [get_prompt_format("letters").render(question) for question in (*TRAIN, *CALIBRATION, *TEST)]
    return train_word_tokenizer(prompts, max_vocab=100)


@pytest.fixture
def data(tokenizer):
    return MultipleChoiceDataModule(
        Splits(TRAIN, CALIBRATION, TEST), tokenizer, prompt="letters", batch_size=4, eval_batch_size=3
    )


def moved(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("kind", "train"), [*((kind, "routers_and_experts") for kind in KINDS), ("mean_field", "routers")]
)
def test_trains_the_bayesian_routers_and_maybe_the_experts(data, tmp_path, kind, train):
    module = finetuner(kind=kind, train=train)
    module.configure_model()
    before = copied(module)
    run = trainer(tmp_path)
    run.fit(module, datamodule=data)
    routers = {f"routers.{name}" for name, _ in module.routers.named_parameters()}
    expected = routers | (EXPERTS if train == "routers_and_experts" else set())
    assert set(module.trained_parameters()) == expected
    assert moved(module, before) == expected
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == expected
    groups = run.optimizers[0].param_groups
    assert [group["initial_lr"] for group in groups] == ([0.02] if train == "routers" else [0.01, 0.02])
    logged = {"router/changed", "train/loss", "val/loss", "val/acc"}
    logged |= {"router/gate_entropy"} if kind == "temperature" else {"router/kl", "router/scale_ratio"}
    assert logged <= set(run.callback_metrics)
    assert 0 < run.callback_metrics["router/changed"] <= 1
    assert hooks(module.model) == 0


def expected_step(module, batch, noise_of, beta):
    """The loss of the first step, written out for routers at their prior."""
    module.eval()
    gaps, real = {}, batch["attention_mask"].bool().flatten()
    routers = find_routers(module.model)

    def measure(router, _u, logits):
        top = logits[real].topk(3, dim=-1).values
        gaps[router.index] = (top[:, 1] - top[:, 2]).median()
        return logits

    with torch.no_grad(), intercepted_routers(module.model, routers, measure):
        module.class_logits(batch)
    module.train()

    def replace(router, _u, logits):
        logits = logits.clone()
        logits[real] = logits[real] + 2 * scales[router.index] * noise_of(router, int(real.sum()))
        return logits

    scales = [float(net.prior_scale) / 2 for net in module.routers]
    for index, scale in enumerate(scales):
        assert scale == pytest.approx(float(gaps[index]), rel=0.1)
    with intercepted_routers(module.model, routers, replace):
        logits, labels = module.class_logits(batch)
    return F.cross_entropy(logits, labels), beta


def test_the_first_step_is_one_sample_of_noise_in_units_of_the_gap(data, tmp_path, caplog):
    module, seen = finetuner(train="routers", beta=0.5, seed=3), {}

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not seen:
                seen.update(loss=outputs["loss"].detach(), task=trainer.callback_metrics["train/loss"], batch=batch)

    with caplog.at_level(logging.INFO, logger="bmoe_lightning"):
        trainer(tmp_path, Note(), num_sanity_val_steps=0, limit_train_batches=1).fit(module, datamodule=data)
    assert "prior scale of the noise of router logits" in caplog.text
    # At the prior the divergence is zero, and the loss is that of the task.
    torch.testing.assert_close(seen["loss"], seen["task"])
    fresh = finetuner(train="routers", seed=3)
    fresh.configure_model()
    prepare(fresh, data)
    fresh.routers.set_scales([float(net.prior_scale) for net in module.routers])
    loss, _ = expected_step(fresh, seen["batch"], lambda r, n: step_noise((n, 4), seed=3, router=r.index, step=0), 0.5)
    torch.testing.assert_close(seen["task"], loss.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "expected"), [({"prior_unit": "one"}, 1.5), ({"kind": "temperature"}, None)])
def test_the_scale_of_the_papers(data, tmp_path, options, expected):
    module = finetuner(**options, prior_scale=1.5)
    trainer(tmp_path, limit_train_batches=1).fit(module, datamodule=data)
    found = [net.hyperparameters().get("prior_scale") for net in module.routers]
    assert found == [expected] * 2


def test_before_training_the_model_is_itself_and_class_logits_always(data, tmp_path):
    module = finetuner()
    prepare(module, data)
    batch = next(iter(data.test_dataloader()))
    run = trainer(tmp_path)
    plain = module.eval().class_logits(batch)[0].log_softmax(-1)
    (first, *_) = run.predict(module, data.test_dataloader())
    torch.testing.assert_close(first["log_probs"], plain.detach(), rtol=1e-5, atol=1e-6)
    run.validate(module, datamodule=data, verbose=False)
    run.fit(module, datamodule=data)
    trained = module.eval().class_logits(batch)[0].log_softmax(-1)
    (one, *_), (again, *_) = (run.predict(module, data.test_dataloader()) for _ in range(2))
    assert torch.equal(one["log_probs"], again["log_probs"])
    assert not torch.allclose(one["log_probs"], trained.detach(), atol=1e-4)
    module.num_samples = 0
    mean = run.predict(module, data.test_dataloader())[0]["log_probs"]
    assert not torch.allclose(one["log_probs"], mean, atol=1e-5)
    result = run.test(module, datamodule=data, verbose=False)[0]
    assert {"test/loss", "test/acc"} <= set(result)
    assert hooks(module.model) == 0


def test_trained_alone_it_leaves_the_weights_as_they_are(data, tmp_path):
    module = finetuner(train="routers")
    layers = find_expert_layers(module.model)
    before = weight_fingerprint(module.model, layers)
    trainer(tmp_path).fit(module, datamodule=data)
    assert weight_fingerprint(module.model, layers) == before


class Stop(Callback):
    def __init__(self, error):
        self.error = error

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_nothing_is_left_in_the_model_after_an_exception(data, tmp_path, error):
    module = finetuner()
    state = set(module.model.state_dict())
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, Stop(error)).fit(module, datamodule=data)
    assert hooks(module.model) == 0
    assert set(module.model.state_dict()) == state
    trainer(tmp_path, fast_dev_run=True).fit(module, datamodule=data)
    assert hooks(module.model) == 0


def test_global_random_states_are_left_alone(data, tmp_path):
    """Apart from what the trainer draws itself, to shuffle."""
    data.setup()
    loader, states = data.curvature_dataloader(), []
    module = finetuner(answer_token_ids=data.answer_token_ids)

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            states.append(torch.get_rng_state())

        def on_train_batch_end(self, *_):
            states.append(torch.get_rng_state())

    trainer(tmp_path, Note()).fit(module, loader)
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("kind", ["mean_field", "temperature"])
def test_a_checkpoint_holds_what_was_trained_and_predicts_the_same(data, tmp_path, kind):
    module, saver = finetuner(kind=kind, train="routers"), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, saver)
    run.fit(module, datamodule=data)
    checkpoint = torch.load(saver.last_model_path, weights_only=True)
    assert set(checkpoint["state_dict"]) == module.stored_names()
    assert not any(name.startswith("model.") for name in checkpoint["state_dict"])
    loaded = RouterFinetuner.load_from_checkpoint(saver.last_model_path, model=qwen())
    assert loaded.hparams == module.hparams
    expected, found = (run.predict(m, data.test_dataloader())[0]["log_probs"] for m in (module, loaded))
    assert torch.equal(found, expected)
    other = finetuner(kind="full_covariance" if kind == "mean_field" else "mean_field", train="routers")
    with pytest.raises(RuntimeError, match="does not contain the tensors that this module trains"):
        trainer(tmp_path).test(other, datamodule=data, ckpt_path=saver.last_model_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_belongs_to_the_routers_beside_which_it_was_trained(data, tmp_path, precision):
    options, path = {"train": "routers"}, tmp_path / "last.ckpt"
    beside = partial(qwen, moe_intermediate_size=16)  # grouped products in bfloat16 need as many
    run = trainer(tmp_path, precision=precision, max_epochs=1)
    run.fit(finetuner(beside(), **options), datamodule=data)
    run.save_checkpoint(path)
    # Rounded or not, they are the same weights.
    for same in ("32-true", "bf16-true"):
        trainer(tmp_path, precision=same).test(
            finetuner(beside(), **options), datamodule=data, ckpt_path=path, verbose=False
        )
    model = beside()
    with torch.no_grad():
        model.get_submodule(find_routers(model)[1].name).weight[0] += 0.5
    with pytest.raises(ValueError, match="not those beside which the Bayesian routers were trained"):
        trainer(tmp_path).test(finetuner(model, **options), datamodule=data, ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match="not those beside which"):
        RouterFinetuner.load_from_checkpoint(path, model=model)
    other = finetuner(beside(), **options, prior_scale=1.0)
    with pytest.raises(ValueError, match=r"trained with \(prior_scale, prior_unit\) = \(2.0, 'gap'\)"):
        trainer(tmp_path, precision=precision, max_epochs=2).fit(other, datamodule=data, ckpt_path=path)


def test_resume_goes_on_where_training_stopped(data, tmp_path):
    data.setup()
    options = {"answer_token_ids": data.answer_token_ids}
    loader = data.curvature_dataloader()  # in order, so that an epoch is the same whenever it comes
    whole, saver = finetuner(**options), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, saver, max_epochs=2).fit(whole, loader)
    resumed = finetuner(**options)
    trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    for name in whole.trained_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), whole.get_parameter(name))
    assert [float(net.prior_scale) for net in resumed.routers] == [float(net.prior_scale) for net in whole.routers]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"precision": "bf16-mixed"}, torch.float32),
        ({"accumulate_grad_batches": 2}, torch.float32),
        ({"precision": "bf16-true"}, torch.bfloat16),
    ],
)
def test_precisions_and_accumulation(data, tmp_path, options, dtype):
    module = finetuner(qwen(moe_intermediate_size=16), learning_rate=1e-3)
    run = trainer(tmp_path, **options)
    run.fit(module, datamodule=data)
    assert {p.dtype for p in module.model.parameters()} == {dtype}
    assert {p.dtype for p in module.routers.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in module.parameters())
    assert math.isfinite(run.callback_metrics["router/kl"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(data, tmp_path, reentrant):
    data.setup()
    loader, found = data.curvature_dataloader(), []
    for checkpointing in (False, True):
        module = finetuner(answer_token_ids=data.answer_token_ids, train="routers")
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            if reentrant:
                module.model.enable_input_require_grads()
                with pytest.raises(RuntimeError, match="use_reentrant"):
                    trainer(tmp_path).fit(module, loader)
                return
        trainer(tmp_path).fit(module, loader)
        found.append(module.trained_parameters())
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_beta_holds_the_noise_near_its_prior(data, tmp_path):
    divergences = []
    for beta in (0.0, 100.0):
        module = finetuner(train="routers", beta=beta, router_learning_rate=0.05)
        run = trainer(tmp_path, max_epochs=4)
        run.fit(module, datamodule=data)
        divergences.append(float(run.callback_metrics["router/kl"]))
    assert divergences[1] < divergences[0] / 5


def test_noise_that_has_collapsed_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr("bmoe_lightning.routers.gaussian._PATIENCE", 2)
    monkeypatch.setattr("bmoe_lightning.routers.gaussian._COLLAPSED", 1.5)  # it starts at 1
    module = finetuner(train="routers")
    with pytest.warns(UserWarning, match=r"the noise of 2 of 2 Bayesian routers has collapsed.*of its prior scale"):
        trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=data)


def test_some_routers_alone(data, tmp_path):
    module = finetuner(layers=[1], train="routers", kind="full_covariance", rank=2)
    trainer(tmp_path).fit(module, datamodule=data)
    assert [net.router.index for net in module.routers] == [1]
    assert module.routers[0].head.shape[0] == 4 * 3


def test_methods_use_the_model_or_the_routers_that_were_trained_with_it(data, tmp_path):
    module = finetuner(seed=3)
    method = get_method("mean_field_router")
    method = replace(method, training="with_model", num_samples=2)
    callback = BayesianMoECallback(("map", "laplace_lpo", method), dirpath=str(tmp_path), seed=3)
    run = trainer(tmp_path, callback, log_every_n_steps=1)
    run.fit(module, datamodule=data)
    result = run.test(module, datamodule=data, verbose=False)[0]
    assert math.isfinite(result["laplace_lpo/test/nll"])
    # The same routes, whose average the module's own step reports.
    assert result["mean_field_router/test/nll"] == pytest.approx(result["test/loss"], rel=1e-4)
    assert result["mean_field_router/test/nll"] != pytest.approx(result["map/test/nll"], rel=1e-4)
    batch = next(iter(data.test_dataloader()))
    plain = module.eval().class_logits(batch)[0].log_softmax(-1).double()
    found = next(iter(callback.predictions.values()))["map"].log_probs[: len(plain)]
    torch.testing.assert_close(found, plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("added", [False, True], ids=["together", "added later"])
def test_a_fit_to_routers_that_were_trained_further_is_not_taken_for_theirs(data, tmp_path, added):
    module = finetuner(train="routers")
    trained = replace(get_method("mean_field_router"), training="with_model", num_samples=2)
    folder = str(tmp_path / "fit")

    def callback(*methods):
        return BayesianMoECallback(methods, dirpath=folder)

    first = callback("map", "temperature") if added else callback("map", trained)
    trainer(tmp_path, first).fit(module, datamodule=data)
    both = callback("map", trained)
    both.fit_posterior(module, trainer=trainer(tmp_path, both), datamodule=data)
    trainer(tmp_path, callback("map", trained)).test(module, datamodule=data, verbose=False)
    with torch.no_grad():
        module.routers[0].shift.add_(0.1)
    for again in (both, callback("map", trained)):
        with pytest.raises(WeightMismatchError, match="other weights"):
            again.fit_posterior(module, trainer=trainer(tmp_path, again), datamodule=data)
        with pytest.raises(WeightMismatchError, match="other weights"):
            trainer(tmp_path, again).test(module, datamodule=data, verbose=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "dropout"}, "unknown kind of Bayesian router 'dropout'; valid are mean_field, full_cov"),
        ({"train": "all"}, "unknown train 'all'"),
        ({"rank": 2}, "rank=2 is the rank of a covariance"),
        ({"layers": [2]}, r"layers names the router 2, .* routers 0 to 1"),
        ({"layers": 1}, r"layers must be a sequence of indices of routers, got 1; pass such as layers=\[1\]"),
        ({"layers": [0, 0]}, "layers names the router 0 twice"),
        ({"kind": "full_covariance", "rank": 5}, "rank=5 is larger than the number of experts of a router, 4"),
        ({"beta": -1.0}, "beta must be"),
        ({"prior_scale": 0.0}, "prior_scale must be a positive"),
        ({"prior_unit": "std"}, "unknown prior_unit"),
        ({"num_samples": -1}, "num_samples must be 0 or more"),
        ({"router_learning_rate": 0.0}, "router_learning_rate must be positive"),
        ({"kind": "full_covariance", "rank": 0}, "rank of at least 1"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"score_function": True}, "routers of kind 'mean_field' do not have"),
    ],
)
def test_refuses_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        finetuner(**options)


def test_ties_give_no_scale(data, tmp_path):
    model = qwen()
    for router in find_routers(model):
        model.get_submodule(router.name).weight.data.zero_()
    with pytest.raises(ValueError, match=r"are equal, so that their gap .* pass prior_unit='one'"):
        trainer(tmp_path).fit(finetuner(model), datamodule=data)


def test_a_step_outside_of_training_is_refused(data):
    module = finetuner()
    with pytest.raises(RuntimeError, match=r"call trainer\.fit"):
        module.training_step({}, 0)
