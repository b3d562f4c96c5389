"""Optax's wrappers, for methods that evaluate ``value_fn``, take whole numbers or are costly.

Names and arguments are Optax's. What differs: under a mask ``value_fn`` is a function of the masked
part; injected hyperparameters keep their precision and whole numbers stay whole; an accumulated
method runs only when it moves. ``nnx_value_fn`` writes ``value_fn`` for Flax NNX modules.
"""
