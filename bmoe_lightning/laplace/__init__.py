"""The low-rank Kronecker Laplace posterior: its evidence, its prior, its predictions."""
