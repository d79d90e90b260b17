"""The command `bmoe-lightning`: a fitted model without code."""
