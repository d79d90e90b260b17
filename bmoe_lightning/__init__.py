"""Calibrated Mixture-of-Experts language models: a Laplace posterior on every expert, as a Lightning callback."""
