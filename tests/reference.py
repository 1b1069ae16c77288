"""Algorithm 1 in float64, written for the eye: the slow twin that the optimizer must follow.

No autograd function, no module surgery, no torch.optim: weights are a dict, the gradient of each effective weight
``W + s·B A`` gives those of the factors by the chain rule, and the base optimizers are their textbook recursions.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter), bias-corrected moments."""

    def __init__(self, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01) -> None:
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.m, self.v, self.t = 0.0, 0.0, 0

    def update(self, w: Tensor, g: Tensor) -> Tensor:
        (b1, b2), self.t = self.betas, self.t + 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return w * (1 - self.lr * self.decay) - self.lr * m / (v.sqrt() + self.eps)


class Momentum:
    """SGD with heavy-ball momentum, the first step taking the whole gradient."""

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.lr, self.momentum, self.velocity = lr, momentum, None

    def update(self, w: Tensor, g: Tensor) -> Tensor:
        self.velocity = g if self.velocity is None else self.momentum * self.velocity + g
        return w - self.lr * self.velocity


class Adagrad:
    """Sum of squares from an initial value."""

    def __init__(self, lr: float, initial_accumulator_value: float = 0.0, eps: float = 1e-10) -> None:
        self.lr, self.eps, self.sum = lr, eps, initial_accumulator_value

    def update(self, w: Tensor, g: Tensor) -> Tensor:
        self.sum = self.sum + g * g
        return w - self.lr * g / (self.sum.sqrt() + self.eps)


def chain_of_lora(
    weights: Weights,
    targets: list[str],
    loss: Callable[[Weights, int], Tensor],
    steps: int,
    knots: Iterable[int],
    draw: Callable[[str, int], tuple[Tensor, Tensor]],
    scaling: Callable[[int], float],
    base: Callable[[], object],
) -> Iterable[tuple[int, Weights, dict[str, tuple[Tensor, Tensor]]]]:
    """Algorithm 1; yields (step, W, factors) after every step, the knot included.

    Args:
        weights: W by name, float64, out×in.
        targets: names that carry a link.
        loss: of the effective weights and the step (from 0).
        steps: T.
        knots: steps (from 1) after which to tie.
        draw: (name, link) to (A, B).
        scaling: of the link index.
        base: makes one optimizer for one tensor.
    """
    link, knots = 0, set(knots)
    factors = {name: tuple(f.double() for f in draw(name, link)) for name in targets}
    state = {name: (base(), base()) for name in targets}
    for step in range(1, steps + 1):
        s = scaling(link)
        effective = {
            name: w + s * factors[name][1] @ factors[name][0] if name in factors else w for name, w in weights.items()
        }
        leaves = {name: w.detach().requires_grad_(name in factors) for name, w in effective.items()}
        grads = dict(zip(targets, torch.autograd.grad(loss(leaves, step - 1), [leaves[name] for name in targets])))
        for name in targets:
            A, B = factors[name]
            grad_A, grad_B = s * B.T @ grads[name], s * grads[name] @ A.T
            factors[name] = (state[name][0].update(A, grad_A), state[name][1].update(B, grad_B))
        if step in knots:
            for name in targets:
                weights[name] = weights[name] + s * factors[name][1] @ factors[name][0]
            link += 1
            factors = {name: tuple(f.double() for f in draw(name, link)) for name in targets}
            state = {name: (base(), base()) for name in targets}
        yield step, weights, factors


def rounded_sum(weight: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """W + Σ ΔW in float64."""
    total = weight.double()
    for update in updates:
        total = total + update.double()
    return total


def stochastic_neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two values of ``dtype`` around each exact (float64) value, and the probability of the upper one.

    The slow twin of the bit tricks: it searches the neighbours by stepping through the dtype's bit patterns.
    """
    near = exact.to(dtype)
    bits = near.view(torch.int16)
    # stepping the bit pattern by one moves away from zero; through zero it changes sign
    away = torch.where(near.double() == 0, torch.ones_like(bits), bits + 1).view(dtype)
    toward = torch.where(near.double() == 0, torch.full_like(bits, -(2**15) + 1), bits - 1).view(dtype)
    above = torch.where(near.double() >= 0, away, toward)
    below = torch.where(near.double() >= 0, toward, away)
    lower = torch.where(near.double() <= exact, near, below).double()
    upper = torch.where(near.double() >= exact, near, above).double()
    chance = torch.where(upper > lower, (exact - lower) / (upper - lower).clamp_min(1e-300), torch.zeros_like(exact))
    return lower, upper, chance
