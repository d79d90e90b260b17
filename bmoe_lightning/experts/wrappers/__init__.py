"""Wrappers of other libraries around a model's layers: adapters, compilation, checkpointing, offloading, quantisation.

One file for each library. Each private name is read in one function, whose docstring names the releases in which it was
seen, and `tests/experts/wrappers/` tests each with the real library. Only transformers and torch are imported here:
other wrappers are recognised by the attributes that they add.
"""
