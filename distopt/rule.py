"""The vocabulary of an update rule: its requests, its states, its base class.

A rule is the mathematics of one optimizer and nothing else. Its `update` is a generator over plain tensors: a stack
`(k, rows, cols)` of gradients comes in, and wherever the paper needs more than the local slice (a mean over a row, a
norm of the tensor, the whole matrix), the rule yields a request and goes on with the answer. What it returns are the
new weights. It never mutates a tensor: states are assigned (`state.exp_avg = …`), and the engine commits them.

Rules know no ranks, no layouts, no storage. An elementwise rule has nothing to ask for, so its `update` is a plain
function that is handed flat slices of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor

MAX_FAILURES = 3
"""Refreshes in a row that may fail before training stops with an error."""

Scope = Literal["matrix", "tensor", "optimizer"]
Kind = Literal["like", "row", "col", "matrix", "group", "owner"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """A reduction of `x` over `dim` of the logical matrix (-1: along each row, -2: along each column), or over all of
    `scope` where `dim` is None. The answer keeps the reduced dims with size 1, so that it broadcasts against `x`."""

    op: Literal["sum", "mean", "max"]
    x: Tensor
    dim: Literal[-1, -2] | None
    scope: Scope


def Sum(x: Tensor, dim: Literal[-1, -2] | None = None, *, scope: Scope = "matrix") -> Reduction:
    """Ask for the sum of `x` over a dim of the logical matrix, over the matrix, the tensor, or, with scope="optimizer",
    over every parameter that steps now, each element once however many copies there are."""
    return Reduction("sum", x, dim, scope)


def Mean(x: Tensor, dim: Literal[-1, -2] | None = None, *, scope: Scope = "matrix") -> Reduction:
    """Ask for the mean of `x`; see `Sum`."""
    return Reduction("mean", x, dim, scope)


def Max(x: Tensor, dim: Literal[-1, -2] | None = None, *, scope: Scope = "matrix") -> Reduction:
    """Ask for the maximum of `x`; see `Sum`. An empty piece contributes nothing."""
    return Reduction("max", x, dim, scope)


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Ask for whole logical matrices `(k, rows, cols)`. From here to `Back` the rule runs where matrices are computed;
    k there is the number of matrices owned, which may be 0. The dtype of `x` is the dtype on the wire."""

    x: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Back:
    """Hand whole matrices back; the answer has the shape of the piece that `Whole` was given."""

    x: Tensor


