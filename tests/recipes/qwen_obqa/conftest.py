"""What the tests of the main job share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from bmoe_lightning.report import tensorboard
from recipes.qwen_obqa import reporting

MATPLOTLIB_AVAILABLE = reporting.matplotlib_available


@contextmanager
def figures(available):
    with pytest.MonkeyPatch.context() as patch:
        for module in (reporting, tensorboard):
            patch.setattr(module, "matplotlib_available", available)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Drawing figures takes as long as a dry run without them."""
    with figures(lambda: False):
        yield


@pytest.fixture(scope="session")
def with_figures():
    """A context for the runs of this process whose figures are looked at."""
    return lambda: figures(MATPLOTLIB_AVAILABLE)
