"""Low-rank Kronecker-factored curvature of expert layers, collected in one pass over data."""
