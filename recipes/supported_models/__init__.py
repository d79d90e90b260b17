"""Every MoE family of the installed transformers: which there are, a tiny model of each, and what works on it."""
