"""A dense reference of what methods with other router weights train: the weights themselves, in the model."""

from __future__ import annotations

import copy
import math

import torch
from oracles.models import answer_logits, toy_batch
from torch.nn.functional import cross_entropy

from bmoe_lightning.methods import fit_methods
from bmoe_lightning.routers import find_routers


def labelled(model, *sizes, seed=0):
    """Batches whose labels are drawn from `softmax(logits / 3)`: the model is over-confident."""
    batch = toy_batch(num_rows=sum(sizes), seed=seed)
    with torch.no_grad():
        probabilities = (answer_logits(model, batch)[0] / 3).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    batch["labels"] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    columns = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in columns.items()} for i in range(len(sizes))]


def opposed(model, *sizes):
    """Batches with the labels that the model predicts, and the same ones with others."""
    found = labelled(model, *sizes)
    for batch in found:
        batch["labels"] = probabilities(model, batch).argmax(1)
    return found, [{**batch, "labels": (batch["labels"] + 1) % 4} for batch in found]


def permuted(batches, order):
    if not order:
        return batches
    generator = torch.Generator().manual_seed(order)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def trained_shifts(model, epochs, make_optimizer, rate, layers=(0, 1)):
    """Shifts `[N, D]` of each router after each step of training its weight, from the batches of each epoch."""
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    weights = [twin.get_submodule(router.name).weight for router in find_routers(twin) if router.index in layers]
    before = [weight.requires_grad_().detach().clone() for weight in weights]
    optimizer = make_optimizer(weights)
    steps = [batch for batches in epochs for batch in batches]
    found = []
    for number, batch in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(number, len(steps))
        optimizer.zero_grad()
        logits, labels = answer_logits(twin, batch)
        cross_entropy(logits, labels).backward()
        optimizer.step()
        found.append([weight.detach() - start for weight, start in zip(weights, before, strict=True)])
    return found


def adamw_rate(largest, warmup=0.05):
    def rate(step, num_steps):
        warm = max(1, math.ceil(warmup * num_steps))
        if step < warm:
            return largest * (step + 1) / warm
        return largest * 0.5 * (1 + math.cos(math.pi * (step - warm) / (num_steps - warm)))

    return rate


def adamw(weights):
    return torch.optim.AdamW(weights, weight_decay=0.0)


def sgd(weights):
    return torch.optim.SGD(weights)


def fit(method, model, train, held_out):
    found = fit_methods([method], model, answer_logits, train, held_out)
    return found, found.state_of(method)


def swapped(model, shifts, layers=(0, 1)):
    """A copy of a model with shifted router weights."""
    twin = copy.deepcopy(model)
    chosen = [router for router in find_routers(twin) if router.index in layers]
    for router, shift in zip(chosen, shifts, strict=True):
        twin.get_submodule(router.name).weight.data += shift
    return twin


def probabilities(model, batch):
    with torch.no_grad():
        return answer_logits(model, batch)[0].softmax(-1)
