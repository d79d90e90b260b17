"""Calibration metrics: pure functions, and torchmetrics classes around them."""
