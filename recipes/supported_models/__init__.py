"""Survey of every MoE family of the installed transformers, on a tiny model of each."""