class Transform(Protocol):
    """A function of matrices that can also be computed from slices of them, because Gram matrices and other sums are all
    that it needs of the rest. Hashable: a frozen dataclass of its options."""

    def __hash__(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Of whole matrices (k, rows, cols)."""

    def by_slices(self, x: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        """Of one slice (k, short side, part of the long side) of each matrix: yields what is to be summed over the
        slices of each matrix, numbers (k, 1, 1) or symmetric matrices (k, n, n), and is sent the sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Through:
    """Ask for `transform(x)`, between `Whole` and `Back`. A rule that asks for nothing else there, and else does only what
    is elementwise there, need not have a matrix in one place: `Whole` may then answer with slices of the long side."""

    x: Tensor
    transform: Transform


Request = Reduction | Whole | Through | Back
Update = Generator[Any, Any, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the mathematics sees: a logical matrix of `rows` × `cols`, or a vector (`ndim` < 2, rows = 1). `part` is the
    name that a split gives it, for rules that list it in their `whole_parts`."""

    rows: int
    cols: int
    ndim: int = 2
    part: str = ""

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor had two dims or more."""
        return self.ndim >= 2

    @property
    def numel(self) -> int:
        """Elements of one logical matrix."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class State:
    """Declaration of one state of a rule.

    kind: "like" lies as the parameter does, element for element; "row" is `(rows, 1)`, "col" is `(1, cols)`, "matrix"
    is one number per logical matrix; "owner" lives with whoever computes the matrix and has the `shape` given here.
    "group" is one number per parameter group, which every stack must update to the same value, from sums of optimizer
    scope and scalars alone.

    fill: what it starts as; "weight" (of a "like" state): as the weights.

    symmetric: of an "owner" state that is a symmetric matrix, up to rounding: half of it may be stored.

    signed: False for what is never negative, such as a mean of squares: stored in few bits, it keeps small values from
    becoming zero.

    limit: of an "owner" state that counts what went wrong; above it, the next step raises on every rank.
    """

    kind: Kind = "like"
    shape: tuple[int, int] = (0, 0)
    fill: float | Literal["weight"] = 0.0
    limit: float | None = None
    signed: bool = True
    symmetric: bool = False


class StateView:
    """The states of one stack, as attributes. Reading after an assignment gives the new value; nothing is written to
    the store before the engine commits."""

    __slots__ = ("new", "old")
    new: dict[str, Tensor]
    old: Mapping[str, Tensor]

    def __init__(self, old: Mapping[str, Tensor]) -> None:
        object.__setattr__(self, "old", old)
        object.__setattr__(self, "new", {})

    def __getattr__(self, name: str) -> Tensor:  # only reached for what is not a slot
        if name in self.new:
            return self.new[name]
        try:
            return self.old[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Tensor) -> None:
        assert name in self.old, f"state {name!r} is not declared by the rule's states()"
        self.new[name] = value


class Step:
    """What changes from step to step, handed to `update` as `h`: `lr`, `weight_decay`, `step` (1 on the first), the
    logical `shape`, whether it runs on a `gpu`, which of the rule's `recurring` work is `due`, and whatever its `scalars`
    returned."""

    stretches: Mapping[Any, Callable[..., Any]] = {}
    """Kernels, by the function that each stands for."""
    due: frozenset[str]
    gpu: bool
    lr: float
    weight_decay: float
    step: int
    shape: Shape

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def run(self, f: Callable[..., _T], *args: Any) -> _T:
        """`f(*args)`, by a kernel where there is one: an elementwise stretch of a rule, over tensors that broadcast to the
        first one (k, rows, cols), and numbers."""
        return self.stretches.get(f, f)(*args)

    def __getattr__(self, name: str) -> Any:  # only reached for names that __init__ did not set
        raise AttributeError(f"the rule's scalars() do not define {name!r}")


@dataclass(frozen=True)
class Rule:
    """Base of every rule. The fields of a subclass are its hyperparameters, in the constructor's order.

    Class attributes: `reach` says what the rule must see ("elementwise": any slice; "reduce": sums as well; "matrix":
    whole logical matrices). `batched` is False for a rule that amplifies rounding, whose matrices must be computed one
    by one so that every layout gives the same bits.
    """

    reach: ClassVar[Literal["elementwise", "reduce", "matrix"]]
    batched: ClassVar[bool] = True
    observes: ClassVar[Mapping[str, Literal["like", "row"]]] = {}
    """What `optimizer.observe` may feed beside gradients, by name: "like" has an element per weight, "row" one number per
    row of a matrix (in equal blocks of rows: heads)."""
    modes: ClassVar[bool] = False
    """Whether the weights that are trained are not those to evaluate, so that optimizer.train() and .eval() swap them."""
    create_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults that create_optimizer changes, because there one lr serves several rules."""

    def check(self) -> None:
        """Raise ValueError for a hyperparameter out of range. Called at construction and whenever one changes."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("lr", "weight_decay"):
                require(isinstance(value, int | float), f"{field.name} must be a number, got {value!r}")
            if field.name in ("lr", "weight_decay", "eps", "momentum") and isinstance(value, int | float):
                require(math.isfinite(value) and value >= 0, f"{field.name} must be a finite number ≥ 0, got {value!r}")
            if field.name == "betas":
                require(all(0 <= beta < 1 for beta in value), f"betas must lie in [0, 1), got {value!r}")

    def refuse(self, shape: Shape) -> str | None:
        """Why a parameter of this logical shape cannot be served, or None."""
        if self.reach == "matrix" and not shape.is_matrix:
            return f"{type(self).__name__} needs a matrix, got shape ({shape.cols},)"
        return None

    def states(self, shape: Shape) -> dict[str, State]:
        """The states kept for a parameter whose logical matrices have this shape, by name."""
        return {}

    def scalars(self, step: int) -> dict[str, Any]:
        """Numbers that depend on the step alone (bias corrections), computed once per group and step."""
        return {}

    def phases(self) -> dict[str, tuple[int, float]]:
        """Kinds of steps that ask for different things or cost differently: name → (an example step, share of steps)."""
        return {"step": (2, 1.0)}

    def recurring(self, shape: Shape) -> dict[str, float]:
        """Work that is not done in every step: name → cost, in any unit. Each matrix's items take turns, dealt out so that
        every step costs the same; which are due is in `h.due`."""
        return {}

    def turns(self) -> int:
        """Over how many steps recurring work is dealt out; 1: all of it in the same step."""
        return 1

    def due(self, step: int, turn: int) -> bool:
        """Whether recurring work whose turn is 0 … turns() − 1 is done in this step; turn 0 is the published schedule."""
        raise NotImplementedError

    def evaluated(self, weight: Tensor, state: Any) -> Tensor:
        """The weights to evaluate, from those that are trained; elementwise. Of rules with `modes`."""
        raise NotImplementedError

    def trained(self, weight: Tensor, state: Any) -> Tensor:
        """The weights to train, from those that were evaluated; the inverse of `evaluated`, up to rounding."""
        raise NotImplementedError

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Any:
        """The paper. Returns the new weights (elementwise), or is a generator that does."""
        raise NotImplementedError

    def observe(self, name: str, value: Tensor, state: Any, h: Any) -> None:
        """Take a piece of an observation, (k, rows, cols) or (k, rows, 1), into the states: elementwise, without requests.
        `h` is that of the next step."""
        raise NotImplementedError


@dataclass(frozen=True)
class TwoSided(Rule):
    """Base of rules that keep something per side of a matrix, refreshed every `precondition_frequency` steps at a cubic
    cost: all sides in the same step with `synchronous`, else each in its turn, so that every step costs the same. A side
    longer than `max_precond_dim` has nothing. With a `block_size` every matrix is cut into blocks of at most so many rows
    and columns, the last ones smaller, each a matrix of its own wherever it lies (convolutions as (out, rest))."""

    _: KW_ONLY
    synchronous: bool = False
    block_size: int | None = None

    def check(self) -> None:
        super().check()
        for name in ("precondition_frequency", "max_precond_dim"):
            require(getattr(self, name) >= 1, f"{name} must be ≥ 1, got {getattr(self, name)}")
        require(
            self.block_size is None or self.block_size >= 1, f"block_size must be ≥ 1 or None, got {self.block_size}"
        )

    def sides(self, shape: Shape) -> dict[str, int]:
        """The sides that have something, with their lengths."""
        lengths = {"left": shape.rows, "right": shape.cols} if shape.is_matrix else {}
        return {side: n for side, n in lengths.items() if n <= self.max_precond_dim}  # type: ignore[attr-defined]

    def recurring(self, shape: Shape) -> dict[str, float]:
        return {side: float(n) ** 3 for side, n in self.sides(shape).items()}

    def failures(self, shape: Shape) -> dict[str, State]:
        """Per side, how many refreshes in a row have failed: what is there is kept, but not for ever."""
        return {f"failures_{side}": State("owner", (1, 1), limit=MAX_FAILURES) for side in self.sides(shape)}

    def turns(self) -> int:
        return 1 if self.synchronous else self.precondition_frequency  # type: ignore[attr-defined]

    def due(self, step: int, turn: int) -> bool:
        return step > 1 and (step - 1 - turn) % self.precondition_frequency == 0  # type: ignore[attr-defined]

    def phases(self) -> dict[str, tuple[int, float]]:
        every = self.precondition_frequency  # type: ignore[attr-defined]
        refresh = next(step for step in range(2, 2 * every + 2) if self.due(step, 0))
        return {"refresh": (refresh, 1 / every), "step": (refresh + 1, 1 - 1 / every)}


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)
