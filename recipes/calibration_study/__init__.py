"""Which method to use with few held-out labels: the regret of each on fine-tunings of several kinds."""
