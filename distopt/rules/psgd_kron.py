"""PSGD-Kron: a preconditioner fitted by gradient descent (Li, 2015, arXiv 1512.04202; factors: 1809.10232)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import exp, log
from typing import Any, ClassVar

from torch import Tensor

from distopt.matrix.projection import gaussian
from distopt.matrix.triangular import fit, identity, multiply, multiply_transposed, solve_transposed
from distopt.rule import Back, Rule, Shape, State, Update, Whole, require

FLAT, DECAY, LEAST = 500, 0.001, 0.03


@dataclass(frozen=True)
class PSGDKron(Rule):
    """W ← W − lr (min(1, 1.1 / RMS) Lᵀ L M Rᵀ R + weight_decay W), where M is the running mean of gradients, bias-
    corrected, and L and R are fitted so that what is preconditioned has unit covariance: A = L M Rᵀ is compared with a
    random probe under the inverse, B = L^(−T) V R^(−1). Factors are upper triangular, diagonal on sides of 1 or longer
    than `max_size_triangular`. The variant is pytorch_optimizer's Kron, after kron_torch, with `memory_save_mode` None.

    `update_probability`: the share of steps in which factors are fitted; None is 1 for 500 steps, then e^(−step/1000)
    of it, .03 from step 4,007 on.

    lr: the RMS of a step is at most 1.1 · lr, so lr is what AdamW's is; the package's authors take a third of it.

    Deviations: fits are dealt out evenly instead of by chance; probes come from a generator seeded with `seed` + step,
    the same for matrices of one shape, so every rank draws the same; factors are balanced at every hundredth fit
    instead of one in a hundred; a fit that is not finite is left out. Matrices only. One matrix at a time.

    It pays where Shampoo's roots do not: no decomposition, a triangular solve per fit. Third parties find
    at most 1.4 times a tuned AdamW at 0.1B parameters for any rule, about 1.1 at 1.2B (arXiv 2509.02046).

    Start: lr a third of AdamW's, momentum 0.9 (the README of github.com/evanatyourservice/kron_torch).
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    update_probability: float | None = None
    max_size_triangular: int = 8192
    precondition_lr: float = 0.1
    _: KW_ONLY
    seed: int = 0

    reach: ClassVar = "matrix"
    batched: ClassVar = False

    def check(self) -> None:
        super().check()
        chance = self.update_probability
        require(chance is None or 0 < chance <= 1, f"update_probability must lie in (0, 1] or be None, got {chance}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")
        require(self.max_size_triangular >= 0, f"max_size_triangular must be ≥ 0, got {self.max_size_triangular}")
        require(0 < self.precondition_lr < 1, f"precondition_lr must lie in (0, 1), got {self.precondition_lr}")
        require(0 <= self.seed < 2**62, f"seed must lie in 0 … 2⁶², got {self.seed}")

    def states(self, shape: Shape) -> dict[str, State]:
        states = {"momentum_buffer": State("like")}
        for side, n in (("left", shape.rows), ("right", shape.cols)):
            triangular = 1 < n <= self.max_size_triangular
            states[f"factor_{side}"] = State("owner", (n, n if triangular else 1), signed=triangular)
        return states

    def fits(self, step: int) -> int:
        """How many fits are due in the steps up to this one."""
        if self.update_probability is not None:
            return int(step * self.update_probability + 1e-9)
        least = FLAT - log(LEAST) / DECAY
        falling = (1 - exp(-DECAY * (min(step, least) - FLAT))) / DECAY if step > FLAT else 0.0
        return int(min(step, FLAT) + falling + LEAST * max(step - least, 0))

    def scalars(self, step: int) -> dict[str, Any]:
        fits = self.fits(step)
        fitting = fits > self.fits(step - 1)
        return {
            "bias_correction": 1 - self.momentum**step,
            "fitting": fitting,
            "balancing": fitting and fits % 100 == 0,
            "seed": self.seed + step,
        }

    def phases(self) -> dict[str, tuple[int, float]]:
        share = LEAST if self.update_probability is None else self.update_probability
        steps = {self.scalars(step)["fitting"]: step for step in range(1000, 0, -1)}
        return {"fit": (steps[True], share), "step": (steps.get(False, steps[True]), 1 - share)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        state.momentum_buffer = state.momentum_buffer.lerp(grad, 1 - self.momentum)
        m = yield Whole(state.momentum_buffer / h.bias_correction)
        left, right = state.factor_left, state.factor_right
        if h.step == 1:
            left, right = identity(left), identity(right)
        if h.balancing:
            sizes = [q.abs().amax((-2, -1), keepdim=True) for q in (left, right)]
            left, right = left * (sizes[1] / sizes[0]).sqrt(), right * (sizes[0] / sizes[1]).sqrt()
        if h.fitting:
            probe = gaussian(h.shape.rows, h.shape.cols, h.seed, m.device).expand_as(m)
            a = multiply(right, multiply(left, m).mT).mT
            b = solve_transposed(right, solve_transposed(left, probe).mT).mT
            left, right = fit(left, a, b, self.precondition_lr), fit(right, a.mT, b.mT, self.precondition_lr)
        state.factor_left, state.factor_right = left, right
        direction = multiply_transposed(left, multiply(left, m))
        direction = multiply_transposed(right, multiply(right, direction.mT)).mT
        rms = direction.square().mean((-2, -1), keepdim=True).sqrt()
        direction = yield Back(direction * (1.1 / (rms + 1e-6)).clamp(max=1))
        return weight - h.lr * (direction + h.weight_decay * weight)
