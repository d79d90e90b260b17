"""What makes a fit on few held-out labels doubtful, whichever method it is of."""

from __future__ import annotations

from bmoe_lightning.methods.needs import Needs
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
