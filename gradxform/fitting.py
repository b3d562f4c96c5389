"""``least_squares``: fits residuals, with bounds and robust losses."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from gradxform import tree
from gradxform.arguments import with_arguments
from gradxform.bounds import Bounds, check_bounds
from gradxform.hyperparameters import Positive, checked
from gradxform.loop import check_method
from gradxform.minimization import minimize
from gradxform.second_order.levenberg_marquardt import levenberg_marquardt
from gradxform.solution import Solution
from gradxform.squares import Loss, sum_of_squares
from gradxform.stopping import small_step

_DEFAULT = levenberg_marquardt()
_STOP = small_step()


def _within(bounds: Bounds) -> optax.GradientTransformationExtraArgs:
    return levenberg_marquardt(bounds=bounds)


@checked
def least_squares(
    residuals: Callable[..., tree.PyTree],
    params: tree.PyTree,
    tx: optax.GradientTransformation | Callable[[Any], Any] | None = None,
    *,
    args: tuple[Any, ...] | list[Any] | Mapping[str, Any] = (),
    bounds: Bounds | None = None,
    loss: Loss = "linear",
    loss_scale: Positive = 1.0,
    **options: Any,
) -> Solution:
    """Minimises half the sum of the squared residuals, or a robust loss of them.

    It is :func:`gradxform.minimize` of :func:`gradxform.sum_of_squares`, with a method and a stop
    rule that suit residuals: :func:`gradxform.levenberg_marquardt`, and
    :func:`gradxform.small_step`, which does not depend on units. All that ``minimize`` offers works
    here too: derivatives of the solution in ``args``, ``jax.vmap`` over data sets, ``history``,
    ``progress``, ``resume``. :func:`gradxform.covariance` of the same residuals gives the errors of
    the estimate.

    Args:
      residuals: a function of the parameters, and of ``args``, that returns the residuals: any
        pytree of arrays. Divide each residual by the standard deviation of its datum if these
        differ.
      params: the start: a pytree of floating-point or complex arrays or Python numbers.
      tx: another method, or with bounds a function of them that makes one; see
        :func:`gradxform.minimize`. ``None`` for Levenberg–Marquardt.
      args: further arguments of ``residuals``: a tuple, or a dictionary by name. New arrays and
        floats of the same shapes do not compile again.
      bounds: a pair ``(low, high)``, each a pytree like ``params`` or a prefix of it; ``None`` or
        ±inf in place of a number means no bound.
      loss: ``"linear"`` for plain squares, or a robust loss; see :func:`gradxform.sum_of_squares`.
      loss_scale: the size from which a residual is an outlier, for a robust loss.
      **options: further options of :func:`gradxform.minimize`, such as ``max_steps``, ``history``,
        ``derivative``. ``tol`` or ``stop`` take the place of the stop rule.

    Returns:
      A :class:`Solution`. Its ``value`` is half the sum.

    Raises:
      TypeError: an argument is of the wrong type, or ``residuals`` does not take ``args``.
      ValueError: an argument is out of range, or ``has_aux`` is asked for.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> t, y = jnp.arange(5.0), jnp.asarray([3.0, 1.82, 1.1, 0.67, 0.41])
    >>> decay = lambda p, t, y: p["height"] * jnp.exp(-p["rate"] * t) - y
    >>> fit = gx.least_squares(decay, {"height": 1.0, "rate": 1.0}, args=(t, y))
    >>> {name: round(float(x), 2) for name, x in fit.params.items()}
    {'height': 3.0, 'rate': 0.5}
    """
    if options.get("has_aux"):
        raise ValueError(
            "least_squares(has_aux=True): residuals have no second part; compute it from "
            "solution.params"
        )
    if bounds is not None:
        check_bounds("least_squares", bounds)
    with_arguments("least_squares", residuals, args)
    if tx is not None:
        check_method("least_squares", tx, bounds)
    else:
        tx = _DEFAULT if bounds is None else _within
        if options.get("tol") is None and options.get("stop") is None:
            options["stop"] = _STOP
    objective = sum_of_squares(residuals, loss=loss, loss_scale=loss_scale)
    return minimize(objective, params, tx, args=args, bounds=bounds, **options)
