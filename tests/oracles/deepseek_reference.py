"""DeepSeekMoE by its description, in plain float64, and checkpoint folders in the published naming."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

# config.json of deepseek-ai/deepseek-moe-16b-base.
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}
SMALL = {
    **PUBLISHED,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 8,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "torch_dtype": "float64",
    "vocab_size": 30,
}


def published_shapes(config):
    """Name and shape of every tensor of a published checkpoint, written down from the architecture."""
    width, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def mlp(name, inner):
        return {
            f"{name}.gate_proj.weight": (inner, width),
            f"{name}.up_proj.weight": (inner, width),
            f"{name}.down_proj.weight": (width, inner),
        }

    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    shapes["lm_head.weight"] = (config["vocab_size"], width)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, out in (("q", queries), ("k", keys), ("v", keys), ("o", width)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, queries if name == "o" else width)
            if config["attention_bias"]:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (out,)
        shapes |= {f"{layer}.input_layernorm.weight": (width,), f"{layer}.post_attention_layernorm.weight": (width,)}
        if index < config["first_k_dense_replace"] or index % config["moe_layer_freq"]:
            shapes |= mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], width)
        for expert in range(config["n_routed_experts"]):
            shapes |= mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            shapes |= mlp(f"{layer}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
    return shapes


def random_tensors(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.3 if len(shape) > 1 else 0.1)
        + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, shape in published_shapes(config).items()
    }


def write_folder(path, config, tensors, shards=3):
    """A checkpoint folder as published: shards with an index, and code that must not run."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name in ("configuration", "modeling"):
        (path / f"{name}_deepseek.py").write_text("raise SystemExit('code of the folder was run')\n")
    names = list(tensors)
    index = {}
    for shard in range(shards):
        # Every third tensor: the experts of one layer lie in all shards.
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n].clone() for n in names[shard::shards]}, path / file, {"format": "pt"})
        index |= dict.fromkeys(names[shard::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def read_folder(path):
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def plain_logits(config, weights, ids, mask):
    """Logits `[B, T, V]` by the description of the architecture, one token and one expert at a time, in float64."""
    return torch.stack([_row(config, weights, ids[b], mask[b]) for b in range(len(ids))])


def _row(config, weights, ids, mask):
    first = int(mask.argmax())
    x = weights["model.embed_tokens.weight"][ids[first:]]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        x = x + _attention(config, weights, layer, _norm(config, x, weights[f"{layer}.input_layernorm.weight"]))
        h = _norm(config, x, weights[f"{layer}.post_attention_layernorm.weight"])
        if f"{layer}.mlp.gate.weight" in weights:
            x = x + torch.stack([_mixture(config, weights, f"{layer}.mlp", token) for token in h])
        else:
            x = x + _mlp(weights, f"{layer}.mlp", h)
    logits = _norm(config, x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return torch.cat([torch.full((first, logits.shape[1]), torch.nan, dtype=logits.dtype), logits])


def _norm(config, x, scale):
    return scale * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _mlp(weights, name, x):
    gate, up = x @ weights[f"{name}.gate_proj.weight"].T, x @ weights[f"{name}.up_proj.weight"].T
    return (silu(gate) * up) @ weights[f"{name}.down_proj.weight"].T


def _mixture(config, weights, name, token):
    scores = (weights[f"{name}.gate.weight"] @ token).exp()
    scores = scores / scores.sum()
    chosen = scores.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
    total = sum(scores[chosen]) if config["norm_topk_prob"] and len(chosen) > 1 else 1.0
    output = sum(scores[e] / total * _mlp(weights, f"{name}.experts.{e}", token) for e in chosen)
    inner = config["moe_intermediate_size"]
    for shared in range(config["n_shared_experts"] or 0):
        # The published matrix of the shared experts holds them side by side.
        rows = slice(shared * inner, (shared + 1) * inner)
        gate, up, down = (weights[f"{name}.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
        output = output + down[:, rows] @ (silu(gate[rows] @ token) * (up[rows] @ token))
    return output


def _attention(config, weights, layer, x):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (_linear(weights, f"{layer}.self_attn.{part}_proj", x) for part in "qkv")
    width = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        own, shared = head * width, (head * groups // heads) * width
        query = _rotated(config, q[:, own : own + width])
        key = _rotated(config, k[:, shared : shared + width])
        scores = (query @ key.T / width**0.5).exp().tril()
        outputs.append(scores / scores.sum(-1, keepdim=True) @ v[:, shared : shared + width])
    return _linear(weights, f"{layer}.self_attn.o_proj", torch.cat(outputs, dim=-1))


def _linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def _rotated(config, x):
    """Each pair (i, i + half) of position t turned by t / theta^(i / half)."""
    half = x.shape[-1] // 2
    place = torch.arange(len(x), dtype=torch.float64).unsqueeze(1) / (config["rope_scaling"] or {"factor": 1})["factor"]
    angle = place * config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def left_padded(vocab):
    ids = torch.randint(1, vocab, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [6]])).long()
    return ids * mask, mask
