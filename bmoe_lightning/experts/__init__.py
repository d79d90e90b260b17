"""Expert layers: where they are in a model, and what flows through them."""
