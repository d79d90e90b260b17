"""Imports that are made when a name is first asked for, and what is said where a package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module, metadata
from types import ModuleType


def late_import(name: str) -> ModuleType:
    """Import a module.

    Raises:
        ImportError: If the module, or one that it imports, is missing; or if the installed torchvision cannot be
            loaded with the installed torch. Lightning and transformers import torchvision wherever it is installed.
    """
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:
        raise_for_torchvision(error)
        raise


def raise_for_torchvision(error: BaseException) -> None:
    """Say what is wrong if an import failed because torchvision cannot be loaded; otherwise return.

    Args:
        error: Exception of an import.

    Raises:
        ImportError: If torchvision is what failed.
    """
    reasons = [str(link) for link in _chain(error)]
    failed = next((reason for reason in reasons if "torchvision" in reason), None)
    if failed is None:
        return
    try:
        versions = f"torchvision {metadata.version('torchvision')} and torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        return  # the message names torchvision for another reason
    raise ImportError(
        f"{versions} do not fit together ({failed.splitlines()[0]}), and Lightning and transformers import torchvision "
        "wherever it is installed. Uninstall torchvision, which this package does not need, or install the build that "
        "belongs to this torch"
    ) from error


def how_to_install(extra: str) -> str:
    """The part of an error message that says how to install what an optional feature needs.

    Args:
        extra: Extra of this package that has it.
    """
    return f"install the extra {extra} (in a clone: pip install -c constraints.txt -e '.[{extra}]')"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
