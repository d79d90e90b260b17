"""The line on a posterior that every fit begins with."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import Curvature, GradientShare, LinearLayers, collect_factors
from bmoe_lightning.experts import find_linear_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import LaplaceLPO, TemperatureScaling, fit_methods
from bmoe_lightning.methods.fit_index import INDEX_FILE, INDEX_FORMAT, VERSION, write_index
from bmoe_lightning.methods.posterior_summary import posterior_summary, share_phrase
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.utils.json_io import read_json_file


def posterior_with(slots, **changes):
    factors = collect_factors(toy_model(), answer_logits, [toy_batch()], rank=3)
    layers = tuple(
        replace(layer, slots=torch.tensor(counts).double()) for layer, counts in zip(factors.layers, slots, strict=True)
    )
    return LaplacePosterior(replace(factors, layers=layers, **changes))


def test_experts_and_tokens():
    line = posterior_summary(posterior_with([[12, 0, 30, 40], [5310, 50, 60, 70]]))
    assert line == (
        "posterior over 2 layers of 4 experts: 7 of 8 experts seen, 12 to 5310 routed tokens each (median 50)"
    )


def test_a_part_of_the_data():
    line = posterior_summary(posterior_with([[10] * 4, [20] * 4], num_examples=400, num_examples_used=100))
    assert line.endswith("10 to 20 routed tokens each (median 15), scaled from 100 to 400 examples")


def test_a_part_of_the_layers():
    posterior = posterior_with([[10] * 4, [20] * 4]).without_layers([0])
    assert posterior_summary(posterior).startswith("posterior over 1 of 2 layers of 4 experts: 4 of 4 experts seen")


def test_no_expert_at_all():
    line = posterior_summary(posterior_with([[0] * 4, [0] * 4]))
    assert line == "posterior over 2 layers of 4 experts: 0 of 8 experts seen"


def test_plain_linear_layers():
    model = toy_model()
    layers = find_linear_layers(model, "*.query")
    factors = collect_factors(model, answer_logits, [toy_batch()], rank=3, layers=layers)
    line = posterior_summary(LaplacePosterior(factors))
    assert line.startswith("posterior over 2 layers: 2 of 2 weight matrices seen, ")


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (GradientShare(0.3846, 0.0147, 9), "it covers 38.5 % of the trained weights' gradient (kappa 2.6 +- 0.099)"),
        (GradientShare(0.25, None, 1), "it covers 25 % of the trained weights' gradient (kappa 4)"),
        (GradientShare(1.0, 0.0), "it covers 100 % of the trained weights' gradient (kappa 1)"),
        (
            GradientShare(0.25, None, 1, num_trained=40960),
            "it covers 25 % of the trained weights' gradient (kappa 4), where 40,960 weights were trained",
        ),
        (
            GradientShare(0.25, None, 1, num_trained=40960, is_assumed=True),
            "it covers 25 % of the trained weights' gradient (kappa 4), where all 40,960 weights that require "
            "gradients count as trained",
        ),
        (GradientShare(0.0, 0.0), "it covers none of the trained weights (kappa infinite)"),
        (
            GradientShare(None, reason="weights are offloaded"),
            "what it covers of the trained weights' gradient (kappa) is unknown: weights are offloaded",
        ),
    ],
)
def test_share(share, expected):
    assert share_phrase(share) == expected


class TestFit:
    def fit(self, *methods, model=None, **options):
        batch = toy_batch(num_rows=12)
        model = model or toy_model()
        return fit_methods(methods, model, answer_logits, split(batch, 4, 4, 4), [batch], **options)

    def test_is_logged_before_all_else(self, caplog):
        caplog.set_level(logging.INFO, "bmoe_lightning")
        fit = self.fit(TemperatureScaling(), LaplaceLPO(curvature=RANK3))
        (posterior,), (share,) = fit.posteriors.values(), fit.shares.values()
        count = sum(parameter.numel() for parameter in toy_model().parameters())
        assert caplog.records[0].getMessage() == posterior_summary(posterior, share)
        assert posterior_summary(posterior, share).endswith(
            f", where all {count:,} weights that require gradients count as trained"
        )
        assert caplog.records[0].levelno == logging.INFO

    def test_one_line_for_each_new_curvature(self):
        told = []
        first = LaplaceLPO(curvature=RANK3)
        other = LaplaceLPO("queries", "Queries", Curvature(rank=2, layers=LinearLayers("*.query")))
        fit = self.fit(first, LaplaceLPO("twice", "Twice", RANK3), tell=told.append)
        assert len(told) == 1
        self.fit(first, other, earlier=fit, tell=told.append)
        assert len(told) == 2
        assert "weight matrices" in told[1]
        self.fit(TemperatureScaling(), tell=told.append)
        assert len(told) == 2

    def test_the_share_is_stored_with_the_fit(self, tmp_path):
        method = LaplaceLPO(curvature=RANK3)
        fit = self.fit(method)
        save_fit(tmp_path, fit)
        assert load_fit(tmp_path)[0].shares == fit.shares
        (share,) = fit.shares.values()
        assert 0 < share.share < 0.5
        assert fit.scalars([method])["curvature/kappa"] == share.kappa

    @pytest.mark.parametrize("given", [False, True])
    def test_which_weights_count_as_trained_is_stored_with_the_share(self, tmp_path, given):
        model, told = toy_model(), []
        chosen = [p for name, p in model.named_parameters() if "down_proj" in name or "head" in name]
        counted = chosen if given else list(model.parameters())
        fit = self.fit(LaplaceLPO(curvature=RANK3), model=model, trained=chosen if given else None, tell=told.append)
        save_fit(tmp_path, fit)
        (share,) = load_fit(tmp_path)[0].shares.values()
        count = sum(parameter.numel() for parameter in counted)
        assert (share.num_trained, share.is_assumed) == (count, not given)
        expected = f"{count:,} weights were trained" if given else f"all {count:,} weights that require gradients"
        assert f", where {expected}" in told[0]

    def test_only_down_proj_is_trained(self):
        model = toy_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" in name)
        fit = self.fit(LaplaceLPO(curvature=RANK3), model=model)
        assert fit.scalars([])["curvature/kappa"] == 1

    @pytest.mark.parametrize("number", [None, 0, 2])
    @pytest.mark.parametrize("name", ["gradient_shares", "num_gradient_shares"])
    def test_a_share_that_is_missing_in_the_file_is_noticed(self, tmp_path, name, number):
        save_fit(tmp_path, self.fit(LaplaceLPO(curvature=RANK3)))
        header = read_json_file(tmp_path / INDEX_FILE, format=INDEX_FORMAT, version=VERSION, remedy="none")
        content = dict(header.description)
        earlier = {key: value for key, value in content.items() if not key.endswith("gradient_shares")}
        changed = {**content, name: number} if number is not None else {k: x for k, x in content.items() if k != name}
        write_index(tmp_path, changed, header.fit)
        with pytest.raises(ValueError, match=r"index\.json"):
            load_fit(tmp_path)
        write_index(tmp_path, earlier, header.fit)  # as an earlier version has written it
        assert load_fit(tmp_path)[0].shares == {}

    def test_layers_that_are_skipped_are_not_covered(self):
        whole, part = RANK3, replace(RANK3, skip_layers=(0,))
        fit = self.fit(LaplaceLPO(curvature=whole), LaplaceLPO("part", "Part", part))
        assert fit.shares[part.digest].share < fit.shares[whole.digest].share

    def test_nothing_is_covered(self):
        model = toy_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("head" in name)
        fit = self.fit(LaplaceLPO(curvature=RANK3), model=model)
        assert [share.kappa for share in fit.shares.values()] == [math.inf]
        assert "curvature/kappa" not in fit.scalars([])
