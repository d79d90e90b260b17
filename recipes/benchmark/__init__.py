"""Costs of curvature, prediction and prior fit, as ratios within one run."""
