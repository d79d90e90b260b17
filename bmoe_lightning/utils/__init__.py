"""Files, processes and random state: helpers that know nothing of models or methods."""
