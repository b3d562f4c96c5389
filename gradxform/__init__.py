"""Every optimisation method of a deep-learning lecture, as an Optax gradient transformation.

>>> import jax.numpy as jnp, gradxform as gx
>>> solution = gx.minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), gx.momentum(0.1))
>>> solution.params.round(3)
Array([1., 1., 1.], dtype=float32)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradxform.averaging import polyak_average as polyak_average
    from gradxform.curvature import compose as compose
    from gradxform.curvature import gauss_newton as gauss_newton
    from gradxform.curvature import hessian as hessian
    from gradxform.curvature import hutchinson_diagonal as hutchinson_diagonal
    from gradxform.curvature import nystrom as nystrom
    from gradxform.evaluation import eval_params as eval_params
    from gradxform.first_order.adadelta import adadelta as adadelta
    from gradxform.first_order.adadelta import scale_by_adadelta as scale_by_adadelta
    from gradxform.first_order.adagrad import adagrad as adagrad
    from gradxform.first_order.adagrad import scale_by_adagrad as scale_by_adagrad
    from gradxform.first_order.adam import adam as adam
    from gradxform.first_order.adam import scale_by_adam as scale_by_adam
    from gradxform.first_order.coordinate_descent import coordinate_descent as coordinate_descent
    from gradxform.first_order.delta_bar_delta import delta_bar_delta as delta_bar_delta
    from gradxform.first_order.momentum import momentum as momentum
    from gradxform.first_order.nesterov import nesterov as nesterov
    from gradxform.first_order.rmsprop import rmsprop as rmsprop
    from gradxform.first_order.rmsprop import scale_by_rmsprop as scale_by_rmsprop
    from gradxform.first_order.sgd import sgd as sgd
    from gradxform.line_search import with_line_search as with_line_search
    from gradxform.minimization import Solution as Solution
    from gradxform.minimization import Status as Status
    from gradxform.minimization import minimize as minimize
    from gradxform.minimization import progress_bar as progress_bar
    from gradxform.schedules import inverse_time_decay as inverse_time_decay
    from gradxform.schedules import linear_decay as linear_decay
    from gradxform.second_order.hessian_free import hessian_free as hessian_free
    from gradxform.second_order.newton import newton as newton
    from gradxform.second_order.newton import scale_by_newton as scale_by_newton
    from gradxform.second_order.newton_cg import newton_cg as newton_cg
    from gradxform.second_order.newton_cg import scale_by_newton_cg as scale_by_newton_cg
    from gradxform.second_order.nonlinear_cg import nonlinear_cg as nonlinear_cg
    from gradxform.second_order.nonlinear_cg import scale_by_nonlinear_cg as scale_by_nonlinear_cg
    from gradxform.second_order.quasi_newton import bfgs as bfgs
    from gradxform.second_order.quasi_newton import lbfgs as lbfgs
    from gradxform.second_order.quasi_newton import scale_by_bfgs as scale_by_bfgs
    from gradxform.second_order.quasi_newton import scale_by_lbfgs as scale_by_lbfgs
    from gradxform.second_order.trust_region import trust_region as trust_region
    from gradxform.wrappers import accumulate as accumulate
    from gradxform.wrappers import inject_hyperparams as inject_hyperparams
    from gradxform.wrappers import masked as masked
    from gradxform.wrappers import nnx_value_fn as nnx_value_fn
    from gradxform.wrappers import partition as partition

# Imported at first use, so that the command line can print its help without waiting for JAX.
_MODULES = {
    "averaging": ("polyak_average",),
    "curvature": ("compose", "gauss_newton", "hessian", "hutchinson_diagonal", "nystrom"),
    "evaluation": ("eval_params",),
    "first_order.adadelta": ("adadelta", "scale_by_adadelta"),
    "first_order.adagrad": ("adagrad", "scale_by_adagrad"),
    "first_order.adam": ("adam", "scale_by_adam"),
    "first_order.coordinate_descent": ("coordinate_descent",),
    "first_order.delta_bar_delta": ("delta_bar_delta",),
    "first_order.momentum": ("momentum",),
    "first_order.nesterov": ("nesterov",),
    "first_order.rmsprop": ("rmsprop", "scale_by_rmsprop"),
    "first_order.sgd": ("sgd",),
    "line_search": ("with_line_search",),
    "minimization": ("Solution", "Status", "minimize", "progress_bar"),
    "schedules": ("inverse_time_decay", "linear_decay"),
    "second_order.hessian_free": ("hessian_free",),
    "second_order.newton": ("newton", "scale_by_newton"),
    "second_order.newton_cg": ("newton_cg", "scale_by_newton_cg"),
    "second_order.nonlinear_cg": ("nonlinear_cg", "scale_by_nonlinear_cg"),
    "second_order.quasi_newton": ("bfgs", "lbfgs", "scale_by_bfgs", "scale_by_lbfgs"),
    "second_order.trust_region": ("trust_region",),
    "wrappers": ("accumulate", "inject_hyperparams", "masked", "nnx_value_fn", "partition"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gradxform' has no attribute {name!r}")
    module = importlib.import_module(f"gradxform.{_MODULE_OF[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
