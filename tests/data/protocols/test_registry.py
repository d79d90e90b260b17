import dataclasses

import pytest

from bmoe_lightning.data.protocols import HeldOutShare, Parts, Protocol, Remainder, TrainingSample
from bmoe_lightning.data.protocols import registry as R
from bmoe_lightning.data.tasks import get_task, task_names


@pytest.mark.parametrize("name", R.built_in_protocol_names())
def test_built_in_protocols_say_what_every_task_is_made_of(name):
    protocol = R.get_protocol(name)
    assert protocol.name == name
    assert protocol.label
    assert all(entry.default is not dataclasses.MISSING for entry in dataclasses.fields(protocol))
    assert hash(protocol) == hash(R.get_protocol(name))
    for task in map(get_task, task_names()):
        assert protocol.parts(task).describe_calibration()


@pytest.mark.parametrize(
    ("name", "task", "calibration", "test"),
    [
        ("holdout", "openbookqa", "validation", "test"),
        ("holdout", "winogrande", "validation", "test"),
        ("paper", "openbookqa", HeldOutShare(0.2), "validation"),
        ("paper", "arc", HeldOutShare(0.2), "validation"),
        ("paper", "winogrande", HeldOutShare(0.2), "test"),
        ("paper", "boolq", HeldOutShare(0.2), "test"),
        ("paper", "medmcqa", HeldOutShare(0.2), "test"),
        ("blob", "openbookqa", TrainingSample(500), "validation"),
        ("blob", "winogrande", TrainingSample(500), "test"),
        ("bayesadapt", "openbookqa", "validation", "test"),
        ("bayesadapt", "arc", "validation", "test"),
        ("bayesadapt", "winogrande", Remainder("winogrande_xl", "winogrande_l"), "test"),
        ("bayesadapt", "boolq", HeldOutShare(0.2), "test"),
    ],
)
def test_what_is_published(name, task, calibration, test):
    parts = R.get_protocol(name).parts(get_task(task))
    assert (parts.train, parts.calibration, parts.test) == ("train", calibration, test)
    # The role `test` is the file `validation` where the answers of the test split are hidden.
    public = {"winogrande": "validation", "boolq": "validation", "medmcqa": "validation"}
    assert get_task(task).split_names(test)[0] == public.get(task, test)


@dataclasses.dataclass(frozen=True)
class Mine(Protocol):
    name: str = "mine"
    label: str = "Mine"

    def parts(self, task):
        return Parts("validation", "test")


def test_protocols_of_others(monkeypatch):
    monkeypatch.setattr(R._PROTOCOLS, "_registered", {})
    R.register_protocol(Mine)
    assert R.get_protocol("mine") == Mine()
    assert R.protocol_names() == (*R.built_in_protocol_names(), "mine")
    assert R.get_protocol(Mine(seed=3)).seed == 3
    with pytest.raises(ValueError, match="unknown protocol 'papers', did you mean 'paper'"):
        R.get_protocol("papers")
    with pytest.raises(TypeError, match="a protocol is a name or an instance"):
        R.get_protocol(3)
