"""The experiments of the paper (Dialameh et al. 2025, https://arxiv.org/abs/2511.08968), each by one command."""
