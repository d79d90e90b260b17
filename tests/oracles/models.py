"""Small mixture-of-experts models whose every operation is in float64, and ways to ask them for class logits.

`ToyMoE` computes the same function with fused experts and with an `nn.ModuleList` of experts. The models of
transformers take their norms and router probabilities in float32 whatever the weights' dtype, so agreement to rounding
is asked of this one.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import use_experts_implementation

ANSWERS = (3, 5, 7, 9)


@dataclass
class Seen:
    """What the loop over experts saw: one expert's slots in one call."""

    expert: int
    tokens: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor


def looped_experts(self, hidden_states, top_k_index, top_k_weights):
    """An experts forward as a plain loop; where the module has a list `trace`, each expert's slots are put there."""
    total = torch.zeros_like(hidden_states)
    trace = getattr(self, "trace", None)
    for expert in range(self.num_experts):
        tokens, choice = torch.where(top_k_index == expert)
        if len(tokens) == 0:
            continue
        gate, up = (hidden_states[tokens] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
        inputs = self.act_fn(gate) * up
        outputs = inputs @ self.down_proj[expert].T
        if trace is not None:
            trace.append(Seen(expert, tokens, inputs.detach(), outputs))
        weighted = outputs * top_k_weights[tokens, choice].unsqueeze(1)
        total = total.index_add(0, tokens, weighted.to(total.dtype))
    return total


class ToyConfig(PreTrainedConfig):
    model_type = "bmoe_toy"

    def __init__(
        self,
        width=6,
        inner=5,
        num_experts=4,
        top_k=2,
        num_layers=2,
        vocab=30,
        max_length=16,
        layout="fused",
        idle=(),
        mixes=False,
        **kwargs,
    ):
        self.width, self.inner, self.num_experts, self.top_k = width, inner, num_experts, top_k
        self.num_layers, self.vocab, self.max_length, self.layout = num_layers, vocab, max_length, layout
        self.idle, self.mixes = list(idle), mixes
        super().__init__(**kwargs)


@use_experts_implementation
class ToyExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(config.num_experts, 2 * config.inner, config.width) * 0.6)
        self.down_proj = nn.Parameter(torch.randn(config.num_experts, config.width, config.inner) * 0.6)
        self.act_fn = nn.SiLU()

    forward = looped_experts


class Specialist(nn.Module):
    """One expert, with names that no library uses."""

    def __init__(self, config):
        super().__init__()
        self.fall = nn.Linear(config.inner, config.width, bias=False)
        self.valve = nn.Linear(config.width, config.inner, bias=False)
        self.lift = nn.Linear(config.width, config.inner, bias=False)

    def forward(self, x):
        return self.fall(nn.functional.silu(self.valve(x)) * self.lift(x))


class ToyMixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.width, config.num_experts, bias=False)
        if config.layout == "fused":
            self.crew = ToyExperts(config)
        else:
            self.crew = nn.ModuleList(Specialist(config) for _ in range(config.num_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens)
        for expert in self.config.idle:
            scores = scores.index_fill(1, torch.tensor([expert], device=scores.device), -1e9)
        weights, index = scores.softmax(-1).topk(self.config.top_k, dim=-1)
        if self.config.layout == "fused":
            return self.crew(tokens, index, weights).view_as(x)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.crew):
            rows, choice = torch.where(index == number)
            if len(rows):
                weighted = expert(tokens[rows]) * weights[rows, choice].unsqueeze(1)
                total = total.index_add(0, rows, weighted.to(total.dtype))
        return total.view_as(x)


def _norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixes = config.mixes
        self.query, self.key, self.value = (nn.Linear(config.width, config.width, bias=False) for _ in range(3))
        self.mixture = ToyMixture(config)

    def forward(self, x, visible):
        h = _norm(x)
        scores = self.query(h) @ self.key(h).mT / h.shape[-1] ** 0.5
        x = x + scores.masked_fill(~visible, -torch.inf).softmax(-1) @ self.value(h)
        if self.mixes:
            x = x + x.mean(0, keepdim=True)  # every row hears of every other
        return x + self.mixture(_norm(x))


class ToyMoE(PreTrainedModel):
    """A causal language model: embeddings, attention and mixtures of experts, all in float64 if its weights are."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab, config.width)
        self.places = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, attention_mask, segments=None):
        """Logits `[B, T, vocab]`; `segments` keeps the examples that share a row apart."""
        real = attention_mask.bool()
        segments = torch.zeros_like(input_ids) if segments is None else segments
        same = segments.unsqueeze(2) == segments.unsqueeze(1)
        square = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        ahead = square.tril()
        visible = (ahead & same & real.unsqueeze(1)) | (ahead & ahead.T)
        place = ((ahead & same) * attention_mask.unsqueeze(1)).sum(-1).sub(1).clamp(min=0)
        x = self.words(input_ids) + self.places(place)
        for layer in self.layers:
            x = layer(x, visible)
        return 2 * self.head(_norm(x))


def toy_model(seed=0, **config):
    """A float64 `ToyMoE` with fused experts, dispatched by its own loop."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ToyMoE(ToyConfig(**config)).double().eval()
    model.set_experts_implementation("eager")
    return model


