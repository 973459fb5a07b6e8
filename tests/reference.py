"""Every rule of `minitorch_jax.optim` once more, in NumPy float64, one parameter at a time: what the tests compare with.

Written from the papers, and where torch.optim has the rule, from the formulas of its documentation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

Steps = Iterator[tuple[Any, dict[str, Any]]]


def rule(steps: Callable[..., Steps]) -> Callable[..., tuple[list[Any], list[dict[str, Any]]]]:
    """Of a generator of (parameter, state) after each step: a function `(p0, gradients, **options)` giving both lists."""

    @functools.wraps(steps)
    def run(p0: Any, grads: Any, maximize: bool = False, **options: Any) -> tuple[list[Any], list[dict[str, Any]]]:
        wide = [np.asarray(-g if maximize else g, np.float64) for g in grads]
        pairs = list(steps(np.asarray(p0, np.float64), wide, **options))
        return [p for p, _ in pairs], [state for _, state in pairs]

    return run


def norm(x: Any) -> Any:
    return np.sqrt(np.sum(np.square(x)))


def rms(x: Any) -> Any:
    return np.sqrt(np.mean(np.square(x)))


@rule
def sgd(p, grads, lr=0.01, momentum=0, dampening=0, weight_decay=0, nesterov=False) -> Steps:
    """Sutskever et al., "On the importance of initialization and momentum", 2013; torch.optim.SGD."""
    b = None
    for g in grads:
        g = g + weight_decay * p
        b = g if b is None else momentum * b + (1 - dampening) * g
        d = g + momentum * b if nesterov else b if momentum else g
        p = p - lr * d
        yield p, {"momentum_buffer": b} if momentum else {}


# ---------------------------------------------------------------------------------------------------------------------
# Adam and its relatives


@rule
def adam(
    p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, decoupled_weight_decay=False
) -> Steps:
    """Kingma & Ba, "Adam", 2015, algorithm 1; Reddi et al., "On the convergence of Adam and beyond", 2018, with the
    maximum of the uncorrected moments, as torch.optim.Adam has it."""
    (b1, b2), m, v, largest = betas, 0.0 * p, 0.0 * p, 0.0 * p
    for t, g in enumerate(grads, 1):
        if decoupled_weight_decay:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        largest = np.maximum(largest, v)
        v_hat = (largest if amsgrad else v) / (1 - b2**t)
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v_hat) + eps)
        yield p, {"exp_avg": m, "exp_avg_sq": v} | ({"max_exp_avg_sq": largest} if amsgrad else {})


def adamw(p0: Any, grads: Any, weight_decay: float = 1e-2, **options: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Loshchilov & Hutter, "Decoupled weight decay regularization", 2019; torch.optim.AdamW, where lr scales the decay."""
    return adam(p0, grads, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


@rule
def adamax(p, grads, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0) -> Steps:
    """Kingma & Ba, "Adam", 2015, algorithm 2; with epsilon inside of the maximum: torch.optim.Adamax."""
    (b1, b2), m, u = betas, 0.0 * p, 0.0 * p
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        u = np.maximum(b2 * u, np.abs(g) + eps)
        p = p - lr / (1 - b1**t) * m / u
        yield p, {"exp_avg": m, "exp_inf": u}


@rule
def nadam(
    p,
    grads,
    lr=2e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
) -> Steps:
    """Dozat, "Incorporating Nesterov momentum into Adam", 2016; torch.optim.NAdam."""
    (b1, b2), m, v, product = betas, 0.0 * p, 0.0 * p, 1.0
    for t, g in enumerate(grads, 1):
        if decoupled_weight_decay:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        mu, following = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
        product = product * mu
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = following * m / (1 - product * following) + (1 - mu) * g / (1 - product)
        p = p - lr * m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
        yield p, {"exp_avg": m, "exp_avg_sq": v, "mu_product": product}


@rule
def radam(p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, decoupled_weight_decay=False) -> Steps:
    """Liu et al., "On the variance of the adaptive learning rate and beyond", 2020; from a length of 5 on, and with
    epsilon added before the bias correction, as in torch.optim.RAdam."""
    (b1, b2), m, v = betas, 0.0 * p, 0.0 * p
    longest = 2 / (1 - b2) - 1
    for t, g in enumerate(grads, 1):
        if decoupled_weight_decay:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = m / (1 - b1**t)
        length = longest - 2 * t * b2**t / (1 - b2**t)
        if length > 5:
            adaptive = math.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
            r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            p = p - lr * m_hat * math.sqrt(r) * adaptive
        else:
            p = p - lr * m_hat
        yield p, {"exp_avg": m, "exp_avg_sq": v}


# ---------------------------------------------------------------------------------------------------------------------
# Scaled by past gradients


@rule
def adagrad(p, grads, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10) -> Steps:
    """Duchi et al., "Adaptive subgradient methods", 2011; torch.optim.Adagrad."""
    total = np.full_like(p, initial_accumulator_value)
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        total = total + g**2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(total) + eps)
        yield p, {"sum": total}


