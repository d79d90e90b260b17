"""Random routers beside posteriors over experts: the tables of https://arxiv.org/abs/2509.23830, by one command."""
