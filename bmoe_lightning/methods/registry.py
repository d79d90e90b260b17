"""Methods by name.

Another package registers its methods with an entry point of the group `bmoe_lightning.methods`
(`name = "package.module:Class"`), running code with `register_method`; a command line names a class directly, as
`package.module:Class`. `bmoe_lightning.utils.registry` says what else there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from bmoe_lightning.utils.registry import Registry

if TYPE_CHECKING:
    from bmoe_lightning.methods.base import Method

ENTRY_POINT_GROUP = "bmoe_lightning.methods"

_BUILT_IN = {
    "map": "map:MAP",
    "mc_dropout": "mc_dropout:MCDropout",
    "checkpoint_ensemble": "checkpoint_ensemble:CheckpointEnsemble",
    "deep_ensemble": "deep_ensemble:DeepEnsemble",
    "temperature": "temperature:TemperatureScaling",
    "laplace_evidence": "laplace_evidence:LaplaceEvidence",
    "laplace_lpo": "laplace_lpo:LaplaceLPO",
    "laplace_temperature": "laplace_temperature:LaplaceTemperature",
    "evidence_temperature": "evidence_temperature:EvidenceTemperature",
    "shrunk_temperature": "shrunk_temperature:ShrunkTemperature",
    "isotropic": "isotropic:Isotropic",
    "laplace_last_layer": "laplace_last_layer:LaplaceLastLayer",
    "swag": "swag:SWAG",
}


def _base() -> type[Method]:
    from bmoe_lightning.methods.base import Method

    return Method


_METHODS: Registry[Method] = Registry(
    kind="method", base=_base, group=ENTRY_POINT_GROUP, package="bmoe_lightning.methods", built_in=_BUILT_IN
)

M = TypeVar("M", bound="type[Method]")


def register_method(method: M) -> M:
    """Make a method known by the default of its `name`; a decorator for a frozen dataclass.

    Args:
        method: Subclass of `Method` whose options all have defaults.

    Raises:
        TypeError: If it is no such class.
        ValueError: If its name is taken.
    """
    return _METHODS.register(method)


def get_method(method: str | Method) -> Method:
    """Look a method up.

    Args:
        method: Registered name, `package.module:Class`, or an instance, which is returned as it is.

    Returns:
        The method; by name, with its default options.

    Raises:
        ValueError: If there is no method of that name, or no such module or class.
        TypeError: If what is found is no method.
    """
    return _METHODS.get(method)


def method_names() -> tuple[str, ...]:
    """The names of all methods: built in, then of other packages, then registered by running code."""
    return _METHODS.names()


def built_in_names() -> tuple[str, ...]:
    """The names of the methods that this library brings."""
    return _METHODS.built_in_names()


def built_in_class_names() -> tuple[str, ...]:
    """The names of the classes of the methods that this library brings."""
    return tuple(path.partition(":")[2] for path in _BUILT_IN.values())


def built_in_class(name: str) -> Any:
    """The class of a method that this library brings, by the name of the class.

    Raises:
        AttributeError: If there is none.
    """
    for registered, path in _BUILT_IN.items():
        if path.partition(":")[2] == name:
            return type(_METHODS.get(registered))
    raise AttributeError(f"module 'bmoe_lightning.methods' has no attribute {name!r}")
