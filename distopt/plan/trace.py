"""What a rule asks for, found by running it on meta tensors.

Once with pairwise distinct sizes for meaning: every answer must be used as what it is, and a reduction over a piece's
dim that was not asked for is refused, because on another layout the piece is another one. Once with the real shape for
cost.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distopt.plan.flops import flops_of
from distopt.rule import Back, Reduction, Request, Rule, Shape, State, StateView, Step, Through, Transform, Whole

ITEMS, OWNED, ROWS, COLS = 2, 13, 3, 5
FULL = (7, 11)


@dataclass(frozen=True)
class Ask:
    """One request of a round: "sum", "mean", "max", "whole", "through" or "back".

    `of` says what is reduced: something like the piece, a row statistic or a column statistic. That cannot be read off
    the sizes of a piece of one row or one column, so it is found here, where all sizes differ. `dtype` is what travels,
    `transform` what "through" asks for.
    """

    kind: str
    dim: int | None = None
    scope: str = "matrix"
    of: str = "like"
    dtype: torch.dtype = torch.float32
    transform: Transform | None = None


Rounds = tuple[tuple[Ask, ...], ...]


def on_the_wire(rounds: Rounds, dtype: torch.dtype) -> Rounds:
    """The rounds with whole matrices that travel in `dtype`, where they would in more bytes."""
    return tuple(
        tuple(
            replace(ask, dtype=dtype) if ask.kind in ("whole", "back") and ask.dtype.itemsize > dtype.itemsize else ask
            for ask in asks
        )
        for asks in rounds
    )


@dataclass(frozen=True)
class Trace:
    """The rounds of requests of one step, and the FLOPs spent between Whole and Back on one matrix, by kind of work as
    `cost.Rates` has rates for (matrix products by dtype, factorizations by name); the states that get new values, where
    there are whole matrices."""

    rounds: Rounds
    work: tuple[tuple[str, int], ...]
    assigned: frozenset[str] = frozenset()

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(flops for _, flops in self.work)

    def asks(self, kind: str) -> list[Ask]:
        """All requests of one kind."""
        return [ask for asks in self.rounds for ask in asks if ask.kind == kind]


def step_values(
    rule: Rule,
    step: int,
    shape: Shape,
    gpu: bool,
    turns: tuple[int, ...] = (),
    stretches: Mapping[Any, Callable[..., Any]] | None = None,
) -> Step:
    """The `h` of a step, for matrices whose recurring work has these turns (none given: all have turn 0), with these kernels
    for stretches of rules."""
    work = rule.recurring(shape)
    return Step(
        due=frozenset(name for name, turn in zip(work, turns or [0] * len(work)) if rule.due(step, turn)),
        gpu=gpu,
        lr=rule.lr,  # type: ignore[attr-defined]
        weight_decay=getattr(rule, "weight_decay", 0.0),
        step=step,
        shape=shape,
        stretches=stretches or {},
        **rule.scalars(step),
    )


@lru_cache(maxsize=4096)
def trace(rule: Rule, shape: Shape, step: int, gpu: bool, turns: tuple[int, ...] = ()) -> Trace:
    """Run `rule` on meta tensors of this logical shape; for `turns` see `step_values`.

    Raises:
        AssertionError: the rule reduces over a dim of its piece without asking, or returns something of another shape.
    """
    rounds = _meaning(rule, shape.ndim, shape.part, step, gpu)
    if not any(ask.kind == "whole" for asks in rounds for ask in asks):
        return Trace(rounds, ())
    guard = PieceGuard(type(rule).__name__, (1, shape.rows, shape.cols))
    _run(rule, shape, step, gpu, guard, 1, turns)
    return Trace(rounds, tuple(guard.work.items()), guard.assigned)


@dataclass(frozen=True)
class Footprint:
    """Bytes that are alive beside states while a rule runs, at most: `piece` per element of a piece; `working` at the
    owner of one matrix, of which `kept` are still there when the matrix goes back (new states, the result)."""

    piece: float
    working: int
    kept: int


@lru_cache(maxsize=4096)
def footprint(rule: Rule, shape: Shape, step: int, gpu: bool) -> Footprint:
    """Run `rule` on meta tensors of this logical shape and watch what it holds on to, the answers to its requests for
    whole matrices included."""
    guard = LiveBytes(type(rule).__name__, (1, shape.rows, shape.cols))
    rounds = _run(rule, shape, step, gpu, guard, 1)
    whole, back = (
        sum(a.dtype.itemsize for asks in rounds for a in asks if a.kind == kind) for kind in ("whole", "back")
    )
    kept = guard.kept + whole * shape.numel
    return Footprint(back + guard.most[False] / max(shape.numel, 1), guard.most[True] + whole * shape.numel, kept)


@lru_cache(maxsize=1024)
def _meaning(rule: Rule, ndim: int, part: str, step: int, gpu: bool) -> Rounds:
    """The rounds, from a run in which no two sizes are equal; the same for every shape of so many dims."""
    shape = Shape(*FULL, ndim, part) if ndim >= 2 else Shape(1, FULL[1], ndim)
    guard = PieceGuard(type(rule).__name__, (ITEMS, ROWS if ndim >= 2 else 1, COLS))
    return _run(rule, shape, step, gpu, guard, OWNED)


def _run(
    rule: Rule, shape: Shape, step: int, gpu: bool, guard: PieceGuard, owned: int, turns: tuple[int, ...] = ()
) -> Rounds:
    piece = guard.piece
    states = StateView({name: _meta(state, piece, (owned, *state.shape)) for name, state in rule.states(shape).items()})
    grad, weight = torch.empty(piece, device="meta"), torch.empty(piece, device="meta")
    rounds: list[tuple[Ask, ...]] = []
    with guard:
        run = rule.update(grad, weight, states, step_values(rule, step, shape, gpu, turns))
        answer: Any = None
        while True:
            try:
                requests = run.send(answer)
            except StopIteration as end:
                assert tuple(end.value.shape) == piece, f"{type(rule).__name__} returned weights of another shape"
                guard.assigned = frozenset(states.new)
                return tuple(rounds)
            several = isinstance(requests, tuple)
            asked: tuple[Request, ...] = requests if several else (requests,)
            rounds.append(tuple(_ask(request, piece) for request in asked))
            guard.at_owner = isinstance(asked[0], Whole) or (guard.at_owner and not isinstance(asked[0], Back))
            whole = (owned, shape.rows, shape.cols)
            if isinstance(asked[0], Through):  # its FLOPs count
                answers = tuple(_through(request, whole) for request in asked)
            else:
                with torch.utils._python_dispatch._disable_current_modes():
                    answers = tuple(_answer(request, piece, whole) for request in asked)
            answer = answers if several else answers[0]


def _meta(state: State, piece: tuple[int, int, int], owner: tuple[int, int, int]) -> Tensor:
    items, rows, cols = piece
    shapes = {
        "like": piece, "row": (items, rows, 1), "col": (items, 1, cols), "matrix": (items, 1, 1),
        "group": (1, 1, 1), "owner": owner,
    }  # fmt: skip
    return torch.empty(shapes[state.kind], device="meta")


def _ask(request: Request, piece: tuple[int, int, int]) -> Ask:
    if isinstance(request, Reduction):
        kept = (request.x.shape[1] == piece[1], request.x.shape[2] == piece[2])
        of = {(True, True): "like", (True, False): "row", (False, True): "col"}.get(kept, "one")
        return Ask(request.op, request.dim, request.scope, of)
    if isinstance(request, Through):
        return Ask("through", dtype=request.x.dtype, transform=request.transform)
    return Ask("whole" if isinstance(request, Whole) else "back", dtype=request.x.dtype)


def _through(request: Request, whole: tuple[int, int, int]) -> Tensor:
    assert isinstance(request, Through) and tuple(request.x.shape) == whole, "Through is asked between Whole and Back"
    return request.transform(request.x)


def _answer(request: Request, piece: tuple[int, int, int], whole: tuple[int, int, int]) -> Tensor:
    x = request.x
    if isinstance(request, Whole):
        assert tuple(x.shape) == piece, f"Whole was given {tuple(x.shape)}, the piece is {piece}"
        return torch.empty(whole, device="meta", dtype=x.dtype)
    if isinstance(request, Back):
        assert tuple(x.shape) == whole, f"Back was given {tuple(x.shape)}, whole matrices are {whole}"
        return torch.empty(piece, device="meta", dtype=x.dtype)
    assert isinstance(request, Reduction)
    assert len(x.shape) == 3 and all(n in (1, full) for n, full in zip(x.shape, piece, strict=True)), (
        f"{request.op} was given {tuple(x.shape)}, which is no statistic of the piece {piece}"
    )
    if request.scope == "optimizer":
        return torch.empty((1, 1, 1), device="meta")
    dims = (-1, -2) if request.dim is None else (request.dim,)
    return torch.empty(x.shape, device="meta").mean(dims, keepdim=True)


class PieceGuard(TorchDispatchMode):
    """Refuses an operation that takes a piece and loses one of its dims, outside Whole … Back; inside, counts `work`."""

    def __init__(self, name: str, piece: tuple[int, int, int]) -> None:
        super().__init__()
        self.name, self.piece, self.at_owner = name, piece, False
        self.work: dict[str, int] = {}
        self.assigned: frozenset[str] = frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.at_owner:
            counted = flops_of(func, args, kwargs or {}, out)
            if counted:
                self.work[counted[0]] = self.work.get(counted[0], 0) + counted[1]
            return out
        if not isinstance(out, Tensor):
            return out
        for x in args:
            if not isinstance(x, Tensor) or x.ndim != 3:
                continue
            kept = out.ndim == 3 and all(
                n == 1 or n != full or m == full for n, m, full in zip(x.shape, out.shape, self.piece, strict=True)
            )
            assert kept, (
                f"{self.name}: {func} turns {tuple(x.shape)} into {tuple(out.shape)} on a piece {self.piece}; what lies "
                "here is not the whole matrix: yield Sum, Mean, Max or Whole instead"
            )
        return out


class LiveBytes(PieceGuard):
    """Watches how many bytes of what the rule makes are alive: `most` while it runs at the owner (True) and elsewhere
    (False), `kept` of the owner's when the matrix goes back."""

    def __init__(self, name: str, piece: tuple[int, int, int]) -> None:
        super().__init__(name, piece)
        self.most, self.kept = {True: 0, False: 0}, 0
        self._live = {True: 0, False: 0}
        self._views: dict[int, int] = {}  # storages that the rule made: tensors that are alive on each
        self._was_at_owner = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if self._was_at_owner and not self.at_owner:
            self.kept = self._live[True]
        self._was_at_owner = self.at_owner
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor, given)
        return out

    def _watch(self, tensor: Tensor, given: set[int]) -> None:
        storage, where = tensor.untyped_storage(), self.at_owner
        key, size = storage._cdata, storage.nbytes()
        if key not in self._views:
            if key in given:  # a gradient, a state or an answer
                return
            self._views[key] = 0
            self._live[where] += size
            self.most[where] = max(self.most[where], self._live[where])
        self._views[key] += 1
        weakref.finalize(tensor, self._forget, key, size, where)

    def _forget(self, key: int, size: int, where: bool) -> None:
        self._views[key] -= 1
        if not self._views[key]:
            del self._views[key]
            self._live[where] -= size
