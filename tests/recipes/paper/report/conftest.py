"""Small synthetic studies: five seeds, several methods, and data sets with two to five choices."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.report import MethodResult, SummarySettings
from recipes.paper.outcomes import Outcome, Study
from recipes.paper.report.compared import read_compared
from recipes.paper.report.published import Published
from recipes.paper.report.section import ReportInput

LABELS = {"home": "Home", "other": "Other & more", "judged": "Judged"}
CHOICES = {"home": 4, "other": 5, "judged": 2}
SIZES = {"home": 60, "other": 40, "judged": 50}
# Sharpness of the predictions: 1 is calibrated.
METHODS = {
    "map": ("MAP", 3.0),
    "temperature": ("Temperature scaling", 1.0),
    "evidence_temperature": ("Evidence temperature", 1.02),
    "isotropic": ("Isotropic", 1.3),
    "laplace_evidence": ("Bayesian-MoE (evidence)", 1.6),
    "laplace_lpo": ("Bayesian-MoE (LPO)", 1.1),
    "laplace_lpo_without_1": ("Bayesian-MoE without layers 1", 2.4),
    "laplace_lpo_without_2": ("Bayesian-MoE without layers 2", 1.3),
    "laplace_lpo_without_3": ("Bayesian-MoE without layers 3", 1.2),
    "laplace_lpo_without_4": ("Bayesian-MoE without layers 4", 1.15),
}
LORA = {"map": ("MAP", 3.2), "bayesian_lora": ("Bayesian-LoRA", 1.8)}


def results(tested, methods, seeds, offset=0):
    items = torch.Generator().manual_seed(SIZES[tested])
    number, choices = SIZES[tested], CHOICES[tested]
    logits = 1.5 * torch.randn(number, choices, generator=items, dtype=torch.float64)
    if choices == 5:
        logits[::4, 4] = -torch.inf
    target = torch.multinomial(logits.softmax(1), 1, generator=items).squeeze(1)
    ids = tuple(f"{tested}-{n}" for n in range(number))
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 + seed + offset)
        noise = torch.randn(number, choices, generator=generator, dtype=torch.float64)
        for name, (label, sharpness) in methods.items():
            log_probs = (sharpness * (logits + 0.3 * noise)).log_softmax(1)
            scores = {"mutual_information": noise.abs().sum(1)} if name.startswith("laplace") else {}
            found.append(MethodResult(name, label, seed, log_probs, target, ids, uncertainty=scores))
    return tuple(found)


def make(methods=METHODS, lora=LORA, seeds=range(5), tables=range(1, 8), figures=(1,), labels=LABELS):
    outcomes = []
    for mode, of_mode in (("experts", methods), ("lora", lora)):
        if of_mode:
            outcomes += [
                Outcome(name, mode, name, results(name, of_mode, seeds, 50 * (mode == "lora"))) for name in labels
            ]
    under_shift = {name: entry for name, entry in methods.items() if "without" not in name}
    outcomes += [
        Outcome("home", "experts", name, results(name, under_shift, seeds, 7)) for name in labels if name != "home"
    ]
    return Study("small", "A small model", "home", dict(labels), tuple(tables), tuple(figures), tuple(outcomes))


@pytest.fixture(scope="session")
def make_study():
    return make


@pytest.fixture(scope="session")
def study():
    return make()


@pytest.fixture(scope="session")
def report_of():
    def wrap(study, **changes):
        defaults = {"published": Published(), "settings": SummarySettings(num_samples=100)}
        return ReportInput(study, read_compared(), **{**defaults, **changes})

    return wrap


@pytest.fixture(scope="session")
def report(study, report_of):
    return report_of(study)
