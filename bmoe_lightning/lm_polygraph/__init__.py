"""An estimator of lm-polygraph: the variance of the log-probability of generated text under a posterior.

`posterior_scores` imports lm-polygraph; nothing else of the package does.
"""
