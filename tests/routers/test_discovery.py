"""Routers are found, named by the user, and located again in other models."""

from __future__ import annotations

import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.models import tiny_qwen, toy_model
from oracles.own_models import Buffers, Holder, OwnMixture, SharedMixture, gated, linear, mixture, with_mixtures
from peft import LoraConfig, get_peft_model
from torch import nn

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.routers import Router, find_routers, locate_routers
from recipes.supported_models.tiny import build


def names(routers):
    return [router.name for router in routers]


class TestFound:
    def test_routers_of_transformers(self):
        routers = find_routers(tiny_qwen(num_hidden_layers=3, mlp_only_layers=[1]))
        assert routers[1] == Router("model.layers.2.mlp.gate", 1, 4, 16, "model.layers.2.mlp.experts")
        assert names(routers) == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
        assert (routers[0].top_k, routers[0].score) == (None, None)

    # A linear layer inside the router; more logits than experts; a weight of a layer that never runs; next to another
    # layer with as many outputs; inside the registered module of the experts; a list of experts.
    @pytest.mark.parametrize(
        ("family", "name", "num_experts", "d_in"),
        [
            ("afmoe", "model.layers.2.mlp.router", 4, 16),
            ("zaya", "model.layers.2.mlp.gate", 5, 32),
            ("longcat_flash", "model.layers.1.mlp.router", 6, 16),
            ("gemma4", "model.layers.2.router", 4, 16),
            ("jetmoe", "model.layers.2.mlp.router", 4, 16),
            ("switch_transformers", "decoder.block.1.layer.2.mlp.router", 4, 16),
            ("bmoe_lightning.deepseek_moe", "model.layers.2.mlp.gate", 4, 16),
        ],
    )
    def test_every_kind_of_router(self, family, name, num_experts, d_in):
        last = find_routers(build(family).model)[-1]
        assert (last.name, last.num_experts, last.d_in) == (name, num_experts, d_in)

    @layouts
    def test_a_linear_layer_of_a_user_s_model(self, layout):
        routers = find_routers(in_layout(toy_model(), layout))
        assert names(routers) == ["layers.0.mixture.router", "layers.1.mixture.router"]
        assert [router.experts for router in routers] == ["layers.0.mixture.crew", "layers.1.mixture.crew"]

    @pytest.mark.parametrize(
        ("make", "name"), [(OwnMixture, "chooser"), (SharedMixture, "chooser"), (Buffers, "router")]
    )
    def test_other_models_of_users(self, make, name):
        routers = find_routers(with_mixtures(make))
        assert names(routers) == [f"layers.0.mixture.{name}", f"layers.1.mixture.{name}"]

    def test_one_router_of_several_layers(self):
        model = with_mixtures(OwnMixture)
        model.layers[1].mixture.chooser = model.layers[0].mixture.chooser
        (router,) = find_routers(model)
        assert router.experts == "layers.0.mixture.workers"

    def test_a_router_around_the_block_of_the_experts(self):
        def block():
            return mixture([gated(("a", "b", "c")) for _ in range(4)], router=False).block

        model = Holder(outer=Holder(gate=linear(6, 4), block=block()))
        layers = find_expert_layers(model, experts="*.experts")
        assert names(find_routers(model, layers=layers)) == ["outer.gate"]
        model = Holder(outer=Holder(gate=linear(6, 4), inner=Holder(block=block())))
        layers = find_expert_layers(model, experts="*.experts")
        with pytest.raises(ValueError, match=r"no router was found beside the experts 'outer\.inner\.block\.experts'"):
            find_routers(model, layers=layers)


class TestRefused:
    def test_a_model_without_experts(self):
        with pytest.raises(ValueError, match="has no expert layers"):
            find_routers(linear(3, 3))

    def test_several_that_it_may_be(self):
        model = mixture([gated(("a", "b", "c")) for _ in range(4)])
        model.block.other = linear(6, 4)
        with pytest.raises(
            ValueError, match=r"2 linear maps beside the experts 'block.experts' have 4 outputs, in block.g"
        ):
            find_routers(model)
        assert names(find_routers(model, routers="*.gate")) == ["block.gate"]
        model.block.other = linear(5, 4)  # of another width than the model
        assert names(find_routers(model)) == ["block.gate"]

    def test_a_pattern_restricts_the_layers(self):
        model = tiny_qwen(num_hidden_layers=3)
        (router,) = find_routers(model, routers="*.1.mlp.gate")
        assert (router.name, router.index) == ("model.layers.1.mlp.gate", 0)
        with pytest.raises(ValueError, match=r"that matches '\*.nothing' has a linear layer"):
            find_routers(model, routers="*.nothing")

    def test_a_block_that_a_kernel_replaced(self, monkeypatch):
        model = build("gpt_oss").model
        block = model.model.layers[1].mlp
        monkeypatch.setattr(type(block), "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
        assert len(find_routers(model)) == 3  # it may be replaced, and is not
        block.forward = (lambda self, x: x).__get__(block)
        with pytest.raises(
            ValueError, match=r"the forward of 'model.layers.1.mlp' \(GptOssMLP\) was replaced by a kernel"
        ):
            find_routers(model)


class TestLocated:
    @layouts
    def test_under_another_prefix(self, layout):
        model = in_layout(toy_model(), layout)
        routers = find_routers(model)
        inside = locate_routers(Holder(outer=Holder(model=model)), routers)
        assert names(inside) == [f"outer.model.{name}" for name in names(routers)]
        assert inside[0].experts == "outer.model.layers.0.mixture.crew"
        assert locate_routers(model, inside) == routers
        assert locate_routers(model, routers[1:]) == routers[1:]

    def test_through_wrappers(self):
        routers = find_routers(toy_model())
        model = get_peft_model(
            toy_model(), LoraConfig(target_modules=["router"], modules_to_save=["head"], r=2, init_lora_weights=False)
        )
        assert names(find_routers(model)) == [f"base_model.model.{name}" for name in names(routers)]
        assert locate_routers(model, routers) == find_routers(model)
        assert locate_routers(toy_model(), find_routers(model)) == routers
        compiled = torch.compile(toy_model())
        assert names(locate_routers(compiled, routers)) == [f"_orig_mod.{name}" for name in names(routers)]

    def test_a_saved_copy_counts_once(self):
        model = get_peft_model(toy_model(), LoraConfig(target_modules=["query"], modules_to_save=["router"]))
        assert names(find_routers(model)) == [f"base_model.model.layers.{i}.mixture.router" for i in (0, 1)]

    def test_what_was_probed_stays(self):
        (router, _) = find_routers(toy_model())
        probed = Router(router.name, 7, router.num_experts, router.d_in, router.experts, 2, "softmax")
        assert locate_routers(toy_model(), [probed]) == [probed]

    def test_another_model(self):
        routers = find_routers(toy_model())
        with pytest.raises(
            ValueError, match=r"has no routers called 'layers.1.mixture.router'.*Pass the model that was"
        ):
            locate_routers(toy_model(num_layers=1), routers)
        with pytest.raises(ValueError, match=r"has several routers called 'layers.0.mixture.router'"):
            locate_routers(Holder(a=toy_model(), b=toy_model()), routers)
        with pytest.raises(ValueError, match=r"has no linear layer, or matrix, of 4 x 6 as the router 'layers.0"):
            locate_routers(toy_model(num_experts=3), routers)

    def test_an_embedding_is_no_router(self):
        model = mixture([gated(("a", "b", "c")) for _ in range(4)])
        model.block.places = nn.Embedding(4, 6)
        assert names(find_routers(model)) == ["block.gate"]
