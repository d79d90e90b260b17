"""Memory and compute of a run, from a model's configuration alone (`python -m recipes.plan`)."""
