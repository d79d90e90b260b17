"""Which weights of a model count as trained."""


def train_only(model, *parts):
    """Freeze all weights but those whose names contain one of some parts."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model
