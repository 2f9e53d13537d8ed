"""What kernels are told of the elementwise rules that they know: a rule here is one entry, and one function or struct per
language in `step.cpp` and `triton_rules.py`, with the rule's own text as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distopt.rule import Rule
from distopt.rules.adamw import AdamW
from distopt.rules.lion import Lion
from distopt.rules.sgd import SGD


@dataclass(frozen=True)
class Told:
    """The name of a rule's function in every language, its states in order, and its scalars, at most 8, computed in
    Python's double precision as the rule's text computes them."""

    name: str
    states: tuple[str, ...]
    scalars: tuple[float, ...]


def told(rule: Rule, h: Any) -> Told | None:
    """What to tell a kernel of a step with the values `h`; None where only the rule's text knows how."""
    found = RULES.get(type(rule))
    return found(rule, h) if found is not None else None


def _adamw(rule: AdamW, h: Any) -> Told | None:
    if rule.amsgrad:
        return None
    beta1, beta2 = rule.betas
    scalars = (
        1 - beta1,
        beta2,
        1 - beta2,
        h.bias_correction2_sqrt,
        rule.eps,
        1 - h.lr * h.weight_decay,
        -h.lr / h.bias_correction1,
    )
    return Told("AdamW", ("exp_avg", "exp_avg_sq"), scalars)


def _lion(rule: Lion, h: Any) -> Told:
    beta1, beta2 = rule.betas
    return Told("Lion", ("exp_avg",), (beta1, 1 - beta1, beta2, 1 - beta2, 1 - h.lr * h.weight_decay, -h.lr))


def _sgd(rule: SGD, h: Any) -> Told | None:
    if not rule.momentum:
        return None
    kept, new = (0.0, 1.0) if h.step == 1 else (rule.momentum, 1 - rule.dampening)
    name = "SGDNesterov" if rule.nesterov else "SGD"
    return Told(name, ("momentum_buffer",), (h.weight_decay, kept, new, -h.lr, rule.momentum))


RULES: dict[type[Rule], Callable[[Any, Any], Told | None]] = {AdamW: _adamw, Lion: _lion, SGD: _sgd}
EXAMPLES: dict[str, Rule] = {
    "AdamW": AdamW(),
    "Lion": Lion(weight_decay=0.1),
    "SGD": SGD(momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "SGDNesterov": SGD(momentum=0.9, nesterov=True, weight_decay=1e-2),
}
"""A rule for each name, to try a kernel with."""
