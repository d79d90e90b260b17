"""Settings that every test shares."""

import gc
import logging
import os
import signal
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell sets it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    """Leave what is imported by now out of garbage collections, which timings and ends of trainings ask for.

    With all test files imported each would take a second or more.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logged():
    """The recipes' commands silence this logger of their process."""
    logging.getLogger("bmoe_lightning.trainer.signals").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One run with the callback that several tests only look at."""
    from toy import LAPLACE, ToyModule, calibration_loader, test_loader, train_loader, trainer

    from bmoe_lightning.callback import BayesianMoECallback

    folder = tmp_path_factory.mktemp("trained")
    callback = BayesianMoECallback(
        methods=(*LAPLACE, "temperature", "evidence_temperature", "shrunk_temperature", "laplace_temperature"),
        dirpath=str(folder / "bayesian"),
    )
    module = ToyModule()
    run = trainer(folder, [callback])
    run.fit(module, train_loader(), calibration_loader())
    metrics = run.test(module, test_loader(), verbose=False)[0]
    return types.SimpleNamespace(folder=folder, callback=callback, module=module, run=run, metrics=metrics)
