"""What the tests of `bmoe-lightning predict` share."""

from __future__ import annotations

from finetuner_cases import CALIBRATION, TEST, TRAIN

from bmoe_lightning.command.main import main
from bmoe_lightning.data.files import file_rows
from bmoe_lightning.serving import CalibratedModel

EVERY = (*TEST, *TRAIN, *CALIBRATION)


def run(folder, data, output, *options, quiet=True):
    arguments = ["--run", folder, "--data", data, "--output", output, "--device", "cpu", *options]
    return main(["predict", *map(str, arguments), *(["--quiet"] if quiet else [])])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def read(path):
    return [row for _, row in file_rows(path)]


def without_model(monkeypatch):
    """Fail where the model is loaded."""

    def refused(*arguments, **options):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(CalibratedModel, "from_pretrained", refused)
