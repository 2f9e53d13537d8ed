"""Adam-mini (Zhang et al., 2024, arXiv 2406.16793)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Mean, Rule, Shape, State, Update


@dataclass(frozen=True)
class AdamMini(Rule):
    """AdamW with one second moment per block of weights that share a learning rate: a row of a matrix (the weights of
    one output neuron, or of one token of an embedding), all of a vector. Nearly half of AdamW's state.

    lr is the root mean square of a block's step where its gradients keep their sign. The blocks are those of adam_mini
    1.1.1: a logical matrix of a part that is named in `whole_parts` shares one moment, so a group of query projections
    has split="q:32h per_head", a fused one "q:32h,k:8h,v:8h per_head"; `create_optimizer` does so for the models it
    knows. Where nothing says what a head is, queries and keys have a moment per row, which is finer. The moment of a
    head is stored once per row of it.

    Start: AdamW's lr, betas (0.9, 0.95) and weight decay 0.1 (the paper: as AdamW's).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    _: KW_ONLY
    whole_parts: tuple[str, ...] = ("q", "k")

    reach: ClassVar = "reduce"

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like"), "exp_avg_sq": State("row")}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"bias_correction1": 1 - beta1**step, "bias_correction2_sqrt": (1 - beta2**step) ** 0.5}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        beta1, beta2 = self.betas
        square = yield Mean(grad * grad, None if h.shape.part in self.whole_parts else -1)
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = state.exp_avg_sq.lerp(square, 1 - beta2)
        denominator = state.exp_avg_sq.sqrt() / h.bias_correction2_sqrt + self.eps
        return weight * (1 - h.lr * h.weight_decay) - state.exp_avg * (h.lr / h.bias_correction1 / denominator)
