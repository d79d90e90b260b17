"""All that touches a Lightning Trainer, the callback itself aside."""
