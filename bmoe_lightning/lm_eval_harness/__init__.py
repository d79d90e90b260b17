"""A model of lm-evaluation-harness that predicts single-token choices with a fitted method.

`calibrated_lm` imports the harness; nothing else of the package does.
"""
