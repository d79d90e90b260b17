"""A user's own module with Bayesian routers that are not at their prior, and the gradients of one optimizer step."""

from __future__ import annotations

from contextlib import nullcontext

import lightning as L
import torch
from oracles.models import ToyConfig, ToyLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import ToyModule, loader

from bmoe_lightning.routers import BayesianRouters, RouterOptions, trained_routers

BETA, SEED = 0.3, 5


class UsersModule(ToyModule):
    """One in float64 whose routers can run."""

    def __init__(self, checkpointing=None, **options):
        super().__init__(**options)
        self.double()
        self.network.set_experts_implementation("eager")  # the default has no float64
        if checkpointing is not None:
            kwargs = {"use_reentrant": checkpointing == "reentrant"}
            self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            self.network.enable_input_require_grads()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OwnNetwork(nn.Module):
    """A mixture of experts that is no model of transformers, whose gates are linear layers."""

    def __init__(self, checkpointing):
        super().__init__()
        config = ToyConfig(layout="modules", width=8)
        self.words = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.width, config.vocab)
        self.checkpointing = checkpointing

    def forward(self, ids, attention_mask):
        square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
        visible = (square.tril() & attention_mask.bool().unsqueeze(1)) | (square.tril() & square.triu())
        x = self.words(ids)
        for layer in self.layers:
            if self.checkpointing is None:
                x = layer(x, visible)
            else:
                x = checkpoint(layer, x, visible, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


class OwnModule(UsersModule):
    """A LightningModule around it, whose `forward` takes a batch, and which nobody calls unless `calls_itself`."""

    def __init__(self, checkpointing=None, *, calls_itself=False):
        L.LightningModule.__init__(self)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = OwnNetwork(checkpointing).double()
        self.calls_itself = calls_itself

    @staticmethod
    def mask(batch):
        return (batch["input_ids"] > 7).long()

    def forward(self, batch):
        return self.network(batch["input_ids"], self.mask(batch))

    def class_logits(self, batch):
        logits = self(batch) if self.calls_itself else self.forward(batch)
        return logits[:, -1, [1, 2, 3]], batch.get("labels")


def perturbed(module, kind="mean_field"):
    """The module, with Bayesian routers whose divergence has a gradient."""
    routers = BayesianRouters(module, RouterOptions(kind, seed=SEED))
    routers.set_scales([0.5] * len(routers))
    generator = torch.Generator().manual_seed(0)
    for parameter in routers.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    module.bayesian_routers = routers
    return module


class Gradients(L.Callback):
    """Keeps the gradients of the first optimizer step, as the optimizer sees them."""

    def __init__(self):
        self.found = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.found:
            named = pl_module.named_parameters()
            self.found = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def explicit(module, batches, *, seed=SEED, autocast=nullcontext, step=0):
    """The gradients of the mean over batches of `loss + beta KL`."""
    routers = module.bayesian_routers
    module.train()
    with trained_routers(module, routers.nets, seed=seed) as training:
        for number, batch in enumerate(batches):
            training.begin(step + number)
            with autocast():
                loss = module.training_step(batch, number)
                penalty = training.penalty()
            ((loss + BETA * penalty) / len(batches)).backward()
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def batches(number, seed=1, size=4):
    """A loader of as many batches, in order."""
    return loader(number * size, seed, batch_size=size)
