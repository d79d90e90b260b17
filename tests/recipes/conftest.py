"""Fixtures of the tests of several recipes."""

from __future__ import annotations

import time

import pytest


@pytest.fixture
def clock(monkeypatch):
    """A clock that only actions move."""

    class Clock:
        now = 0.0

        def advance(self, by):
            self.now += by

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock
