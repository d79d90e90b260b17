"""Dense references: every matrix is written out, every derivative is taken by autograd, nothing is low-rank.

Vectors of weights follow `W.flatten()` with `W [d_out, d_in]`, so the block of an expert is `kron(G, A)`.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from oracles.models import looped_experts


@dataclass
class ObservedSlots:
    """Slots of one layer as its own loop saw them.

    `inputs [S, d_in]`, `gradients [K, S, d_out]` of each logit, and `owners [S]`: the example whose logits the slot
    moves, -1 for none, -2 for several.
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    inputs: torch.Tensor
    gradients: torch.Tensor
    owners: torch.Tensor

    @property
    def moves(self):
        return (self.gradients != 0).any(dim=2).any(dim=0) & (self.inputs != 0).any(dim=1)

    def counted(self):
        """Experts, inputs and gradients of the slots that move a logit."""
        return self.experts[self.moves], self.inputs[self.moves], self.gradients[:, self.moves]


def experts_modules(model):
    return [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "down_proj")]


@contextmanager
def traced(model):
    """Let every fused experts module keep what it sees, in a loop that is not the library's."""
    if ALL_EXPERTS_FUNCTIONS.get("oracle_loop") is None:
        ALL_EXPERTS_FUNCTIONS.register("oracle_loop", looped_experts)
    before = model.get_experts_implementation()
    model.set_experts_implementation("oracle_loop")
    modules = experts_modules(model)
    for module in modules:
        module.trace = []
    try:
        yield [module.trace for module in modules]
    finally:
        model.set_experts_implementation(before)
        for module in modules:
            del module.trace


def observe(model, class_logits, batch):
    """Run a batch with gradients and watch it: logits `[B, K]` with graph, and `ObservedSlots` of each layer."""
    with traced(model) as traces:
        logits, _ = class_logits(model, batch)
    finite = torch.where(logits == -torch.inf, 0, logits)
    layers = []
    for trace in traces:
        outputs = [seen.outputs for seen in trace]
        gradients = [
            torch.autograd.grad(finite[:, k].sum(), outputs, retain_graph=True, materialize_grads=True)
            for k in range(logits.shape[1])
        ]
        layers.append(
            ObservedSlots(
                torch.cat([torch.full_like(seen.tokens, seen.expert) for seen in trace]),
                torch.cat([seen.tokens for seen in trace]),
                torch.cat([seen.inputs for seen in trace]),
                torch.stack([torch.cat(g) for g in gradients]),
                _owners(finite, outputs),
            )
        )
    return logits, layers


def _owners(logits, outputs):
    """One backward pass an example."""
    weights = torch.linspace(1, 1.7, logits.shape[1], dtype=logits.dtype)
    moved = torch.stack(
        [
            torch.cat(torch.autograd.grad(row @ weights, outputs, retain_graph=True, materialize_grads=True))
            .ne(0)
            .any(1)
            for row in logits
        ]
    )
    return torch.where(moved.sum(0) == 1, moved.int().argmax(0), -moved.sum(0).clamp(max=1) - 1)


def canonical(experts, inputs, *others):
    """Sort slots by expert and first input, so that two views of the same slots can be compared."""
    keys = sorted(range(len(experts)), key=lambda s: (int(experts[s]), float(inputs[s, 0])))
    return [experts[keys], inputs[keys], *(other[..., keys, :] if other.dim() > 1 else other[keys] for other in others)]


def softmax_hessian(logits):
    """`diag(p) - p p^T`, `[B, K, K]`."""
    p = logits.detach().softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


@dataclass
class DenseFactors:
    """Full factors of one layer: `slots [E]`, `a [E, d_in, d_in]`, `g [E, d_out, d_out]`."""

    slots: torch.Tensor
    a: torch.Tensor
    g: torch.Tensor

    def block(self, expert):
        return self.slots[expert] * torch.kron(self.g[expert], self.a[expert])


def dense_kfac(observed, hessians, owners, num_experts, approximation="expand"):
    """K-FAC factors by definition, one expert and one slot after the other.

    Args:
        observed: one layer's slots.
        hessians: `[B, K, K]` second derivative of the loss in the logits (or what stands for it).
        owners: `[S]` example of each slot.
        num_experts: E.
        approximation: `expand` or `reduce`.
    """
    d_in, d_out = observed.inputs.shape[1], observed.gradients.shape[2]
    slots = torch.zeros(num_experts, dtype=torch.float64)
    a = torch.zeros(num_experts, d_in, d_in, dtype=torch.float64)
    g = torch.zeros(num_experts, d_out, d_out, dtype=torch.float64)
    for expert in range(num_experts):
        members = (observed.moves & (observed.experts == expert)).nonzero().flatten().tolist()
        groups = [[s] for s in members]
        if approximation == "reduce":
            groups = [[s for s in members if owners[s] == n] for n in sorted({int(owners[s]) for s in members})]
        for group in groups:
            mean_input = observed.inputs[group].double().mean(0)
            summed = observed.gradients[:, group].double().sum(1)  # [K, d_out]
            a[expert] += torch.outer(mean_input, mean_input)
            g[expert] += summed.T @ hessians[owners[group[0]]] @ summed
            slots[expert] += 1
    count = slots.clamp(min=1).view(-1, 1, 1)
    return DenseFactors(slots, a / count, g / count)


def weight_jacobians(logits, parameters):
    """Derivative of every logit in every expert's weights: one `[B, K, E, d_out * d_in]` a parameter `[E, o, i]`."""
    finite = torch.where(logits == -torch.inf, 0, logits)
    rows = [[torch.autograd.grad(f, parameters, retain_graph=True) for f in row] for row in finite]
    return [
        torch.stack([torch.stack([grads[i].flatten(1) for grads in row]) for row in rows])
        for i in range(len(parameters))
    ]


def dense_logit_covariance(jacobians, blocks, precisions):
    """`sum_{l,e} J_e (block_e + lambda_l I)^-1 J_e^T`: `[B, K, K]`.

    Args:
        jacobians: from `weight_jacobians`.
        blocks: for each layer, E dense curvature blocks.
        precisions: one a layer.
    """
    total = 0
    for jacobian, layer_blocks, precision in zip(jacobians, blocks, precisions, strict=True):
        for expert, block in enumerate(layer_blocks):
            inverse = torch.linalg.inv(block + precision * torch.eye(len(block), dtype=block.dtype))
            j = jacobian[:, :, expert].double()
            total = total + j @ inverse @ j.mT
    return total


def dense_log_det(blocks, precisions):
    """Log-determinant of the posterior precision, over all layers and experts."""
    total = 0.0
    for layer_blocks, precision in zip(blocks, precisions, strict=True):
        for block in layer_blocks:
            total += float(torch.linalg.slogdet(block + precision * torch.eye(len(block), dtype=block.dtype)).logabsdet)
    return total


def dense_ggn(jacobian, hessians):
    """The exact generalised Gauss-Newton block of every expert of a layer: `[E, D, D]`."""
    return torch.einsum("nied,nij,njef->edf", jacobian, hessians, jacobian)


def low_rank_blocks(layer):
    """The curvature blocks that a layer's low-rank factors stand for, written out."""
    blocks = []
    for expert in range(layer.num_experts):
        a = layer.a_basis[expert] @ torch.diag(layer.a_eigenvalues[expert]) @ layer.a_basis[expert].T
        g = layer.g_basis[expert] @ torch.diag(layer.g_eigenvalues[expert]) @ layer.g_basis[expert].T
        blocks.append(layer.slots[expert] * torch.kron(g.double(), a.double()))
    return blocks
