"""Every optimisation method of a deep-learning lecture, as an Optax gradient transformation.

>>> import jax.numpy as jnp, gradxform as gx
>>> solution = gx.minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), gx.momentum(0.1))
>>> solution.params.round(3)
Array([1., 1., 1.], dtype=float32)
"""

from gradxform.lazy_names import lazy_names

__version__ = "0.2.0"

__getattr__, __dir__ = lazy_names(__name__, globals())
