"""All code that depends on a Lightning Trainer, except the callback itself."""
