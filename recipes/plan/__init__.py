"""What `python -m recipes.plan` counts: a model's experts, and what posterior, training and curvature cost."""
