"""Methods of a run: by name or class, with options from the command line, a file and the run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

import recipes.qwen_obqa
from bmoe_lightning.curvature.spec import Curvature, ExpertLayers, LinearLayers
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.registry import get_method, method_names
from recipes.common.cli import UsageError, parse
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.settings import CurvatureSettings, Settings


@dataclass(frozen=True)
class Mine(Method):
    """A method of a user's own module."""

    name: str = "mine"
    label: str = "Mine"
    curvature: Curvature | None = None
    width: float = option(1.5, "Width.")
    link: Literal["mc", "probit"] = option("mc", "Link.")
    layers: tuple[int, ...] = option((), "Layers.")
    few: int | None = option(None, "Few.")

    def __post_init__(self):
        if self.width <= 0:
            raise ValueError(f"width must be above 0, got {self.width}")
        if self.curvature is not None and self.curvature.fisher != "exact":
            raise ValueError(f"it needs fisher='exact', got {self.curvature.fisher!r}")

    def log_probs(self, batch, state):
        return batch.logits().log_softmax(-1)


@dataclass(frozen=True)
class Dropping(Mine):
    """A method that predicts with the dropout of training, and with snapshots."""

    name: str = "dropping"
    p: float = option(0.1, "Dropout probability.")

    @property
    def needs(self):
        return Needs(expert_dropout=True, snapshots=2)


@pytest.fixture(autouse=True)
def _module(monkeypatch):
    module = ModuleType("their_module")
    module.Mine, module.Dropping, module.Number = Mine, Dropping, int
    monkeypatch.setitem(sys.modules, "their_module", module)


MINE, DROPPING = "their_module:Mine", "their_module:Dropping"


def build(*methods, **options):
    return build_methods(Settings(methods=methods, **options).resolved())


def test_all_are_the_registered_ones_and_more_may_follow():
    built = build("all", MINE)
    needs = {name: get_method(name).needs for name in method_names()}
    without_lora = [name for name in needs if not needs[name].lora]
    at_once = [name for name in without_lora if not needs[name].router_training]
    assert [method.name for method in built] == [*at_once, "mine"]
    assert len(at_once) < len(without_lora) < len(needs)
    trained = without_lora[-1]
    assert needs[trained].router_training
    assert [method.name for method in build("all", trained)] == [*at_once, trained]
    assert [method.name for method in build("map")] == ["map"]


def test_the_curvature_of_the_run_fills_what_a_method_leaves_open():
    (mine,) = build(MINE)
    assert mine.curvature == Curvature(rank=32)
    (mine,) = build(MINE, model="some/model", curvature=CurvatureSettings(sketch="nystrom"))
    assert mine.curvature == Curvature(rank=10, sketch="nystrom")


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["mine.width=2e-1"], {"width": 0.2}),
        (["mine.width=2", "mine.link=probit", "mine.width=3"], {"width": 3.0, "link": "probit"}),
        (["mine.layers=[0,2]", "mine.few=7"], {"layers": (0, 2), "few": 7}),
        (["mine.few=null"], {"few": None}),
        (["mine.label=A=B.c"], {"label": "A=B.c"}),
        (["mine.curvature.rank=4"], {"curvature": Curvature(rank=4, sketch="exact")}),
        (
            ["mine.curvature.layers.shared_experts=true", "mine.curvature.max_batches=9"],
            {"curvature": Curvature(32, sketch="exact", layers=ExpertLayers(shared_experts=True), max_batches=9)},
        ),
    ],
)
def test_options_of_the_command_line(assignments, expected):
    (mine,) = build(MINE, set=tuple(assignments), curvature=CurvatureSettings(sketch="exact"))
    assert mine == Mine(**{"curvature": Curvature(rank=32, sketch="exact"), **expected})


def test_options_of_a_file():
    layers = {"class_path": "bmoe_lightning.curvature.spec.LinearLayers", "init_args": {"names": "*.lora_A"}}
    args = {"name": "other", "width": 2, "layers": [1], "curvature": {"rank": 3, "layers": layers}}
    mine, other = build(MINE, {"class_path": "their_module.Mine", "init_args": args}, set=("other.width=4",))
    assert mine == Mine(curvature=Curvature(rank=32))
    curvature = Curvature(rank=3, layers=LinearLayers("*.lora_A"))
    assert other == Mine(name="other", width=4.0, layers=(1,), curvature=curvature)


