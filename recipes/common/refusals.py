"""Which exceptions are messages for the user, and not defects."""

from __future__ import annotations

import dis
from types import TracebackType

_PACKAGES = ("bmoe_lightning", "recipes")
_RAISE = dis.opmap["RAISE_VARARGS"]


def refusal(error: BaseException) -> str:
    """The message of an exception as one line, if it says what was found and what to do; empty for a defect.

    That is so if a `raise` statement of this project has raised it, or the system: a file that cannot be read, or a
    lack of memory. The same class of exception from elsewhere, such as `ValueError` from torch, is a defect whose
    traceback tells more.

    Args:
        error: Exception that was caught.
    """
    message = " ".join(str(error).split())
    if isinstance(error, (RuntimeError, MemoryError)):
        # Imported late: torch takes seconds, and --help should not.
        from bmoe_lightning.utils.memory import is_out_of_memory

        if is_out_of_memory(error):
            found = f" ({message[:200]})" if message else ""
            return f"there is not enough memory{found}; use smaller batches, or a larger device"
    if isinstance(error, OSError) and error.strerror:
        return message
    is_refusal = isinstance(error, (ValueError, RuntimeError, ImportError, OSError))
    return message if is_refusal and _is_raised_here(error.__traceback__) else ""


def _is_raised_here(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is of this project, and at a `raise` statement rather than in a call of C code."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in _PACKAGES and traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == _RAISE
