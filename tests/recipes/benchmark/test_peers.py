"""Peers give the same answer, and one that raises is shown."""

from __future__ import annotations

import sys

import pytest
import torch

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.experts import find_expert_layers
from recipes.benchmark.measure import Pass
from recipes.benchmark.peer_tasks import covariance_by_jacobian, curvlinops_factors, decomposed
from recipes.benchmark.peers import SAME, compared, measure_peers, relative_difference, without_curvature
from recipes.benchmark.separate_experts import separate_experts, separate_workload
from recipes.benchmark.workload import PRESETS, Workload

CPU = torch.device("cpu")


@pytest.fixture
def work():
    return Workload(PRESETS["tiny"].peers, CPU)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("preset", ["tiny", "default"])
def test_the_written_out_jacobian_gives_the_same_covariance(preset):
    shape = PRESETS[preset].peers
    work = Workload(shape, CPU)
    posterior = LaplacePosterior(without_curvature(work.collect([work.batch])))
    _, ours = posterior.logit_covariance(work.model, work.class_logits(), work.batch)
    theirs = covariance_by_jacobian(work)
    assert theirs.shape == (shape.examples, 4, 4)
    assert float(theirs.abs().max()) > 0
    assert relative_difference(theirs, ours) < SAME == 1e-4


def test_separate_experts_are_an_equal_model(work):
    with torch.no_grad():
        expected = work.class_logits()(work.model, work.batch)[0]
        separate_experts(work.model)
        found = work.class_logits()(work.model, work.batch)[0]
    torch.testing.assert_close(found, expected)
    layers = find_expert_layers(work.model)
    assert [layer.layout for layer in layers] == ["modules"] * 2


def test_a_peer_that_raises_is_reported_with_our_own_numbers():
    def broken():
        raise KeyError("no | such thing")

    for make in (broken, lambda: broken):
        row = compared("peer", "work", make, lambda: torch.zeros(10), repeats=2, device=CPU)
        assert row.error == "KeyError: 'no | such thing'"
        assert (row.peer_seconds, row.peer_megabytes, row.difference) == ((), None, None)
        assert len(row.our_seconds) == 2
        assert row.our_megabytes > 0


def test_a_peer_that_runs_has_times_memory_and_difference():
    row = compared(
        "peer", "work", lambda: lambda: torch.ones(3) * 1.5, lambda: torch.ones(3) * 2, repeats=3, device=CPU,
        same_answer=True,
    )  # fmt: skip
    assert row.error is None
    assert row.difference == pytest.approx(0.25)
    assert len(row.peer_seconds) == len(row.our_seconds) == 3


def test_a_further_batch_is_timed_without_the_end_of_its_pass():
    ended = []

    def consume(batches):
        ended.append(list(batches))

    timed = Pass(consume, "batch")
    timed()
    assert timed.further_batch(CPU) >= 0
    assert ended == []


def test_a_pass_that_cannot_be_interrupted_runs_to_its_end():
    ended = []
    assert Pass(lambda batches: ended.append(list(batches)), "batch", to_end=True).further_batch(CPU) >= 0
    assert ended == [["batch"] * 4]


def test_a_missing_peer_names_the_command_that_installs_it(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match="`make peers` installs it"):
        curvlinops_factors(work)


def number_of_hooks(model):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks) for x in model.modules())


@pytest.mark.slow
class TestInstalledPeers:
    """Against the libraries themselves, where they are installed."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("curvlinops")
        pytest.importorskip("laplace")

    @pytest.mark.filterwarnings("ignore")
    def test_every_peer_runs(self):
        section = measure_peers(PRESETS["tiny"], 1, CPU, lambda _: None)
        assert [row.name for row in section.peers] == ["torch.func.jacrev", "laplace-torch", "curvlinops", "curvlinops"]
        assert [row.error for row in section.peers] == [None] * 4

    def test_no_peer_leaves_hooks_that_slow_down_later_timings(self):
        work = separate_workload(PRESETS["tiny"].peers, CPU)
        hooks = number_of_hooks(work.model)
        Pass(curvlinops_factors(work), work.batch, to_end=True)()
        assert number_of_hooks(work.model) == hooks

    def test_the_compared_factors_are_equal(self):
        # In the first layer every slot affects the logits, so both sum over the same ones.
        shape = PRESETS["tiny"].peers
        work = separate_workload(shape, CPU)
        full = shape.hidden
        ours = work.collect([work.batch], fisher="empirical", sketch="exact", rank=full).layers[0]
        theirs = curvlinops_factors(work)([work.batch], fisher="empirical")
        for expert in range(shape.experts):
            name = next(n for n in theirs if f"layers.0.mlp.experts.{expert}." in n)
            for found, basis, values in zip(
                theirs[name], (ours.a_basis, ours.g_basis), (ours.a_eigenvalues, ours.g_eigenvalues), strict=True
            ):
                expected = basis[expert] * values[expert] @ basis[expert].mT
                torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-4, atol=1e-5)

    def test_eigenpairs_of_full_factors(self):
        factor = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        ((values, basis), _) = decomposed({"expert": (factor, factor)}, 2)
        assert values.tolist() == [2, 3]
        assert basis.abs().argmax(0).tolist() == [2, 1]