@rule
def adadelta(p, grads, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0) -> Steps:
    """Zeiler, "ADADELTA", 2012, algorithm 1, times lr: torch.optim.Adadelta."""
    v = u = 0.0 * p
    for g in grads:
        g = g + weight_decay * p
        v = rho * v + (1 - rho) * g**2
        d = np.sqrt(u + eps) / np.sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d**2
        p = p - lr * d
        yield p, {"square_avg": v, "acc_delta": u}


@rule
def rmsprop(p, grads, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False) -> Steps:
    """Hinton's lecture 6, 2012; centered as in Graves, "Generating sequences", 2013, but with epsilon outside of the
    root: torch.optim.RMSprop."""
    v = mean = b = 0.0 * p
    for g in grads:
        g = g + weight_decay * p
        v = alpha * v + (1 - alpha) * g**2
        mean = alpha * mean + (1 - alpha) * g
        b = momentum * b + g / (np.sqrt(v - mean**2 if centered else v) + eps)
        p = p - lr * b
        state = {"square_avg": v}
        state |= {"momentum_buffer": b} if momentum else {}
        yield p, state | ({"grad_avg": mean} if centered else {})


@rule
def rprop(p, grads, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50)) -> Steps:
    """Riedmiller & Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993,
    without going back: torch.optim.Rprop."""
    before, size = 0.0 * p, np.full_like(p, lr)
    for g in grads:
        turned, went_on = g * before < 0, g * before > 0
        size = size * np.where(turned, etas[0], np.where(went_on, etas[1], 1.0))
        size = np.clip(size, *step_sizes)
        before = np.where(turned, 0.0, g)
        p = p - size * np.sign(before)
        yield p, {"prev": before, "step_size": size}


@rule
def asgd(p, grads, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0) -> Steps:
    """Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992, with the rates of Bottou's
    sgd (2010); torch.optim.ASGD, whose state holds the rates of the next step."""
    mean, eta, mu = 0.0 * p, lr, 1.0
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        p = p - eta * (lambd * p + g)
        mean = mean + mu * (p - mean)
        eta = lr / (1 + lambd * lr * t) ** alpha
        mu = 1 / max(1, t - t0)
        yield p, {"ax": mean, "eta": eta, "mu": mu}


@rule
def adafactor(p, grads, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0) -> Steps:
    """Shazeer & Stern, "Adafactor", 2018, algorithms 4 and 5, with relative step sizes of at most lr and
    without the first epsilon in the moments: torch.optim.Adafactor. Factored over the last two axes."""
    eps1 = float(np.finfo(np.float32).eps) if eps[0] is None else eps[0]
    rows, cols, v = 0.0, 0.0, 0.0 * p
    for t, g in enumerate(grads, 1):
        new = t**beta2_decay
        alpha = max(eps[1], rms(p)) * min(lr, 1 / math.sqrt(t))
        p = p - lr * weight_decay * p
        if p.ndim > 1:
            rows = (1 - new) * rows + new * np.mean(g**2, -1, keepdims=True)
            cols = (1 - new) * cols + new * np.mean(g**2, -2, keepdims=True)
            v = rows @ cols / np.maximum(np.mean(rows, -2, keepdims=True), eps1)
        else:
            v = (1 - new) * v + new * g**2
        u = g / np.maximum(np.sqrt(v), eps1)
        p = p - alpha * u / max(1.0, rms(u) / d)
        yield p, {"row_var": rows, "col_var": cols} if p.ndim > 1 else {"variance": v}


@rule
def muon(
    p,
    grads,
    lr=1e-3,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    ns_coefficients=(3.4445, -4.7750, 2.0315),
    eps=1e-7,
    ns_steps=5,
    adjust_lr_fn=None,
    dtype=ml_dtypes.bfloat16,
) -> Steps:
    """Jordan, "Muon", 2024; Liu et al., "Muon is scalable for LLM training", 2025 (match_rms_adamw): torch.optim.Muon,
    where each result of the iteration is rounded to bfloat16."""

    def rounded(x: Any) -> Any:
        return np.asarray(x, np.float32 if dtype != np.float64 else dtype).astype(dtype).astype(np.float64)

    (rows, cols), (a, b, c), m = p.shape, ns_coefficients, 0.0 * p
    wide = 0.2 * math.sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, rows / cols))
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        x = rounded(momentum * m + (1 - momentum) * g if nesterov else m)
        x = x.T if rows > cols else x
        x = rounded(x / np.maximum(rounded(norm(x)), rounded(eps)))
        for _ in range(ns_steps):
            square = rounded(x @ x.T)
            x = rounded(a * x + rounded(b * square + c * square @ square) @ x)
        p = p - lr * weight_decay * p - lr * wide * (x.T if rows > cols else x)
        yield p, {"momentum_buffer": m}


