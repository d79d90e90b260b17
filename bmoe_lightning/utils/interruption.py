"""Exit statuses of processes that a signal stops, and the exception of ranks that stop because another one did."""

from __future__ import annotations

import signal

SIGTERM_STATUS = 128 + signal.SIGTERM
SIGINT_STATUS = 128 + signal.SIGINT


class InterruptedPassError(SystemExit):
    """Another rank was stopped by a signal in a pass over data; ends the process with the status of SIGTERM."""

    def __init__(self) -> None:
        super().__init__(SIGTERM_STATUS)
