"""Every model family of the installed transformers, and the table that says what works on it."""

from __future__ import annotations

import dataclasses
import re
from contextlib import contextmanager
from functools import cache

import pytest
import torch

import recipes.supported_models.survey as survey_module
from recipes.common.readme import ROOT
from recipes.supported_models import catalogue
from recipes.supported_models import report as report_module
from recipes.supported_models.__main__ import PROGRAM, main
from recipes.supported_models.catalogue import families, families_of_transformers, own_families, uses_interface
from recipes.supported_models.report import PLACE, section, summary, table
from recipes.supported_models.survey import BOUND, Row, survey
from recipes.supported_models.tiny import wrapper_name

TABLE = ROOT / "docs" / "supported_models.md"
UPDATE = f"run `{PROGRAM} --write {TABLE.relative_to(ROOT)}` and commit what it writes"


# Families with routers that are not supported, all or some: one whose tokens go to the same two experts in transformers
# 5.23, whatever the router says, and one that chooses by a hash in its first layers.
ROUTERS_REFUSED = ("nllb_moe", "deepseek_v4")


@cache
def surveyed(family):
    return survey(family)


@cache
def recorded():
    """Family to its line in the table."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.is_file() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {line[0]: line for line in cells[2:]}


def missing():
    """Families of the installed transformers that the table lacks."""
    return sorted(set(families_of_transformers()) - set(recorded()))


def numbers_left_out(line):
    return [*line[:3], *line[5:]]


class TestFamilies:
    @pytest.mark.parametrize("family", families())
    def test_works_or_is_refused_as_the_table_says(self, family):
        row = surveyed(family)
        assert row.complaint is None
        if row.refused is None:
            assert (row.router_refusal is None) is (family not in ROUTERS_REFUSED)
            assert row.routers is not None or family in ROUTERS_REFUSED
            assert row.error < BOUND
            assert {"logits (eager)", "gradients (eager)", "slots", "A", "G", "covariance"} <= dict(row.errors).keys()
            assert row.padding_sides, row.padding
        line = recorded().get(family)
        assert line is not None, f"{family} is not in {TABLE.name}: {UPDATE}"
        now = table([row]).splitlines()[2]
        expected = [cell.strip() for cell in now.strip("|").split("|")]
        assert numbers_left_out(line) == numbers_left_out(expected), UPDATE

    def test_a_newer_transformers_brings_none_that_is_not_in_the_table(self):
        assert not missing(), f"the installed transformers has families that {TABLE.name} lacks: {missing()}; {UPDATE}"
        assert not set(own_families()) - set(recorded()), UPDATE

    @pytest.mark.parametrize("name", ["deepseek", "deepseek_moe", "surprise_moe"])
    def test_one_that_it_brings_is_noticed(self, monkeypatch, tmp_path, name):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"modeling_{name}.py").write_text("@use_experts_implementation\nclass Experts:\n    pass")
        monkeypatch.setattr(catalogue, "_models_folder", lambda: tmp_path)
        assert missing() == [name]

    def test_the_table_has_no_failure_and_enough_families(self):
        notes = {family: line[-1] for family, line in recorded().items()}
        assert not [family for family, note in notes.items() if "FAILED" in note]
        supported = [family for family, note in notes.items() if not note.startswith("refused")]
        theirs = families_of_transformers()
        assert len([family for family in supported if family in theirs and uses_interface(family)]) >= 55

    def test_the_table_says_of_every_family_what_its_routers_do(self):
        routers = {family: line[-2] for family, line in recorded().items() if not line[-1].startswith("refused")}
        assert all(routers.values())
        assert {family for family, words in routers.items() if "refused" in words} == set(ROUTERS_REFUSED)
        assert len([family for family in routers if family not in ROUTERS_REFUSED]) >= 55


class TestTheSurveyNotices:
    """Each fault that the table is there to exclude."""

    def complaint(self):
        return survey("mixtral").complaint

    def test_nothing_where_nothing_is_wrong(self):
        assert self.complaint() is None

    def test_a_wrong_curvature(self, monkeypatch):
        collect = survey_module.collect_factors

        def wrong(*args, **kwargs):
            factors = collect(*args, **kwargs)
            first, *rest = factors.layers
            slots = first.slots + torch.tensor([1, 0, 0, 0])
            broken = dataclasses.replace(first, slots=slots, a_eigenvalues=first.a_eigenvalues * 1.001)
            return dataclasses.replace(factors, layers=(broken, *rest))

        monkeypatch.setattr(survey_module, "collect_factors", wrong)
        complaint = self.complaint()
        assert "slots" in complaint
        assert "A 1.0e-03" in complaint
        assert "covariance" in complaint
        assert "logits" not in complaint

    def test_a_wrong_forward(self, monkeypatch):
        import bmoe_lightning.experts.layouts.fused as fused

        combine = fused.combine
        monkeypatch.setattr(fused, "combine", lambda groups, output, weights: combine(groups, output * 1.01, weights))
        complaint = self.complaint()
        for name in ("logits (eager)", "gradients (eager)", "logits (batched_mm)", "float32 logits (grouped_mm)", "G "):
            assert name in complaint

    def test_what_is_left_behind(self, monkeypatch):
        collect = survey_module.collect_factors

        def careless(model, *args, **kwargs):
            factors = collect(model, *args, **kwargs)
            model.eval()
            model.set_experts_implementation("batched_mm")
            model.lm_head.register_forward_hook(lambda *_: None)
            next(iter(model.parameters())).requires_grad_(True)
            torch.rand(1)
            return factors

        monkeypatch.setattr(survey_module, "collect_factors", careless)
        complaint = self.complaint()
        for name in ("experts implementation", "training modes", "requires_grad", "hooks", "random state"):
            assert f"{name} not restored" in complaint

    def test_layers_that_are_not_found(self, monkeypatch):
        find = survey_module.find_expert_layers
        monkeypatch.setattr(survey_module, "find_expert_layers", lambda model: find(model)[1:])
        with pytest.raises(RuntimeError, match=r"does not find model\.layers\.0\."):
            survey("mixtral")

    def test_a_family_that_is_refused(self, monkeypatch):
        def refuse(model):
            raise ValueError("no experts here")

        monkeypatch.setattr(survey_module, "find_expert_layers", refuse)
        row = survey("mixtral")
        assert (row.refused, row.error, row.complaint, row.supported) == ("no experts here", None, None, False)

    def test_a_fault_in_the_wrapper_alone(self, monkeypatch):
        find = survey_module.tapped_batch

        @contextmanager
        def wrong(model, *args):
            with find(model, *args) as tapped:
                logits = tapped.logits * (1.01 if type(model).__name__ == wrapper_name("aria") else 1)
                yield dataclasses.replace(tapped, logits=logits)

        assert survey("aria").complaint is None
        monkeypatch.setattr(survey_module, "tapped_batch", wrong)
        assert "logits (eager) 1.0e-02" in survey("aria").complaint

    def test_an_unknown_family(self):
        with pytest.raises(ValueError, match="no MoE family"):
            survey("bert")


ROWS = [
    Row("good", True, experts=(4, 4), layout="fused", errors=(("A", 1e-7),), float32_errors=(("logits", 2e-7),)),
    Row(
        "own",
        False,
        experts=(4, 8),
        notes=("shared",),
        errors=(("A", 2e-6),),
        layout="adapted",
        routers="1 x softmax, top 2",
        router_refusal="a.b: it is\na | hash",
        wrapper="wrapper",
    ),
    Row("bmoe_lightning.mine", True, experts=(4,), notes=("a class", "small"), errors=(("A", 1e-7),)),
    Row("odd", True, refused="It has no experts. It is\nno model | at all."),
]
FAILED = Row("bad", True, failed="KeyError: 'x'")


class TestTable:
    def test_rows(self):
        lines = table([*ROWS, FAILED]).splitlines()
        assert lines[2] == "| good | 2 x 4 experts | fused | 1.0e-07 | 2.0e-07 |  |  |  |"
        assert lines[3].startswith("| own | 1 x 4 experts; 1 x 8 experts | adapted | 2.0e-06 |")
        assert lines[3].endswith(
            "| 1 x softmax, top 2; refused: a.b: it is a / hash | shared, wrapper, without the experts interface |"
        )
        assert lines[4].startswith("| bmoe_lightning.mine |")
        assert lines[5] == "| odd |  |  |  |  |  |  | refused: It has no experts. It is no model / at all. |"
        assert lines[6].endswith("| **FAILED**: KeyError: 'x' |")

    @pytest.mark.parametrize(
        ("errors", "words"),
        [((1e-7, 2e-7), "both"), ((0.4, 1e-7), "right"), ((1e-7, float("inf")), "left"), ((0.2, 0.1), "neither")],
    )
    def test_sides_of_padding(self, errors, words):
        row = dataclasses.replace(ROWS[0], padding=dict(zip(("left", "right"), errors, strict=True)))
        assert table([row]).splitlines()[2].endswith(f"| 2.0e-07 | {words} |  |  |")
        assert ("good (" in section([row])) is (words in ("left", "right"))

    def test_an_error_above_the_bound_fails(self):
        row = dataclasses.replace(ROWS[0], errors=(("A", 2 * BOUND), ("G", float("nan"))))
        assert not row.supported
        assert row.complaint == "A 2.0e-05; G nan"

    def test_summary(self):
        assert summary([*ROWS, FAILED]) == (
            "2 of 4 families of transformers are supported: 1 of the 3 that use its experts interface, 1 of the 1 "
            "others. Of those that this library brings: 1 of 1. 1 have supported routers. 1 compared as multimodal "
            "wrappers, given text only. 1 "
            "refused. 1 FAILED."
        )
        assert summary(ROWS[2:3]) == "Of those that this library brings: 1 of 1."

    def test_section(self):
        text = section(ROWS)
        assert text.startswith(summary(ROWS))
        assert "2e-06" in text
        assert text.endswith(table(ROWS))
        assert section(ROWS[3:]).endswith(table(ROWS[3:]))


class TestCommand:
    def test_one_family(self, capsys):
        assert main(["--families", "qwen2_moe"]) == 0
        printed = capsys.readouterr()
        assert "| qwen2_moe | 2 x 4 experts | fused |" in printed.out
        assert "1 of 1 families of transformers are supported" in printed.out
        assert torch.__version__.partition("+")[0] in printed.out
        assert "[1/1] qwen2_moe: error " in printed.err

    def test_the_table_goes_to_the_marked_place(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(catalogue, "families", lambda: ["olmoe", "mixtral"])
        failed = {"olmoe": None}
        monkeypatch.setattr(report_module, "survey", lambda f: dataclasses.replace(ROWS[0], family=f, failed=failed[f]))
        page = tmp_path / "page.md"
        before = f"a\n<!-- {PLACE} -->\nold\n<!-- end of {PLACE} -->\nb\n"
        page.write_text(before)
        failed["mixtral"] = "KeyError: 'x'"
        assert main(["--write", str(page)]) == 1
        assert page.read_text() == before
        failed["mixtral"] = None
        assert main(["--write", str(page)]) == 0
        assert "| olmoe |" in page.read_text()
        assert "old" not in page.read_text()
        page.write_text("no place")
        assert main(["--write", str(page)]) == 1
        assert f"error: --write {page}: " in capsys.readouterr().err

    def test_a_failure_is_shown_and_the_others_go_on(self, monkeypatch, capsys):
        def failing(family):
            if family == "mixtral":
                raise KeyError("lost")
            return dataclasses.replace(ROWS[0], family=family)

        monkeypatch.setattr(report_module, "survey", failing)
        assert main(["--families", "mixtral,olmoe"]) == 1
        printed = capsys.readouterr()
        assert "**FAILED**: KeyError: 'lost'" in printed.out
        assert "| olmoe | 2 x 4 experts |" in printed.out
        assert "error: 1 failed: mixtral" in printed.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--families", "bert,olmoe"], "no MoE family.*: bert"),
            (["--families", "olmoe", "--write", "x"], "leave --f"),
        ],
    )
    def test_wrong_usage(self, arguments, message, capsys):
        assert main(arguments) == 2
        assert re.search(message, capsys.readouterr().err)
