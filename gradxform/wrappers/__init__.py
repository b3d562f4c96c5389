"""Optax's wrappers, for methods that evaluate ``value_fn``, take integers or are costly.

Names and arguments are Optax's. Three things differ: under a mask ``value_fn`` is a function of the
masked part; injected hyperparameters keep their precision, and integers stay integers; an
accumulated method runs only in the updates that use it. ``nnx_value_fn`` makes the ``value_fn`` of
a Flax NNX module.
"""
