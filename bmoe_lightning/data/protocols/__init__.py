"""Protocols, which say what each split of a data set is for; one file for each published evaluation."""

from bmoe_lightning.data.protocols.base import (
    HeldOutShare,
    Parts,
    Protocol,
    Remainder,
    TrainingSample,
    labelled_validation,
)
from bmoe_lightning.data.protocols.registry import (
    built_in_protocol_names,
    get_protocol,
    protocol_names,
    register_protocol,
)

__all__ = [
    "HeldOutShare",
    "Parts",
    "Protocol",
    "Remainder",
    "TrainingSample",
    "built_in_protocol_names",
    "get_protocol",
    "labelled_validation",
    "protocol_names",
    "register_protocol",
]
