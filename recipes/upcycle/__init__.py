"""Make a mixture of experts from a dense language model, by sparse upcycling."""
