"""Hypothesis looks at the same examples in every run, and keeps none of them in a file."""

from hypothesis import Phase, settings

settings.register_profile(
    "same examples",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # to explain a failure takes minutes
)
settings.load_profile("same examples")
