"""What a batch costs: how often layers run, and how far backward passes go."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
from toy import NUM_CLASSES, ToyModule, loader

from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import LaplaceEvidence, LaplaceLPO, fit_methods, get_method
from bmoe_lightning.methods.evaluation import Evaluation

BATCHES = list(loader(24, 1, batch_size=8))
CURVATURE_PASSES = {"exact": NUM_CLASSES - 1, "mc": 1, "empirical": 1}
# Two more, which end at the last layer, find out which example each token is of.
PREDICTION = {0: NUM_CLASSES - 1, 1: NUM_CLASSES - 1 + 2}


def class_logits(module, batch):
    return module.class_logits(batch)


@contextmanager
def counted(module):
    """How often each decoder layer runs, how often a gradient of its output is computed, and which have a graph."""
    forward, backward, graphs, handles = Counter(), Counter(), set(), []

    def watch(index):
        def ran(_layer, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            forward[index] += 1
            if hidden.requires_grad:
                graphs.add(index)
                hidden.register_hook(lambda _: backward.update([index]))

        return ran

    for index, layer in enumerate(module.network.model.layers):
        handles.append(layer.register_forward_hook(watch(index)))
    try:
        yield forward, backward, graphs
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("fisher", CURVATURE_PASSES)
def test_a_curvature_batch_is_one_forward_pass_and_a_backward_pass_for_each_label_of_the_fisher(fisher):
    module = ToyModule()
    with counted(module) as (forward, backward, _):
        collect_factors(module, class_logits, BATCHES, rank=2, fisher=fisher)
    assert forward == {0: len(BATCHES), 1: len(BATCHES)}
    number = CURVATURE_PASSES[fisher] * len(BATCHES)
    assert backward == {0: number, 1: number}


def test_nothing_is_computed_below_the_first_layer_of_a_curvature():
    """Though all parameters are trained: no graph is built there, so nothing is stored for it either."""
    module = ToyModule()
    layers = find_expert_layers(module)[1:]
    with counted(module) as (forward, backward, graphs):
        collect_factors(module, class_logits, BATCHES, rank=2, fisher="mc", layers=layers)
    assert forward == {0: len(BATCHES), 1: len(BATCHES)}
    assert backward == {1: len(BATCHES)}
    assert graphs == {1}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_layers_below_are_not_recomputed_under_gradient_checkpointing():
    module = ToyModule()
    module.network.gradient_checkpointing_enable()
    layers = find_expert_layers(module)[1:]
    with counted(module) as (forward, backward, _):
        collect_factors(module, class_logits, BATCHES, rank=2, fisher="mc", layers=layers)
    assert forward[0] == len(BATCHES)
    assert 0 not in backward


def test_a_prediction_is_one_forward_pass_and_one_backward_pass_less_than_there_are_classes():
    module = ToyModule()
    posterior = LaplacePosterior(collect_factors(module, class_logits, BATCHES, rank=2))
    posterior.predict(module, class_logits, BATCHES[1])  # checks, once, that no layer mixes examples
    with counted(module) as (forward, backward, _):
        posterior.predict(module, class_logits, BATCHES[0])
    assert forward == {0: 1, 1: 1}
    assert backward == PREDICTION


@pytest.mark.filterwarnings("ignore::bmoe_lightning.utils.fit_warnings.FitWarning")
def test_methods_share_the_passes_of_a_batch():
    module, curvature = ToyModule(), Curvature(rank=2)
    methods = [
        LaplaceEvidence(prior_mean="zero", curvature=curvature),
        LaplaceLPO(evidence_width=None, curvature=curvature),
        get_method("temperature"),
    ]
    evaluation = Evaluation(methods, fit_methods(methods, module, class_logits, BATCHES, BATCHES))
    evaluation.add(module, class_logits, BATCHES[1])
    with counted(module) as (forward, backward, _):
        evaluation.add(module, class_logits, BATCHES[0])
    assert forward == {0: 1, 1: 1}
    assert backward == PREDICTION
