"""Weights beside the transformers model: those that the logits depend on are known, and no others."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from forked_processes import run as run_in_processes
from oracles.models import tiny_qwen
from oracles.own_models import OwnMixture
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.used_weights import UsedWeights
from bmoe_lightning.experts.weight_comparison import compare_outside
from bmoe_lightning.experts.weight_record import outside_record
from bmoe_lightning.laplace import LaplacePosterior, WeightMismatchError
from bmoe_lightning.methods import CheckpointEnsemble, TemperatureScaling, fit_methods, save_snapshot

LABELS = torch.tensor([0, 1, 2, 0])
BATCH = {"ids": torch.arange(1, 21).view(4, 5), "labels": LABELS}


class Kernel(torch.autograd.Function):
    """Stands for one written in Triton, which no function of torch sees."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(weight)
        return states @ weight.mT

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class Classifier(nn.Module):
    """A head, and what cannot affect the logits, beside a transformers model."""

    def __init__(self, head=None, seed=0):
        super().__init__()
        self.backbone = tiny_qwen(dtype=torch.float32).model
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = head() if head else nn.Linear(16, 3)
            self.teacher = nn.Linear(16, 3).requires_grad_(False)
            self.auxiliary = nn.Linear(16, 3)
        self.average = copy.deepcopy(self.head)

    def classify(self, states):
        return self.head(states)

    def forward(self, batch):
        states = self.backbone(input_ids=batch["ids"], use_cache=False).last_hidden_state[:, -1]
        # None of these reads a value.
        states = states.to(self.auxiliary.weight.dtype).to(self.auxiliary.weight.device)
        assert self.auxiliary.weight.shape[1] == self.auxiliary.weight.size(1) == states.shape[1]
        assert self.auxiliary.weight.grad is None
        return self.classify(states), batch["labels"]


def class_logits(model, batch):
    return model(batch)


def used_by(model, batch=BATCH):
    used = UsedWeights(model, find_expert_layers(model))
    used.observed(class_logits)(model, batch)
    return set(used.record().samples)


def part(name, build, classify):
    return pytest.param(build, classify, id=name)


def scaled():
    module = nn.Linear(16, 3)
    module.scale = nn.Parameter(torch.ones(()))
    return module


