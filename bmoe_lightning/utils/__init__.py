"""Helpers for files, processes and random state, independent of models and methods."""
