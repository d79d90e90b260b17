"""The registry of protocols.

Other packages register protocols with an entry point of the group `bmoe_lightning.protocols`; see
`bmoe_lightning.utils.registry`.
"""

from __future__ import annotations

from typing import TypeVar

from bmoe_lightning.data.protocols.base import Protocol
from bmoe_lightning.utils.registry import Registry

ENTRY_POINT_GROUP = "bmoe_lightning.protocols"

_PROTOCOLS: Registry[Protocol] = Registry(
    kind="protocol",
    base=lambda: Protocol,
    group=ENTRY_POINT_GROUP,
    package="bmoe_lightning.data.protocols",
    built_in={
        "holdout": "holdout:Holdout",
        "paper": "paper:Paper",
        "blob": "blob:BLoB",
        "bayesadapt": "bayesadapt:BayesAdapt",
    },
)

T = TypeVar("T", bound="type[Protocol]")


def register_protocol(protocol: T) -> T:
    """Register a protocol under the default of its `name`; a decorator for a frozen dataclass.

    Args:
        protocol: Subclass of `Protocol` whose fields all have defaults.

    Raises:
        TypeError: If it is no such class.
        ValueError: If its name is taken.
    """
    return _PROTOCOLS.register(protocol)


def get_protocol(protocol: str | Protocol) -> Protocol:
    """Look up a protocol.

    Args:
        protocol: Registered name, `package.module:Class`, or an instance, which is returned as it is.

    Raises:
        ValueError: If there is no protocol of that name, or no such module or class.
        TypeError: If what is found is no protocol.
    """
    return _PROTOCOLS.get(protocol)


def protocol_names() -> tuple[str, ...]:
    """The names of all protocols, in the order of those of tasks."""
    return _PROTOCOLS.names()


def built_in_protocol_names() -> tuple[str, ...]:
    """The names of the built-in protocols."""
    return _PROTOCOLS.built_in_names()
