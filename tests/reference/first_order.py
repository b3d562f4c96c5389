"""Each function is a slide's loop: (gradient, θ_0, number of updates, constants) to the path of θ.

``gradient(k, theta)`` is the gradient of update k's minibatch at ``theta``; a rate is ``rate(k)``.
"""

from collections.abc import Callable

import numpy as np

Gradient = Callable[[int, np.ndarray], np.ndarray]
Rate = Callable[[int], float]


def sgd(gradient: Gradient, theta: np.ndarray, steps: int, rate: Rate) -> list[np.ndarray]:
    path = []
    for k in range(steps):
        theta = theta - rate(k) * gradient(k, theta)
        path.append(theta)
    return path


def momentum(
    gradient: Gradient, theta: np.ndarray, steps: int, rate: Rate, alpha: float
) -> list[np.ndarray]:
    v, path = np.zeros_like(theta), []
    for k in range(steps):
        g = gradient(k, theta)
        v = alpha * v - rate(k) * g
        theta = theta + v
        path.append(theta)
    return path


def nesterov(
    gradient: Gradient, theta: np.ndarray, steps: int, rate: Rate, alpha: float
) -> list[np.ndarray]:
    v, path = np.zeros_like(theta), []
    for k in range(steps):
        interim = theta + alpha * v
        g = gradient(k, interim)
        v = alpha * v - rate(k) * g
        theta = theta + v
        path.append(theta)
    return path


def delta_bar_delta(
    gradient: Gradient,
    w: np.ndarray,
    steps: int,
    rate: Rate,
    kappa: float,
    phi: float,
    theta: float,
) -> list[np.ndarray]:
    eps, bar, path = np.full_like(w, rate(0)), np.zeros_like(w), []
    for k in range(steps):
        delta = gradient(k, w)
        agreement = bar * delta
        eps = np.where(agreement > 0, eps + kappa, np.where(agreement < 0, eps * (1 - phi), eps))
        w = w - eps * delta
        bar = (1 - theta) * delta + theta * bar
        path.append(w)
    return path


def adagrad(
    gradient: Gradient, theta: np.ndarray, steps: int, rate: Rate, delta: float
) -> list[np.ndarray]:
    r, path = np.zeros_like(theta), []
    for k in range(steps):
        g = gradient(k, theta)
        r = r + g * g
        theta = theta - rate(k) / (delta + np.sqrt(r)) * g
        path.append(theta)
    return path


def rmsprop(
    gradient: Gradient, theta: np.ndarray, steps: int, rate: Rate, rho: float, delta: float
) -> list[np.ndarray]:
    r, path = np.zeros_like(theta), []
    for k in range(steps):
        g = gradient(k, theta)
        r = rho * r + (1 - rho) * g * g
        theta = theta - rate(k) / np.sqrt(delta + r) * g
        path.append(theta)
    return path


def rmsprop_momentum(
    gradient: Gradient,
    theta: np.ndarray,
    steps: int,
    rate: Rate,
    rho: float,
    delta: float,
    alpha: float,
) -> list[np.ndarray]:
    r, v, path = np.zeros_like(theta), np.zeros_like(theta), []
    for k in range(steps):
        g = gradient(k, theta)
        r = rho * r + (1 - rho) * g * g
        v = alpha * v - rate(k) / np.sqrt(delta + r) * g
        theta = theta + v
        path.append(theta)
    return path


def rmsprop_nesterov(
    gradient: Gradient,
    theta: np.ndarray,
    steps: int,
    rate: Rate,
    rho: float,
    delta: float,
    alpha: float,
) -> list[np.ndarray]:
    r, v, path = np.zeros_like(theta), np.zeros_like(theta), []
    for k in range(steps):
        interim = theta + alpha * v
        g = gradient(k, interim)
        r = rho * r + (1 - rho) * g * g
        v = alpha * v - rate(k) / np.sqrt(delta + r) * g
        theta = theta + v
        path.append(theta)
    return path


def adadelta(
    gradient: Gradient, x: np.ndarray, steps: int, rate: Rate, rho: float, eps: float
) -> list[np.ndarray]:
    g2, x2, path = np.zeros_like(x), np.zeros_like(x), []
    for k in range(steps):
        g = gradient(k, x)
        g2 = rho * g2 + (1 - rho) * g**2
        step = -np.sqrt(x2 + eps) / np.sqrt(g2 + eps) * g
        x2 = rho * x2 + (1 - rho) * step**2
        x = x + rate(k) * step
        path.append(x)
    return path


def adam(
    gradient: Gradient,
    theta: np.ndarray,
    steps: int,
    rate: Rate,
    rho1: float,
    rho2: float,
    delta: float,
    inside_root: bool,
) -> list[np.ndarray]:
    s, r, path = np.zeros_like(theta), np.zeros_like(theta), []
    for k in range(steps):
        t = k + 1
        g = gradient(k, theta)
        s = rho1 * s + (1 - rho1) * g
        r = rho2 * r + (1 - rho2) * g * g
        s_hat = s / (1 - rho1**t)
        r_hat = r / (1 - rho2**t)
        root = np.sqrt(r_hat + delta) if inside_root else np.sqrt(r_hat) + delta
        theta = theta - rate(k) * s_hat / root
        path.append(theta)
    return path


def rprop(
    gradient: Gradient,
    theta: np.ndarray,
    steps: int,
    rate: Rate,
    eta_minus: float,
    eta_plus: float,
    min_step: float,
    max_step: float,
) -> list[np.ndarray]:
    """iRprop−; a changing rate scales all step sizes."""
    size, before, path = np.full_like(theta, rate(0)), np.zeros_like(theta), []
    for k in range(steps):
        g = gradient(k, theta)
        size = size * rate(k) / rate(max(k - 1, 0))
        agreement = before * np.sign(g)
        grown = np.clip(eta_plus * size, min_step, max_step)
        shrunk = np.clip(eta_minus * size, min_step, max_step)
        size = np.where(agreement > 0, grown, np.where(agreement < 0, shrunk, size))
        before = np.where(agreement < 0, 0, np.sign(g))
        theta = theta - size * before
        path.append(theta)
    return path


def coordinate_descent(
    hessian: np.ndarray, linear: np.ndarray, x: np.ndarray, coordinates: list[int]
) -> list[np.ndarray]:
    """Exact minimisation of xᵀHx/2 − bᵀx over one coordinate after the other."""
    path = []
    for i in coordinates:
        x = x.copy()
        rest = hessian[i] @ x - hessian[i, i] * x[i]
        x[i] = (linear[i] - rest) / hessian[i, i]
        path.append(x)
    return path
