"""What other libraries wrap around a model's layers: adapters, compilation, checkpointing, offloading, quantisation.

One file a library. Each of its private names is read in one function, which says in which releases it was seen, and
`tests/experts/wrappers/` has a test of each on the real library. None of the libraries is imported here, transformers
and torch aside: a wrapper is recognised by the attributes that it adds.
"""
