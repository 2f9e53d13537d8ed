"""MuonClip: Muon with QK-clip (Kimi Team, 2025, arXiv 2507.20534, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from distopt.rule import Shape, State, Update, require
from distopt.rules.muon import Muon


@dataclass(frozen=True)
class MuonClip(Muon):
    """Muon, after whose step the rows of an attention head are multiplied by (tau / S)^alpha where its largest logit S in
    this step's forward passes was above `tau`. For the group of query and key weights; 1/2 and 1/2, as for plain
    attention, multiplies their logits by tau / S. What other weights of the group are is up to what is observed for them.

    Between backward and step: `optimizer.observe("max_logit", {"…q_proj.weight": per_query_head, "…k_proj.weight":
    per_key_head})`. A key head that serves several query heads gets the largest of theirs, or nothing, with alpha 1 for the
    queries' group. Several calls before a step (micro-batches) count with the largest. Not observed: no clip.

    lr and the rest are Muon's. The clip acts on weights, so the logits of the next step are bounded only as far as one step
    does not raise them.

    It pays where logits grow, which Muon's long runs without normalized queries and keys have shown at scale; with
    normalized ones, or at small scale, it does nothing.

    Start: Muon's lr and weight decay, a threshold of 100 (Kimi K2, arXiv 2507.20534).
    """

    _: KW_ONLY
    tau: float = 100.0
    alpha: float = 0.5

    observes: ClassVar[Mapping[str, Literal["like", "row"]]] = {"max_logit": "row"}

    def check(self) -> None:
        super().check()
        require(self.tau > 0, f"tau must be above 0, got {self.tau}")
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], got {self.alpha}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {**super().states(shape), "max_logit": State("row", signed=False)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        stepped = yield from super().update(grad, weight, state, h)
        factor = (self.tau / state.max_logit.clamp(min=self.tau)) ** self.alpha
        state.max_logit = state.max_logit * 0
        return stepped * factor

    def observe(self, name: str, value: Tensor, state: Any, h: Any) -> None:
        state.max_logit = state.max_logit.maximum(value)
