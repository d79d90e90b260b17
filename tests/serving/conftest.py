"""A small training and the folder that it is saved in, for all tests of served models."""

from __future__ import annotations

from serving_fixtures import copied, saved, trained_run

__all__ = ["copied", "saved", "trained_run"]