@pytest.mark.parametrize(
    ("build", "classify"),
    [
        part("module", lambda: nn.Linear(16, 3), lambda head, x: head(x)),
        part("function", lambda: nn.Linear(16, 3), lambda head, x: nn.functional.linear(x, head.weight, head.bias)),
        part("operator", lambda: nn.Linear(16, 3), lambda head, x: x @ head.weight.T + head.bias),
        part("data", lambda: nn.Linear(16, 3), lambda head, x: x @ head.weight.data.t() + head.bias.detach()),
        part("rows", lambda: nn.Linear(16, 3, bias=False), lambda head, x: torch.stack([x @ w for w in head.weight]).T),
        part("number", scaled, lambda head, x: head(x) * head.scale.item()),
        part("own function", lambda: nn.Linear(16, 3, bias=False), lambda head, x: Kernel.apply(x, head.weight)),
        part("norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)), lambda head, x: head(x)),
        part("lstm", lambda: nn.LSTM(16, 3), lambda head, x: head(x)[0]),
        part("attention", lambda: nn.TransformerEncoderLayer(16, 2, 8), lambda head, x: head(x)[:, :3]),
        part("compiled", lambda: torch.compile(nn.Linear(16, 3), backend="eager"), lambda head, x: head(x)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True])
def test_however_the_head_is_computed(build, classify, frozen):
    model = Classifier(build).requires_grad_(not frozen)
    model.classify = lambda states: classify(model.head, states)
    head = {name.replace("._orig_mod", "") for name, _ in model.named_parameters() if name.startswith("head.")}
    assert used_by(model) == head


class Normalised(nn.Module):
    """A head with running statistics, a counter of its calls, and buffers that it does not use."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("unused", torch.zeros(3))
        self.register_buffer("derived", torch.zeros(3), persistent=False)

    def forward(self, states):
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.linear(self.norm(states)) + self.shift + self.derived + 0 * (self.calls + self.replaced)


def test_buffers_that_it_reads_and_does_not_write():
    model = Classifier(Normalised).eval()
    expected = {"norm.running_mean", "norm.running_var", "norm.weight", "norm.bias", "linear.weight", "linear.bias"}
    assert used_by(model) == {f"head.{name}" for name in (*expected, "shift")}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_head_in_torchscript():
    model = Classifier()
    model.head = torch.jit.script(model.head)
    assert used_by(model) == {"head.weight", "head.bias"}


def test_a_head_that_some_batches_use():
    model = Classifier()
    layers = find_expert_layers(model)
    used = UsedWeights(model, layers)
    logits = used.observed(lambda m, b: (m.auxiliary if b.get("other") else m.head)(b["x"]))
    for number in range(20):
        logits(model, {"x": torch.ones(1, 16), "other": number > 4})
    assert {name.split(".")[0] for name in used.record().samples} == {"head", "auxiliary"}


def test_without_a_call_all_are_recorded():
    model = Classifier()
    used = UsedWeights(model, find_expert_layers(model))
    assert {name.split(".")[0] for name in used.record().samples} == {"head", "teacher", "auxiliary", "average"}


def test_tied_ones_are_those_of_the_model_itself():
    model = Classifier()
    model.head = nn.Linear(16, 30)
    model.head.weight = model.backbone.get_input_embeddings().weight
    assert used_by(model) == {"head.bias"}


def test_those_that_have_no_values_are_left_out():
    model = Classifier()
    model.teacher.to("meta")
    model.later = nn.LazyLinear(3)
    assert used_by(model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("whole", [False, True])
def test_offloaded_by_accelerate(whole):
    accelerate = pytest.importorskip("accelerate")
    model, expected = Classifier(), outside_record(Classifier(), find_expert_layers(Classifier()))
    accelerate.cpu_offload(model if whole else model.head, execution_device="cpu")
    used = UsedWeights(model, find_expert_layers(model))
    used.observed(lambda model, _: model.head(torch.ones(4, 16)))(model, BATCH)
    assert used.record() == expected.part({"head.weight", "head.bias"})


class Holder(nn.Module):
    def __init__(self, name, part):
        super().__init__()
        self.add_module(name, part)

    def forward(self, batch):
        return next(self.children())(batch)


class TestComparison:
    def compare(self, fitted, present):
        used = UsedWeights(fitted, find_expert_layers(fitted))
        used.observed(
            lambda *_: class_logits(next((c for c in fitted.children() if hasattr(c, "logits")), fitted), BATCH)
        )(fitted, BATCH)
        return compare_outside(used.record(), outside_record(present, find_expert_layers(present)))

    @pytest.mark.parametrize("nested", ["neither", "fitted", "present", "both"])
    @pytest.mark.parametrize("renamed", [False, True])
    def test_under_other_names(self, nested, renamed):
        fitted, same, other = Classifier(), Classifier(), Classifier(seed=1)
        for model in (same, other):
            model.teacher, model.auxiliary = nn.Linear(2, 2), nn.Linear(3, 3)
            if renamed:
                model.encoder = model.backbone
                del model.backbone
                del model.average
        if nested in ("fitted", "both"):
            fitted = Holder("model", fitted)
        if nested in ("present", "both"):
            same, other = Holder("net", same), Holder("net", other)
        found = self.compare(fitted, same)
        if nested == "both" and renamed:  # no name is the same
            assert (found.same, len(found.left_out)) == (True, 2)
            return
        assert (found.same, found.compared, found.left_out) == (True, 2, ())
        assert {name.split(".")[-2] for name in self.compare(fitted, other).differing} == {"head"}

    def test_alone_it_is_not_compared(self):
        found = self.compare(Classifier(), Classifier().backbone)
        assert (found.same, found.compared, found.left_out) == (True, 0, ("head.bias", "head.weight"))

    def test_a_cast_is_named(self):
        found = self.compare(Classifier(), Classifier().bfloat16())
        assert (found.same, found.casts) == (True, ((torch.float32, torch.bfloat16),))

    def test_with_adapters_that_were_merged(self):
        peft = pytest.importorskip("peft")
        model = Classifier()
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"], r=2, init_lora_weights=False))
        used = UsedWeights(adapted, find_expert_layers(adapted))
        used.observed(lambda m, b: class_logits(m.base_model.model, b))(adapted, BATCH)
        before = copy.deepcopy(adapted).unload()
        merged = adapted.merge_and_unload()
        for there, same in ((merged, True), (before, False)):
            found = compare_outside(used.record(), outside_record(there, find_expert_layers(there)))
            assert (found.same, found.compared) == (same, 2)

    def test_buffers_of_a_model_that_is_not_from_transformers(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    self.block, self.head = OwnMixture(), nn.BatchNorm1d(6)

        model, other = Own().eval(), Own().eval()
        used = UsedWeights(model, find_expert_layers(model))
        used.observed(lambda model, x: (model.head(model.block(x)), None))(model, torch.ones(2, 6))
        assert set(used.record().samples) == {"head.running_mean", "head.running_var"}
        assert compare_outside(used.record(), outside_record(other, find_expert_layers(other))).same
        other.head.running_mean += 0.1
        found = compare_outside(used.record(), outside_record(other, find_expert_layers(other)))
        assert found.differing == ("head.running_mean",)


class TestPosterior:
    def fit(self, model, **options):
        return LaplacePosterior(collect_factors(model, class_logits, [BATCH] * 3, rank=3, **options))

    def test_another_head_is_refused_and_others_parts_are_not(self, tmp_path):
        model = Classifier()
        self.fit(model).save(tmp_path / "posterior.safetensors")
        posterior = LaplacePosterior.load(tmp_path / "posterior.safetensors")
        assert set(posterior.factors.weights.outside.samples) == {"head.weight", "head.bias"}
        expected = posterior.predict(model, class_logits, BATCH)
        with torch.no_grad():
            for unused in (model.teacher, model.auxiliary, model.average):
                unused.weight.add_(1)
        torch.testing.assert_close(posterior.predict(model, class_logits, BATCH), expected)
        with pytest.raises(WeightMismatchError, match=r"2 parameters differ.* head\.bias, head\.weight"):
            posterior.predict(Classifier(seed=1), class_logits, BATCH)
        with torch.no_grad():
            model.head.weight[0, 0] += 1e-3  # in this process, after it was bound
        with pytest.raises(WeightMismatchError, match=r"1 parameters differ.*head\.weight"):
            posterior.predict(model, class_logits, BATCH)

    @pytest.mark.parametrize("buffer", ["norm.running_mean", "norm.running_var", "shift"])
    def test_another_buffer_of_the_head_is_refused(self, tmp_path, buffer):
        model = Classifier(Normalised).eval()
        self.fit(model).save(tmp_path / "posterior.safetensors")
        posterior = LaplacePosterior.load(tmp_path / "posterior.safetensors")
        same = Classifier(Normalised).eval()
        same.head.unused += 1
        expected = posterior.predict(model, class_logits, BATCH)
        torch.testing.assert_close(posterior.predict(same, class_logits, BATCH), expected)
        other = Classifier(Normalised).eval()
        other.head.get_buffer(buffer).add_(0.1)
        with pytest.raises(WeightMismatchError, match=rf"1 parameters differ.*head\.{buffer}"):
            posterior.predict(other, class_logits, BATCH)

    def test_served_with_the_transformers_model_alone(self, tmp_path, caplog):
        model = Classifier()
        posterior = self.fit(model)

        def logits(backbone, batch):
            states = backbone(input_ids=batch["ids"], use_cache=False).last_hidden_state[:, -1]
            return model.head(states), None

        with caplog.at_level("WARNING"):
            found = posterior.predict(Classifier().backbone, logits, BATCH)
        torch.testing.assert_close(found, posterior.predict(model, class_logits, BATCH))
        assert "are not compared: head.bias, head.weight." in caplog.text

    def test_a_killed_pass_resumes_with_the_same_head_only(self, tmp_path):
        model, path = Classifier(), tmp_path / "sums.safetensors"

        def killed():
            yield from [BATCH] * 2
            raise KeyboardInterrupt

        options = {"rank": 3, "checkpoint": path, "checkpoint_every": 1}
        with pytest.raises(KeyboardInterrupt):
            collect_factors(model, class_logits, killed(), **options)
        with pytest.raises(ValueError, match=r"other weights than the model has .*head\.bias"):
            collect_factors(Classifier(seed=1), class_logits, [BATCH] * 3, **options)
        with torch.no_grad():
            model.average.weight.add_(1)
        found = collect_factors(model, class_logits, [BATCH] * 3, **options)
        assert set(found.weights.outside.samples) == {"head.weight", "head.bias"}
        done = collect_factors(model, class_logits, [BATCH] * 3, **options)  # without a call
        assert done.weights == found.weights


class TestCompletedFits:
    """Of a release that recorded no weights outside of the transformers model."""

    def earlier(self, model):
        fit = fit_methods([TemperatureScaling()], model, class_logits, [], [BATCH] * 4)
        return replace(fit, weights=replace(fit.weights, outside=None), methods={}, calibration=None)

    def test_by_a_method_without_a_pass(self, tmp_path):
        """No call of `class_logits` has told which weights it uses, so that a teacher may differ."""
        model = Classifier()
        save_snapshot(tmp_path / "s", {"head.weight": model.head.weight.detach()})
        found = fit_methods(
            [CheckpointEnsemble()], model, class_logits, [], earlier=self.earlier(model), snapshots=[tmp_path / "s"]
        )
        assert found.weights.outside is None
        with torch.no_grad():
            model.teacher.weight.add_(1)
        assert found.has_weights_of(model)

    def test_by_a_method_with_a_pass(self):
        model = Classifier()
        found = fit_methods([TemperatureScaling()], model, class_logits, [], [BATCH] * 4, earlier=self.earlier(model))
        assert set(found.weights.outside.samples) == {"head.weight", "head.bias"}

    def test_a_new_fit_without_a_pass_is_of_all_weights(self, tmp_path):
        model = Classifier()
        save_snapshot(tmp_path / "s", {"head.weight": model.head.weight.detach()})
        found = fit_methods([CheckpointEnsemble()], model, class_logits, [], snapshots=[tmp_path / "s"])
        assert {name.split(".")[0] for name in found.weights.outside.samples} >= {"head", "teacher"}


def with_shards(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))

    def sharded(**options):
        model = Classifier(**options)
        model.teacher.weight.data += rank  # replicated, and in nobody's way
        for block in model.backbone.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(model.teacher.parameters()))
        return model

    plain = collect_factors(Classifier(), class_logits, [BATCH], rank=3)
    found = collect_factors(sharded(), class_logits, [BATCH], rank=3, distributed=True)
    assert set(found.weights.outside.samples) == {"head.weight", "head.bias"}
    assert found.weights.outside == plain.weights.outside
    for factors in (plain, found):
        LaplacePosterior(factors).check_weights(sharded())
        with pytest.raises(WeightMismatchError, match=r"2 parameters differ.*head\.bias, head\.weight"):
            LaplacePosterior(factors).check_weights(sharded(seed=1))
    LaplacePosterior(found).check_weights(Classifier())


def test_sharded_by_fsdp2(tmp_path):
    run_in_processes(with_shards, 2, tmp_path)
