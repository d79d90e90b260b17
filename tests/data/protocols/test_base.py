import re

import pytest

from bmoe_lightning.data.protocols import HeldOutShare, Parts, Remainder, TrainingSample
from bmoe_lightning.data.protocols.paper import Paper
from bmoe_lightning.data.tasks import get_task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": "test", "test": "test"}, "one split has two purposes: train is 'train', calibration 'test'"),
        ({"calibration": HeldOutShare(0.2), "test": "train"}, "one split has two purposes"),
        ({"calibration": "train", "test": "test"}, "questions that are trained on too are a TrainingSample"),
        ({"calibration": "dev", "test": "test"}, "unknown split 'dev'; choose from train, validation, test"),
        ({"calibration": "validation", "test": "dev"}, "unknown split 'dev'"),
        (
            {"calibration": TrainingSample(5), "test": "test", "otherwise": HeldOutShare(0.2)},
            "otherwise replaces a calibration split that the data lack",
        ),
    ],
)
def test_parts_that_tune_on_what_is_reported_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Parts(**arguments)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_lies_between_nothing_and_all(fraction):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Paper(fraction=fraction).parts(get_task("arc"))


def test_a_sample_has_a_question():
    with pytest.raises(ValueError, match="count is 0; it must be at least 1"):
        TrainingSample(0)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (Parts("validation", "test"), "validation"),
        (Parts("validation", "test", otherwise=HeldOutShare(0.125)), "validation, or else 12.5 % of train"),
        (Parts(TrainingSample(7), "test"), "up to 7 of train, trained on too"),
        (Parts(Remainder("large", without="small"), "test"), "train of large that is not in small"),
    ],
)
def test_parts_in_words(parts, words):
    assert parts.describe_calibration() == words