# ---------------------------------------------------------------------------------------------------------------------
# Beyond torch


@rule
def lion(p, grads, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-3) -> Steps:
    """Chen et al., "Symbolic discovery of optimization algorithms", 2023, algorithm 2."""
    (b1, b2), m = betas, 0.0 * p
    for g in grads:
        p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + weight_decay * p)
        m = b2 * m + (1 - b2) * g
        yield p, {"exp_avg": m}


@rule
def lamb(p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, eps_root=0.0) -> Steps:
    """You et al., "Large batch optimization for deep learning", 2020, algorithm 2, with the identity for phi."""
    (b1, b2), m, v = betas, 0.0 * p, 0.0 * p
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        r = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t) + eps_root) + eps)
        u = r + weight_decay * p
        p = p - lr * trust_ratio(norm(p), norm(u)) * u
        yield p, {"exp_avg": m, "exp_avg_sq": v}


@rule
def lars(p, grads, lr=1.0, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=0.0, nesterov=False) -> Steps:
    """You et al., "Large batch training of convolutional networks", 2017, algorithm 1; with the rate over the norm of
    the decayed gradient, as optax.lars has it."""
    b = 0.0 * p
    for g in grads:
        g = g + weight_decay * p
        local = trust_ratio(trust_coefficient * norm(p), norm(g), eps)
        b = momentum * b + lr * local * g
        p = p - (momentum * b + lr * local * g if nesterov else b)
        yield p, {"momentum_buffer": b} if momentum else {}


def trust_ratio(size: Any, step: Any, eps: float = 0.0) -> Any:
    """Of a parameter's norm and its step's: 1 where either is zero."""
    return size / (step + eps) if size and step else 1.0


@rule
def adabelief(p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, eps_root=1e-16, nesterov=False) -> Steps:
    """Zhuang et al., "AdaBelief optimizer", 2020, algorithm 2, with a second epsilon; the numerator of nesterov is
    that of Dozat's algorithm 2, 2016, at a constant momentum."""
    (b1, b2), m, s = betas, 0.0 * p, 0.0 * p
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps_root
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        p = p - lr * m_hat / (np.sqrt(s / (1 - b2**t)) + eps)
        yield p, {"exp_avg": m, "exp_avg_var": s}


@rule
def yogi(p, grads, lr=1e-2, betas=(0.9, 0.999), eps=1e-3) -> Steps:
    """Zaheer et al., "Adaptive methods for nonconvex optimization", 2018, algorithm 2; bias-corrected, and from 1e-6 on,
    as in optax.yogi."""
    (b1, b2), m, v = betas, 0.0 * p + 1e-6, 0.0 * p + 1e-6
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * np.sign(v - g**2) * g**2
        p = p - lr * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield p, {"exp_avg": m, "exp_avg_sq": v}


@rule
def adan(p, grads, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, eps_root=1e-8) -> Steps:
    """Xie et al., "Adan", 2022, algorithm 1, with its code's bias corrections; the decay is explicit: optax.adan."""
    (b1, b2, b3), before = betas, grads[0]
    m = v = n = 0.0 * p
    for t, g in enumerate(grads, 1):
        change, before = g - before, g
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * change
        n = b3 * n + (1 - b3) * (g + (1 - b2) * change) ** 2
        u = m / (1 - b1**t) + (1 - b2) * v / (1 - b2**t)
        p = p - lr * (u / (np.sqrt(n / (1 - b3**t) + eps_root) + eps) + weight_decay * p)
        yield p, {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "pre_grad": g}


@rule
def schedule_free_adamw(
    p,
    grads,
    lr=2.5e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    warmup_steps=0,
    weight_lr_power=2.0,
) -> Steps:
    """Defazio et al., "The road less scheduled", 2024, algorithm 1: gradients are taken at y, which is the parameter.

    In the warmup a step of rate lr (t - 1) / n is weighted by the next rate: optax.contrib.schedule_free_adamw."""
    (b1, b2), x, z, y, v = betas, p, p, p, 0.0 * p
    total = largest = 0.0
    for t, g in enumerate(grads, 1):
        now, following = (lr * min(1.0, s / warmup_steps) if warmup_steps else lr for s in (t - 1, t))
        v = b2 * v + (1 - b2) * g**2
        z = z - now * (g / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * y)
        largest = max(largest, following)
        total += largest**weight_lr_power
        x = x + largest**weight_lr_power / total * (z - x)
        y = (1 - b1) * z + b1 * x
        yield y, {"z": z, "exp_avg_sq": v, "weight_sum": total, "lr_max": largest}
