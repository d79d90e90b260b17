"""What routers do with their logits is measured, and those that cannot be replaced are refused."""

from __future__ import annotations

import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from oracles.own_models import (
    Chooser,
    DroppingMixture,
    EverybodyMixture,
    ExpertChoiceMixture,
    OwnMixture,
    with_mixtures,
)
from torch import nn

from bmoe_lightning.routers import examine_routers, find_routers, probe_routers
from recipes.supported_models.state import differences, state_of
from recipes.supported_models.tiny import build

BATCH = toy_batch()


def probed(model, batch=BATCH):
    return probe_routers(model, find_routers(model), lambda: answer_logits(model, batch)[0])


def examined(family):
    tiny = build(family)
    routers = find_routers(tiny.model)
    found = examine_routers(tiny.model, routers, lambda: tiny.class_logits(tiny.model, tiny.batches[0])[0])
    return [(each.router.top_k, each.router.score, each.refusal) for each in found]


class TestMeasured:
    @pytest.mark.parametrize(
        ("family", "score"),
        [
            ("granitemoe", "softmax"),
            ("qwen2_moe", "softmax"),
            ("qwen3_moe", "softmax"),
            ("mixtral", "softmax"),
            ("olmoe", "softmax"),
            ("deepseek_v2", "softmax"),
            ("deepseek_v3", "sigmoid"),
            ("gpt_oss", "softmax"),
            ("bmoe_lightning.deepseek_moe", "softmax"),
            ("llama4", "sigmoid"),  # every expert gets every token, multiplied by zero or its score
            ("inkling", "sigmoid"),  # normalised with the score of a shared expert
            ("phimoe", "other"),  # a threshold relative to the largest logit
        ],
    )
    def test_families(self, family, score):
        assert set(examined(family)) == {(2, score, None)}

    @layouts
    def test_a_user_s_gate(self, layout):
        routers = probed(in_layout(toy_model(top_k=3), layout))
        assert [(router.top_k, router.score) for router in routers] == [(3, "softmax")] * 2
        assert [router.index for router in routers] == [0, 1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
    def test_in_low_precision(self, family, dtype):
        tiny = build(family)
        model = nn.Module.to(tiny.model, dtype)
        found = probe_routers(model, find_routers(model), lambda: tiny.class_logits(model, tiny.batches[0])[0])
        score = "sigmoid" if family == "deepseek_v3" else "softmax"
        assert {(router.top_k, router.score) for router in found} == {(2, score)}

    def test_all_experts_and_dropped_tokens(self):
        assert {router.top_k for router in probed(with_mixtures(EverybodyMixture))} == {4}
        assert {(router.top_k, router.score) for router in probed(with_mixtures(DroppingMixture))} == {
            (None, "softmax")
        }

    def test_routers_with_other_scores_in_one_model(self):
        class Gate(nn.Linear):
            def forward(self, x):
                return super().forward(x).sigmoid().log()  # a softmax of it divides scores by their sum

        model = with_mixtures(OwnMixture)
        gate = Gate(6, 4).double()
        model.layers[1].mixture.chooser = gate
        assert [router.score for router in probed(model)] == ["softmax", "sigmoid"]

    def test_the_model_is_as_before(self):
        model = tiny_qwen().train()
        before, plain = state_of(model), answer_logits(model, BATCH)[0]
        probed(model)
        assert differences(before, state_of(model)) == ()
        assert torch.equal(answer_logits(model, BATCH)[0], plain)


class TestRefused:
    def test_experts_by_a_hash(self):
        (by_hash, *others) = examined("deepseek_v4")
        assert by_hash == (None, None, "the choice of experts does not depend on its logits, as in hash routing")
        assert set(others) == {(2, "other", None)}  # the root of a softplus
        tiny = build("deepseek_v4")
        run = lambda: tiny.class_logits(tiny.model, tiny.batches[0])[0]  # noqa: E731
        with pytest.raises(ValueError, match=r"1 of the 3 routers .* 'model.layers.0.mlp.gate' since the choice"):
            probe_routers(tiny.model, find_routers(tiny.model), run)
        assert len(probe_routers(tiny.model, find_routers(tiny.model, routers="*.[12].mlp.gate"), run)) == 2

    def test_experts_that_choose_tokens(self):
        model = with_mixtures(ExpertChoiceMixture)
        with pytest.raises(ValueError, match=r"the number of tokens of each expert does not depend on its logits"):
            probed(model)

    def test_experts_that_choose_tokens_in_one_module(self):
        model = toy_model()
        for layer in model.layers:
            layer.mixture.__class__ = _ChoosingExperts
        with pytest.raises(ValueError, match="a token's experts depend on the logits of other tokens"):
            probed(model)

    def test_no_linear_map(self):
        model = with_mixtures(OwnMixture)
        model.layers[1].mixture.chooser = Chooser().double()
        routers = find_routers(model)
        found = examine_routers(model, routers, lambda: answer_logits(model, BATCH)[0])
        assert (found[0].router.top_k, found[0].refusal) == (2, None)
        assert "'layers.1.mixture.chooser' (Chooser) made its logits by no calls" in found[1].refusal
        assert found[1].router == routers[1]

    def test_a_router_that_does_not_run(self):
        model = tiny_qwen()
        model.model.layers[1].mlp.forward = lambda x: x  # as a kernel would
        with pytest.raises(ValueError, match="it does not run on this batch, or not as a module"):
            probed(model)

    def test_experts_that_no_token_reaches(self):
        model = toy_model()
        mixture = model.layers[1].mixture
        mixture.forward = lambda x: x + mixture.router(x).softmax(-1)[..., :1]
        with pytest.raises(ValueError, match="no token reached its experts on this batch"):
            probed(model)

    def test_a_model_that_changes_with_equal_logits(self):
        model, calls = toy_model(), []

        def drift(_module, _inputs, output):
            calls.append(None)
            return output + (0.1 if len(calls) > 2 else 0.0)  # not in the first two runs

        model.register_forward_hook(drift)
        with pytest.raises(ValueError, match="the model changes where a router's logits are replaced by equal ones"):
            probed(model)


class _ChoosingExperts(type(toy_model().layers[0].mixture)):
    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens).softmax(-1)
        limit = scores.topk(9, dim=0).values[-1]
        weights, index = torch.where(scores >= limit, scores, 0).topk(2, dim=-1)
        index = torch.where(weights > 0, index, self.config.num_experts)  # no expert
        return self.crew(tokens, index, weights).view_as(x)
