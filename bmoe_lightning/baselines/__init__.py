"""Baselines the Laplace posterior is compared with: one file a method, all of the same shape."""
