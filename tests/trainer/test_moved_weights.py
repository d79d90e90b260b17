"""The warning about half-precision weights that hardly move."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from oracles.waits import Waits
from torch import nn
from toy import ToyModule, calibration_loader, train_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.optim import MasterWeightAdamW
from bmoe_lightning.trainer import moved_weights
from bmoe_lightning.trainer.moved_weights import watch_moved_weights

PATTERN = r"only [\d.]+% of the trained \w+ weights"


def weights(dtype, count=3, rows=40):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(rows, 30, generator=generator).to(dtype)) for _ in range(count)]


def said(*optimizers, steps, gradient=torch.ones_like, hooks=0):
    """What is said about optimizers that take some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        close = watch_moved_weights(SimpleNamespace(optimizers=list(optimizers)))
        for _ in range(steps):
            for optimizer in optimizers:
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = gradient(parameter)
                optimizer.step()
        close()
        close()
    assert all(len(optimizer._optimizer_step_post_hooks) == hooks for optimizer in optimizers)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 10, 15])
def test_weights_that_hardly_move(dtype, steps):
    trained = weights(dtype)
    before = [parameter.detach().clone() for parameter in trained]
    # Below half the spacing of most float16 values too.
    [message] = said(torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0), steps=steps)
    assert f"first {min(steps, 10)} optimizer steps (learning rate 1e-05)" in message
    assert str(dtype).removeprefix("torch.") in message
    if steps <= 10:
        share = float(torch.cat([(p != b).float().flatten() for p, b in zip(trained, before, strict=True)]).mean())
        found = float(re.search(r"only ([\d.]+)%", message).group(1)) / 100
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / (3 * 256)) ** 0.5 + 1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW(weights(torch.bfloat16), lr=0.1),
        torch.optim.AdamW(weights(torch.float32), lr=1e-6),
        MasterWeightAdamW(weights(torch.bfloat16), lr=1e-5),
    ],
    ids=["large steps", "float32", "float32 copy"],
)
def test_nothing_is_said(optimizer):
    assert said(optimizer, steps=10) == []


def test_torchaos_stochastic_rounding_is_known():
    optimizer = torch.optim.AdamW(weights(torch.bfloat16), lr=1e-6)
    optimizer.bf16_stochastic_round = True
    assert said(optimizer, steps=10) == []


def test_entries_without_a_gradient_do_not_count():
    """Rows of an embedding whose token did not occur, experts without a token."""

    def one_row(parameter):
        gradient = torch.zeros_like(parameter)
        gradient[0] = 1
        return gradient

    assert (
        said(torch.optim.AdamW(weights(torch.bfloat16, rows=10), lr=0.1, weight_decay=0), steps=3, gradient=one_row)
        == []
    )
    assert said(torch.optim.AdamW(weights(torch.bfloat16), lr=1e-6), steps=3, gradient=torch.zeros_like) == []
    assert said(torch.optim.AdamW(weights(torch.bfloat16), lr=1e-6), steps=3, gradient=lambda p: None) == []
    assert said(torch.optim.AdamW(weights(torch.bfloat16), lr=1e-6), steps=0) == []


def test_each_optimizer_is_judged_alone():
    first, second = (torch.optim.AdamW(weights(torch.bfloat16), lr=rate) for rate in (0.1, 1e-6))
    assert len(said(first, second, steps=10)) == 1


def test_shapes_of_all_kinds():
    shapes = ((), (1,), (3, 4, 5), (0, 4))
    trained = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    trained.append(nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16).T))
    assert len(said(torch.optim.AdamW(trained, lr=1e-6), steps=10)) == 1


def test_two_watches_say_it_once():
    optimizer = torch.optim.AdamW(weights(torch.bfloat16), lr=1e-6)
    outer = watch_moved_weights(SimpleNamespace(optimizers=[optimizer]))
    assert said(optimizer, steps=1, hooks=1) == []
    with pytest.warns(UserWarning, match=PATTERN):
        outer()
    assert optimizer not in moved_weights._watched


def test_a_step_waits_for_no_device():
    trained = weights(torch.bfloat16)
    watch = moved_weights._Watch(torch.optim.AdamW(trained, lr=1e-6))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    with Waits() as waits:
        watch._after_step(watch._optimizer, (), {})
    assert waits.count == 0
    with pytest.warns(UserWarning, match=PATTERN), Waits() as waits:
        watch.close()
    assert waits.count <= 2


class HalfModule(ToyModule):
    """A user's own module with all weights in bfloat16."""

    def __init__(self, learning_rate):
        super().__init__(learning_rate=learning_rate)
        self.network.bfloat16()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)


@pytest.mark.parametrize(("learning_rate", "expected"), [(5e-5, 1), (1e-1, 0)])
def test_any_module_that_the_callback_trains(tmp_path, learning_rate, expected):
    module = HalfModule(learning_rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, [BayesianMoECallback(("map",), dirpath=str(tmp_path))], max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
    messages = [str(warning.message) for warning in caught if re.search(PATTERN, str(warning.message))]
    assert len(messages) == expected
    assert isinstance(module, L.LightningModule)
    assert not run.optimizers[0]._optimizer_step_post_hooks
