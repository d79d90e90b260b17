"""The registry of methods.

Other packages register methods with an entry point of the group `bmoe_lightning.methods`
(`name = "package.module:Class"`), and code at run time with `register_method`; a command line can name a class
directly, as `package.module:Class`. See `bmoe_lightning.utils.registry`.
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
    "leave_one_out_temperature": "leave_one_out_temperature:LeaveOneOutTemperature",
    "isotropic": "isotropic:Isotropic",
    "laplace_last_layer": "laplace_last_layer:LaplaceLastLayer",
    "bayesian_lora": "bayesian_lora:BayesianLoRA",
    "swag": "swag:SWAG",
    "laplace_mixture": "laplace_mixture:LaplaceMixture",
    "router_noise": "router_noise:RouterNoise",
    "laplace_router_noise": "laplace_router_noise:LaplaceRouterNoise",
    "mean_field_router": "mean_field_router:MeanFieldRouter",
    "full_covariance_router": "full_covariance_router:FullCovarianceRouter",
    "temperature_router": "temperature_router:TemperatureRouter",
    "mc_dropout_router": "mc_dropout_router:MCDropoutRouter",
    "swag_router": "swag_router:SWAGRouter",
    "ensemble_router": "ensemble_router:EnsembleRouter",
    "fine_tuned_router": "fine_tuned_router:FineTunedRouter",
}


def _base() -> type[Method]:
    from bmoe_lightning.methods.base import Method

    return Method


_METHODS: Registry[Method] = Registry(
    kind="method", base=_base, group=ENTRY_POINT_GROUP, package="bmoe_lightning.methods", built_in=_BUILT_IN
)

M = TypeVar("M", bound="type[Method]")


def register_method(method: M) -> M:
    """Register a method under the default of its `name`; a decorator for a frozen dataclass.

    Args:
        method: Subclass of `Method` whose options all have defaults.

    Raises:
        TypeError: If it is not such a class.
        ValueError: If its name is already registered.
    """
    return _METHODS.register(method)


def get_method(method: str | Method) -> Method:
    """Look up a method.

    Args:
        method: Registered name, `package.module:Class`, or an instance, which is returned unchanged.

    Returns:
        The instance; by name, one with default options.

    Raises:
        ValueError: If there is no method of that name, or no such module or class.
        TypeError: If the class is not a method.
    """
    return _METHODS.get(method)


def check_method_name(name: str) -> None:
    """Check the name of a method without importing it, or torch.

    Args:
        name: Registered name, or `package.module:Class`, of which only the form is checked.

    Raises:
        ValueError: If there is no method of that name.
    """
    _METHODS.check_name(name)


def method_names() -> tuple[str, ...]:
    """The names of all methods: built-in, then from entry points, then registered at run time."""
    return _METHODS.names()


def built_in_names() -> tuple[str, ...]:
    """The names of the built-in methods."""
    return _METHODS.built_in_names()


def built_in_class_names() -> tuple[str, ...]:
    """The class names of the built-in methods."""
    return tuple(path.partition(":")[2] for path in _BUILT_IN.values())


def built_in_class(name: str) -> Any:
    """The class of a built-in method, by its class name.

    Raises:
        AttributeError: If there is no such class.
    """
    for registered, path in _BUILT_IN.items():
        if path.partition(":")[2] == name:
            return type(_METHODS.get(registered))
    raise AttributeError(f"module 'bmoe_lightning.methods' has no attribute {name!r}")
