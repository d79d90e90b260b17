"""What held-out labels say against a fit, whichever method it is of."""

from __future__ import annotations

from torch import Tensor

from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.temperature_search import check_labelled
from bmoe_lightning.metrics.chance import chance_warning
from bmoe_lightning.utils.fit_warnings import warn_of_fit


def warn_of_few_labels(needs: Needs, num_labels: int) -> None:
    """Warn if there are fewer held-out labels than a method advises.

    Args:
        needs: Requirements of the method.
        num_labels: Number of labels that it was fitted on.

    Warns:
        FitWarning: With both numbers.
    """
    if needs.calibration_labels and num_labels < needs.advised_labels:
        warn_of_fit(
            f"fitted on {num_labels} held-out labels, and {needs.advised_labels} or more are advised: with fewer it"
            " was measured to lose against simpler methods; add labels, or use a method that advises fewer",
            stacklevel=2,
        )


def warn_of_chance(logits: Tensor, labels: Tensor | None) -> None:
    """Warn if the model's accuracy on held-out labels is not above chance; see `chance_warning`.

    Args:
        logits: Logits `[N, K]`, `-inf` for absent classes.
        labels: Labels `[N]`; None warns of nothing.

    Warns:
        FitWarning: With the accuracy, chance and the test's p-value.
    """
    sentence = None if labels is None else chance_warning(*check_labelled(logits, labels))
    if sentence is not None:
        warn_of_fit(sentence, stacklevel=2)