def test_the_file_of_the_last_layer_has_it_beside_all_layers():
    path = Path(recipes.qwen_obqa.__file__).with_name("last_layer.yaml")
    settings = parse(Settings, ["--config", str(path)], program="program", description="")
    methods = {method.name: method for method in build(*settings.methods)}
    assert {name: method.curvatures[0].skip_layers for name, method in methods.items() if method.curvatures} == {
        "laplace_lpo": (),
        "last_layer": (0, 1),
    }


def test_prediction_has_the_dropout_of_training_unless_told_otherwise():
    assert [method.p for method in build(DROPPING)] == [0.2]
    assert [method.p for method in build(DROPPING, expert_dropout=0.3)] == [0.3]
    assert [method.p for method in build(DROPPING, expert_dropout=0.3, set=("dropping.p=0.1",))] == [0.1]
    given = {"class_path": "their_module.Dropping", "init_args": {"p": 0.1}}
    assert [method.p for method in build(given, expert_dropout=0.3)] == [0.1]


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["mapp"], {}, "--methods: unknown method 'mapp', did you mean 'map'?"),
        (["their_module:None"], {}, "--methods: the module 'their_module' has no 'None'"),
        (["their_module:Number"], {}, "--methods: a method is a name or an instance of"),
        ([MINE, MINE], {}, "--methods: methods need distinct names, and mine"),
        ([], {}, "--methods: no method was given"),
        ([{"class_path": MINE, "args": {}}], {}, "an item of methods must be a name or {class_path"),
        ([MINE], {"set": ["mine.width"]}, "--set must be METHOD.OPTION=VALUE, got 'mine.width'"),
        ([MINE], {"set": ["width=3"]}, "--set must be METHOD.OPTION=VALUE, got 'width=3'"),
        ([MINE], {"set": ["mine.=3"]}, "--set must be METHOD.OPTION=VALUE, got 'mine.=3'"),
        (["map", MINE], {"set": ["min.width=3"]}, "--set min.width: 'min' is not among --methods, did you mean mine?"),
        ([MINE], {"set": ["mine.widht=3"]}, "--set mine has no option 'widht', did you mean width?; there are name,"),
        ([MINE], {"set": ["mine.width=big"]}, "--set mine.width must be a number, got big"),
        ([MINE], {"set": ["mine.link=bridge"]}, "--set mine.link must be one of mc, probit, got bridge"),
        ([MINE], {"set": ["mine.few=1.5"]}, "--set mine.few must be an integer, got 1.5"),
        ([MINE], {"set": ["mine.width=0"]}, "--set mine: width must be above 0, got 0.0"),
        ([MINE], {"set": ["mine.width.x=0"]}, "--set mine.width is a single value without options 'x'"),
        ([MINE], {"set": ["mine.curvature.rnk=0"]}, "--set mine.curvature has no option 'rnk', did you mean rank?"),
        ([MINE], {"set": ["mine.curvature.rank=-1"]}, "--set mine.curvature: rank must be at least 0, got -1"),
        ([MINE], {"curvature": CurvatureSettings(fisher="mc")}, "--methods: mine: it needs fisher='exact', got 'mc'"),
        (
            [{"class_path": "their_module.Mine", "init_args": {"wide": 1}}],
            {},
            "their_module.Mine has no option 'wide', did you mean width?",
        ),
        (
            [DROPPING],
            {"expert_dropout": 0.0},
            "--methods: dropping needs a model that was fine-tuned with expert",
        ),
        (["bayesian_lora"], {}, "--methods: bayesian_lora has its posterior over the matrices of LoRA, and this run"),
        ([DROPPING], {"epochs": 1}, "--methods: dropping needs the weights after at least 2 epochs, and there"),
    ],
)
def test_what_cannot_be_has_one_sentence(methods, options, message):
    with pytest.raises(UsageError) as found:
        build(*methods, **options)
    assert str(found.value).startswith(message)
    assert "\n" not in str(found.value)


def test_the_run_s_values_are_no_matter_of_methods_that_do_not_need_them():
    assert build(MINE, "map", expert_dropout=0.0, epochs=1)
    mine = {"class_path": "their_module.Mine", "init_args": {"curvature": {"fisher": "exact"}}}
    assert build(mine, curvature=CurvatureSettings(fisher="mc"))[0].curvature == Curvature(rank=32)
