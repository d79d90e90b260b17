"""The error of recipes that is reported as one line."""

from __future__ import annotations


class RecipeError(RuntimeError):
    """A recipe cannot run with these settings; the message is one line for the user."""
