"""AdamW for weights in half precision, whose updates are often smaller than the spacing of their values."""

from bmoe_lightning.optim.adamw import HalfPrecisionUpdates, check_half_precision_updates, make_adamw
from bmoe_lightning.optim.master_weights import MasterWeightAdamW

__all__ = ["HalfPrecisionUpdates", "MasterWeightAdamW", "check_half_precision_updates", "make_adamw"]
