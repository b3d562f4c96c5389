"""Curvature as a value: what turns a function and a point into a symmetric linear map."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import Fraction, Scalar, Seed, Size, UpToOne, checked, scalar, shown

ValueFn: TypeAlias = Callable[..., jax.Array]
Product: TypeAlias = Callable[[tree.PyTree], tree.PyTree]
Curvature: TypeAlias = Annotated[
    Callable[[ValueFn, tree.PyTree], Product],
    "a curvature, for instance gx.hessian() or gx.gauss_newton()",
]


def hessian() -> Curvature:
    r"""The Hessian, :math:`v \mapsto \nabla^2 J(\theta)\, v`.

    Calling the result with a function and parameters linearises the gradient there, once. For a
    multilayer net every product after that costs 1 to 2 gradients: 1 for the layer that reads the
    data, 2 for those behind it, 1.4 for 784-500-300-10. Functions and products are computed in at
    least float32, whatever the dtype of the parameters.

    Returns:
      The curvature: of ``(value_fn, params)``, a map from and to pytrees like ``params`` in at
      least float32. ``value_fn`` must allow forward-mode differentiation, so no
      ``jax.custom_vjp``.

    References:
      Lecture 7, "Newton's Method". Pearlmutter, "Fast exact multiplication by the Hessian", Neural
      Computation 6:147 (1994).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> product = gx.hessian()(lambda x: x[0] ** 2 * x[1], jnp.asarray([1.0, 3.0]))
    >>> product(jnp.asarray([1.0, 0.0]))
    Array([6., 2.], dtype=float32)
    """

    def linearise(value_fn: ValueFn, params: tree.PyTree) -> Product:
        return jax.linearize(jax.grad(value_fn), params)[1]

    return functools.partial(_curvature, linearise)


def gauss_newton() -> Curvature:
    r"""The generalised Gauss–Newton matrix, :math:`v \mapsto J^T H_L J v`.

    Of :math:`L(f(\theta))`, a loss L of a model f: J is the Jacobian of f at θ and :math:`H_L` the
    Hessian of L at its outputs. Positive semi-definite whenever L is convex in the outputs, however
    curved f is. It is the Hessian where f is linear, or where the loss has no slope left.

    It is the Fisher information matrix :math:`E[\nabla \log p\, \nabla \log p^T]`, the expectation
    over labels drawn from the model, whenever the loss is the negative log likelihood of an
    exponential family in its natural parameters: squared error (half of it, of unit variance),
    cross-entropy of logits by softmax or sigmoid. It is not the "empirical Fisher" of the gradients
    of the labels in the data.

    Model and loss are linearised once. For a multilayer net every product after that costs 1 to 4/3
    gradients, 1.1 for 784-500-300-10. They are computed in at least float32, whatever the dtype of
    the parameters.

    Returns:
      The curvature: of ``(value_fn, params)``, a map from and to pytrees like ``params`` in at
      least float32. ``value_fn`` must come from :func:`gradxform.compose`.

    Raises:
      ValueError: when called, if ``value_fn`` does not come from :func:`gradxform.compose`.

    References:
      Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
      Neural Computation 14:1723 (2002). Martens, "New insights and perspectives on the natural
      gradient method", JMLR 21:146 (2020).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> value_fn = gx.compose(lambda y: jnp.sum(y**2), lambda x: x**2)  # the Hessian is 12 x²
    >>> gx.gauss_newton()(value_fn, jnp.asarray([1.0, 2.0]))(jnp.ones(2))
    Array([ 8., 32.], dtype=float32)
    """

    return gauss_newton_of("gauss_newton")


def gauss_newton_of(method: str) -> Curvature:
    """:func:`gauss_newton` as a part of ``method``, which its error names."""

    def linearise(value_fn: ValueFn, params: tree.PyTree) -> Product:
        if not isinstance(value_fn, Composed):
            raise ValueError(
                f"{method} needs to know which part of value_fn is the loss and which is the "
                "model, to make the Gauss-Newton matrix: give value_fn=gx.compose(loss, model), "
                "where loss(model(params)) is the value, or take curvature=gx.hessian()"
            )
        loss, model = value_fn.parts()
        outputs, push = jax.linearize(lambda p: jax.tree.map(tree.promote, model(p)), params)
        _, bend = jax.linearize(jax.grad(loss), outputs)
        pull = jax.linear_transpose(push, params)
        return lambda v: pull(bend(push(v)))[0]

    return functools.partial(_curvature, linearise)


def _curvature(linearise: Curvature, value_fn: ValueFn, params: tree.PyTree) -> Product:
    """The product in at least float32, chunk by chunk where ``value_fn`` recomputes them."""
    params = jax.tree.map(tree.promote, params)
    if isinstance(value_fn, Composed) and value_fn.chunks > 1 and value_fn.recompute:
        product = lambda v: value_fn.mean_over_chunks(lambda chunk: linearise(chunk, params)(v))
    else:
        product = linearise(value_fn, params)
    # left to itself the compiler may keep CG's vectors whole on every device, to send less
    return lambda v: tree.sharded_like(product(tree.varying_like(v, params)), params)


@checked
def compose(
    loss: Callable[..., jax.typing.ArrayLike],
    model: Callable[..., tree.PyTree],
    /,
    *,
    chunks: Size = 1,
    recompute: bool = True,
    **data: Any,
) -> "Composed":
    r"""A ``value_fn`` that remembers its parts: :math:`J(\theta) = L(f(\theta))`.

    It is called like any function of the parameters, and :func:`gradxform.gauss_newton` finds the
    loss and the model in it. Data given here, or later to ``update`` by keyword, reach the
    arguments of that name of either part: ``gx.compose(loss, model, x=x, y=y)`` is
    ``loss(model(params, x=x), y=y)``. The model can be anything that takes the parameters first: a
    plain function, ``module.apply`` of Flax linen, ``lambda params, x:
    equinox.combine(params, static)(x)``, or ``gx.nnx_value_fn(module, lambda module, x:
    module(x))`` for Flax NNX.

    With ``chunks=m`` the data are cut along the leading axis of all their arrays into m chunks of
    equal size, which are done one after the other,

    .. math::
        J(\theta) = \frac{1}{m} \sum_{i=1}^{m} L(f(\theta, x_i), y_i)

    the same value, gradient and curvature products to rounding, if the loss is a mean over
    examples, and if no example enters the outputs of another. The sums are in at least float32.

    Args:
      loss: of the outputs, and of data, to one real number.
      model: of the parameters, and of data, to the outputs: any pytree of floating-point arrays.
      chunks: m ≥ 1, a divisor of the leading axis of the data.
      recompute: whether a gradient or product goes through each chunk anew, so that memory is
        that of one chunk, at the price of one more pass through the model; False keeps what all
        the chunks have computed.
      **data: arrays, or pytrees of them.

    Returns:
      The function, with attributes ``loss`` and ``model``.

    Raises:
      TypeError: a part is no function or takes data by position alone, or ``chunks`` is no
        integer.
      ValueError: ``chunks`` is not positive, or does not divide the data; data that neither part
        takes.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> x, y = jnp.asarray([1.0, 2.0, 3.0, 4.0]), jnp.asarray([2.0, 4.0, 6.0, 8.0])
    >>> squares = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    >>> value_fn = gx.compose(squares, lambda w, x: w * x, chunks=2, x=x, y=y)
    >>> float(value_fn(1.0)), float(gx.gauss_newton()(value_fn, 1.0)(1.0))
    (7.5, 15.0)
    """
    for name in data:
        if not any(name in data_of(part, data) for part in (loss, model)):
            raise ValueError(f"compose({name}=…): neither loss nor model has an argument {name}")
    return Composed(loss, model, data, chunks, recompute)


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """What :func:`compose` returns."""

    loss: Callable[..., jax.typing.ArrayLike]  #: L, of the outputs and of data
    model: Callable[..., tree.PyTree]  #: f, of the parameters and of data
    data: Mapping[str, Any]  #: what is bound already, by name
    chunks: int = 1
    recompute: bool = True

    def __call__(self, params: tree.PyTree, **data: Any) -> jax.Array:
        whole = dataclasses.replace(self, data={**self.data, **data})
        if self.chunks > 1 and self.recompute:
            handed = _summed_in_float32(params)
            return whole.mean_over_chunks(lambda chunk: chunk(handed()))
        loss, model = whole.parts()
        return jnp.asarray(loss(model(params)))

    def parts(self) -> tuple[Callable[..., jax.typing.ArrayLike], Callable[..., tree.PyTree]]:
        """The loss of the outputs alone and the model of the parameters alone."""
        loss_data, model_data = data_of(self.loss, self.data), data_of(self.model, self.data)
        if self.chunks == 1:
            return lambda y: self.loss(y, **loss_data), lambda p: self.model(p, **model_data)

        def loss(outputs: tree.PyTree) -> jax.Array:
            cut = self._cut(loss_data) if loss_data else {}
            losses = jax.lax.map(lambda chunk: self.loss(chunk[0], **chunk[1]), (outputs, cut))
            return jnp.mean(losses)

        def model(params: tree.PyTree) -> tree.PyTree:
            handed = _summed_in_float32(params)
            return jax.lax.map(lambda chunk: self.model(handed(), **chunk), self._cut(model_data))

        return loss, model

    @property
    def examples(self) -> int:
        """How many there are: the length of the leading axis of all data.

        Raises:
          ValueError: there are no data, or they differ in it.
        """
        shapes = [jnp.shape(x) for x in jax.tree.leaves(self.data)]
        if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(
                "compose: a sub-batch is of data with a common leading axis, given by keyword to "
                f"compose or to update; their shapes are {shapes}"
            )
        return shapes[0][0]

    def sample(self, size: int, key: jax.Array) -> "Composed":
        """The function of ``size`` of its examples, drawn without replacement.

        Raises:
          ValueError: there are fewer, or the chunks do not divide ``size``.
        """
        if size > self.examples or size % self.chunks:
            raise ValueError(
                f"hessian_free(curvature_batch_size={size}): {size} examples cannot be drawn from "
                f"{self.examples} in {self.chunks} chunks: give at most all of them and a multiple "
                "of the chunks"
            )
        drawn = jax.random.permutation(key, self.examples)[:size]
        data = jax.tree.map(lambda x: jnp.asarray(x)[drawn], self.data)
        return dataclasses.replace(self, data=data)

    def mean_over_chunks(self, f: Callable[["Composed"], tree.PyTree]) -> tree.PyTree:
        """The mean of ``f`` of every chunk, one after the other; nothing is kept between them."""
        cut = self._cut(self.data)

        @jax.checkpoint
        def add(total: tree.PyTree, data: Mapping[str, Any]) -> tuple[tree.PyTree, None]:
            of_chunk = f(Composed(self.loss, self.model, data))
            return jax.tree.map(jnp.add, total, of_chunk), None

        first = jax.tree.map(lambda x: x[0], cut)
        shapes = jax.eval_shape(lambda data: f(Composed(self.loss, self.model, data)), first)
        zeros = jax.tree.map(lambda x: tree.promote(jnp.zeros(x.shape, x.dtype)), shapes)
        total, _ = jax.lax.scan(add, zeros, cut)
        return jax.tree.map(lambda x, one: (x / self.chunks).astype(one.dtype), total, shapes)

    def _cut(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The data with a leading axis of chunks."""

        def cut(path: Any, x: jax.Array) -> jax.Array:
            shape = jnp.shape(x)
            if not shape or shape[0] % self.chunks:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"compose(chunks={self.chunks!r}): the data{name} have shape {shape}, and "
                    "chunks must divide the leading axis; close over what is not cut into chunks"
                )
            return jnp.reshape(x, (self.chunks, shape[0] // self.chunks, *shape[1:]))

        if not jax.tree.leaves(data):
            raise ValueError(
                f"compose(chunks={self.chunks!r}): no data to cut; give them by keyword to compose "
                "or to update, for instance gx.compose(loss, model, chunks=2, x=x, y=y)"
            )
        return jax.tree_util.tree_map_with_path(cut, data)


def _summed_in_float32(params: tree.PyTree) -> Callable[[], tree.PyTree]:
    """Hands ``params`` to each chunk so that gradients of half precision are summed in float32."""

    def is_half(x: Any) -> bool:
        return getattr(x, "dtype", None) in (jnp.bfloat16, jnp.float16)

    wide = jax.tree.map(lambda x: tree.promote(x) if is_half(x) else x, params)
    return lambda: jax.tree.map(lambda w, x: w.astype(x.dtype) if is_half(x) else w, wide, params)


def data_of(function: Callable[..., Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``data`` a function takes beside its first argument: by name, or all by ``**``.

    Raises:
      TypeError: it takes such an argument by position alone.
    """
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except ValueError:  # a callable that has no signature takes its first argument alone
        return {}
    if any(a.kind is a.VAR_KEYWORD for a in arguments):
        return {k: v for k, v in data.items() if k not in ("value", "grad", "value_fn")}
    for a in arguments[1:]:
        if a.kind is a.POSITIONAL_ONLY and a.name in data:
            name = getattr(function, "__name__", type(function).__name__)
            raise TypeError(
                f"data reach a function by name, but {name} takes {a.name} by position alone: "
                f"leave out the / behind {a.name} in its signature"
            )
    return {a.name: data[a.name] for a in arguments[1:] if a.name in data}


# -- preconditioners

#: From a damped product, the gradient and the update count to a map near the inverse, and to the
#: number of products that it took.
Preconditioner: TypeAlias = Annotated[
    Callable[[Product, tree.PyTree, jax.Array], tuple[Product, int]],
    "a function of the damped product, the gradient and the update count, for instance "
    "gx.hutchinson_diagonal()",
]


def checked_inverse(
    method: str,
    preconditioner: Preconditioner | None,
    product: Product,
    g: tree.PyTree,
    count: jax.Array,
) -> tuple[Product, int]:
    """The approximate inverse, the identity for None, and the products that making it took.

    Raises:
      ValueError: when called, if it returns something of another structure or shape.
    """
    if preconditioner is None:
        return lambda r: r, 0
    inverse, made = preconditioner(product, g, count)

    def checked(r: tree.PyTree) -> tree.PyTree:
        z = inverse(r)
        if tree.difference(z, g, dtypes=False) is not None:
            found, expected = (shown(jax.tree.map(jnp.shape, x)) for x in (z, g))
            raise ValueError(
                f"{method}(preconditioner=…): the approximate inverse must return a pytree like "
                f"the parameters, of shapes {expected}; it returned {found}"
            )
        return jax.tree.unflatten(jax.tree.structure(g), jax.tree.leaves(z))

    return checked, made


@checked
def hutchinson_diagonal(
    samples: Size = 8, *, power: UpToOne = 1.0, floor: Fraction = 1e-2, seed: Seed = 0
) -> Preconditioner:
    r"""Preconditions by the diagonal, estimated from products with random signs.

    .. math::
        D = \frac{1}{s} \sum_{i=1}^{s} z_i \odot C z_i, \qquad
        v \mapsto v \oslash \max(|D|, \phi \max_j |D_j|)^\xi

    with new signs z in each update. Exact, from one sample, where the curvature C is diagonal;
    right where parameters differ in scale. It is sharded like the parameters.

    Args:
      samples: s ≥ 1, products that each update makes.
      power: ξ in [0, 1]; below 1 where the estimate is not to be trusted wholly.
      floor: φ in [0, 1).
      seed: of the signs.

    Returns:
      The preconditioner, an argument of :func:`gradxform.newton_cg` and
      :func:`gradxform.hessian_free`.

    References:
      Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix", Appl. Numer. Math.
      57:1214 (2007). Martens (2010), section 4.7, for ξ = 3/4.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> product = lambda v: jnp.asarray([1.0, 4.0]) * v
    >>> inverse, made = gx.hutchinson_diagonal(1)(product, jnp.ones(2), 0)
    >>> inverse(jnp.ones(2)), made
    (Array([1.  , 0.25], dtype=float32), 1)
    """

    def build(product: Product, like: tree.PyTree, count: jax.Array) -> tuple[Product, int]:
        def add(total: tree.PyTree, key: jax.Array) -> tuple[tree.PyTree, None]:
            z = _random_like(jax.random.rademacher, key, like)
            return tree.map(lambda t, z, cz: t + z * cz / samples, total, z, product(z)), None

        zeros = jax.tree.map(jnp.zeros_like, like)
        diagonal, _ = jax.lax.scan(add, zeros, jax.random.split(_key(seed, count), samples))
        most = tree.max_abs(diagonal)
        least = scalar(floor) * most

        def inverse_of(d: jax.Array) -> jax.Array:
            size = jnp.maximum(jnp.abs(d), least)
            # an estimate of 0 counts as the largest; all 0, or not finite, is the identity
            return tree.reciprocal(jnp.where(size > 0, size, most)) ** scalar(power)

        inverse = tree.map(inverse_of, diagonal)
        return lambda v: tree.map(jnp.multiply, v, inverse), samples

    return build


@checked
def nystrom(rank: Size = 10, *, seed: Seed = 0) -> Preconditioner:
    r"""Preconditions by the largest eigenvalues, from a random sketch of the curvature.

    With a random orthonormal Ω of r columns, and :math:`U \Lambda U^T` the eigenvalues and vectors
    of :math:`(C \Omega) (\Omega^T C \Omega)^{-1} (C \Omega)^T`,

    .. math::
        v \mapsto \lambda_r\, U \Lambda^{-1} U^T v + (v - U U^T v)

    with a new Ω in each update. Right for a positive semi-definite curvature, damped, with a few
    large eigenvalues, as Gauss–Newton's of a deep net; of an indefinite one it is the identity. It
    keeps r vectors, ravelled and whole on every device, while CG runs.

    Args:
      rank: r ≥ 1, products that each update makes; at most the parameters.
      seed: of the sketch.

    Returns:
      The preconditioner, an argument of :func:`gradxform.newton_cg` and
      :func:`gradxform.hessian_free`.

    References:
      Frangella, Tropp & Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl.
      44:718 (2023), Algorithm 2.1 and eq. 1.3.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> product = lambda v: jnp.asarray([1.0, 4.0]) * v
    >>> inverse, made = gx.nystrom(2)(product, jnp.ones(2), 0)
    >>> inverse(jnp.ones(2)).round(3), made
    (Array([1.  , 0.25], dtype=float32), 2)
    """

    def build(product: Product, like: tree.PyTree, count: jax.Array) -> tuple[Product, int]:
        flat, unravel = tree.ravel(like)
        r = min(rank, flat.size)
        normal = jax.random.normal(_key(seed, count), (flat.size, r), flat.dtype)
        omega, _ = jnp.linalg.qr(normal)
        y = jax.lax.map(lambda column: tree.ravel(product(unravel(column)))[0], omega.T).T
        shift = jnp.finfo(flat.dtype).eps * jnp.linalg.norm(y)
        y = y + shift * omega
        factor = jnp.linalg.cholesky(_dot(omega.T, y))  # NaN of an indefinite curvature
        b = jax.scipy.linalg.solve_triangular(factor, y.T, lower=True).T
        u, root, _ = jnp.linalg.svd(b, full_matrices=False)
        eigenvalues = jnp.square(root) - shift
        usable = jnp.isfinite(u).all() & (eigenvalues[-1] > 0)
        weight = jnp.where(usable, eigenvalues[-1] / eigenvalues - 1, 0)
        u = jnp.where(usable, u, 0)

        def inverse(v: tree.PyTree) -> tree.PyTree:
            x, _ = tree.ravel(v)
            return unravel(x + _dot(u, weight * _dot(x, u)))

        return inverse, r

    return build


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _key(seed: Scalar, count: jax.typing.ArrayLike) -> jax.Array:
    return jax.random.fold_in(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), count)


def _random_like(draw: Callable[..., jax.Array], key: jax.Array, like: tree.PyTree) -> tree.PyTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [draw(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return tree.sharded_like(jax.tree.unflatten(structure, drawn), like)
