"""A model folder in the layout that is published: one matrix an expert, written by hand."""

from safetensors.torch import save_file


def write_published_folder(path, model):
    """Write a Qwen2-MoE model's configuration and weights, and return the folder."""
    model.save_pretrained(path)
    tensors = {}
    for name, value in model.state_dict().items():
        base, _, last = name.rpartition(".")
        if last == "down_proj":
            tensors |= {f"{base}.{e}.down_proj.weight": w.clone() for e, w in enumerate(value)}
        elif last == "gate_up_proj":
            for e, w in enumerate(value):
                gate, up = w.chunk(2)
                tensors |= {f"{base}.{e}.gate_proj.weight": gate.clone(), f"{base}.{e}.up_proj.weight": up.clone()}
        else:
            tensors[name] = value.clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