def as_modules(fused):
    """The same model with an `nn.ModuleList` of experts, holding copies of the same weights."""
    config = ToyConfig(**{**fused.config.to_dict(), "layout": "modules"})
    with torch.random.fork_rng():
        model = ToyMoE(config).to(fused.head.weight.dtype).eval()
    state = {}
    for name, value in fused.state_dict().items():
        base, _, last = name.rpartition(".")
        if last == "down_proj":
            state.update({f"{base}.{e}.fall.weight": w for e, w in enumerate(value)})
        elif last == "gate_up_proj":
            for e, w in enumerate(value):
                state[f"{base}.{e}.valve.weight"], state[f"{base}.{e}.lift.weight"] = w.chunk(2)
        else:
            state[name] = value
    model.load_state_dict(state)
    return model


def toy_batch(num_rows=5, length=7, seed=1, vocab=30, num_classes=4, pad="left"):
    """Token ids with padding, its mask and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (num_rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (num_rows,), generator=generator)
    place = torch.arange(length)
    left = (place >= length - lengths.unsqueeze(1)).long()
    mask = left if pad == "left" else left.flip(1)
    words = (
        ids if pad == "left" else torch.stack([row.roll(int(n) - length) for row, n in zip(ids, lengths, strict=True)])
    )
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    return {"ids": words * mask, "mask": mask, "labels": labels}


def answer_logits(model, batch):
    """Logits of the answer words at the last real position: `[B, K]`."""
    output = model(input_ids=batch["ids"], attention_mask=batch["mask"])
    output = output if isinstance(output, torch.Tensor) else output.logits
    last = batch["mask"].shape[1] - 1 - batch["mask"].flip(1).argmax(1)
    logits = output[torch.arange(len(last)), last.to(output.device)][:, list(ANSWERS)]
    if "absent" in batch:
        logits = logits.masked_fill(batch["absent"], -torch.inf)
    return logits, batch.get("labels")


def split(batch, *sizes):
    """Cut a batch into consecutive batches."""
    columns = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in columns.items()} for i in range(len(sizes))]


def taken(batch, rows):
    """Chosen rows of a batch."""
    return {name: value[rows] for name, value in batch.items()}


def choice_batch(num_examples=4, num_choices=3, length=6, seed=2):
    """One sequence for each choice of each example: ids and mask `[B, K, T]`."""
    flat = toy_batch(num_examples * num_choices, length, seed)
    return {
        "ids": flat["ids"].view(num_examples, num_choices, length),
        "mask": flat["mask"].view(num_examples, num_choices, length),
        "labels": flat["labels"][:num_examples] % num_choices,
    }


def _scores(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask)[:, -1, 0]


def choices_by_example(model, batch):
    """B x K rows, the choices of an example one after the other."""
    scores = _scores(model, batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1))
    return scores.view(batch["ids"].shape[:2]), batch["labels"]


def choices_by_class(model, batch):
    """K x B rows: all first choices, then all second ones."""
    ids, mask = batch["ids"].transpose(0, 1), batch["mask"].transpose(0, 1)
    return _scores(model, ids.flatten(0, 1), mask.flatten(0, 1)).view(ids.shape[:2]).T, batch["labels"]


def choices_permuted(model, batch):
    """B x K rows in an order of their own."""
    ids, mask = batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))
    scores = _scores(model, ids[order], mask[order])
    return scores[order.argsort()].view(batch["ids"].shape[:2]), batch["labels"]


def choices_one_call_each(model, batch):
    """The model called once a choice."""
    scores = [
        _scores(model, ids, mask) for ids, mask in zip(batch["ids"].unbind(1), batch["mask"].unbind(1), strict=True)
    ]
    return torch.stack(scores, dim=1), batch["labels"]


def packed_logits(model, batch):
    """Two examples in each row, which do not see each other; same logits as `answer_logits` on the same batch."""
    ids, mask = (batch[name].view(-1, 2 * batch["ids"].shape[1]) for name in ("ids", "mask"))
    length = batch["ids"].shape[1]
    segments = (torch.arange(2 * length) >= length).long().expand_as(ids)
    output = model(input_ids=ids, attention_mask=mask, segments=segments)
    return output[:, [length - 1, 2 * length - 1]].flatten(0, 1)[:, list(ANSWERS)], batch["labels"]


def tiny_qwen(seed=0, *, dtype=torch.float64, implementation="eager", **config):
    """A `Qwen2MoeForCausalLM` of a few thousand weights with fused experts."""
    settings = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings)).to(dtype).eval()
    model.set_experts_implementation(implementation)
    return model
