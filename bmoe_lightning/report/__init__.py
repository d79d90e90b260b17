"""Results for people: tables, figures and TensorBoard sub-runs."""
