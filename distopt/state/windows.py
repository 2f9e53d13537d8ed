"""Windows and slabs: the part of each parameter that this rank works on, and the states that go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.layouts import Partition, local_tensor
from distopt.plan.buckets import Bucket, Entry, GroupPlan, Piece, Spec, Stack
from distopt.plan.tiles import BLOCK, Storage, whole_tiles
from distopt.rule import Rule, Shape, State
from distopt.state.allocation import allocate
from distopt.state.codecs import Codec
from distopt.state.coded import Coded, Packed
from distopt.state.pages.pager import Pager
from distopt.state.sections import Paged, PagedPacked, paged_sections


@dataclass
class Window:
    """One parameter's storage here, flat. All of it, or, for a parameter partitioned over replicas, this rank's share.

    Attributes:
        param: the user's tensor (DTensor or plain).
        start, stop: the window in the flattened local tensor.
        state: flat tensor per state that lies here, keyed by state name.
    """

    param: Tensor
    spec: Spec
    start: int
    stop: int
    state: dict[str, Tensor] = field(default_factory=dict)
    _copy: Tensor | None = None

    @property
    def numel(self) -> int:
        """Elements in the window."""
        return self.stop - self.start

    @property
    def holders(self) -> int:
        """Ranks that hold one copy of the parameter together."""
        return len(self.spec.layout.ranks)

    @property
    def raw(self) -> Tensor:
        """What of the parameter is stored here, as autograd knows it."""
        return _raw(self.param)

    @property
    def whole(self) -> bool:
        """Whether the window is all of the local storage."""
        return self.numel == self.raw.numel()

    @property
    def plain(self) -> bool:
        """Whether the parameter is a plain contiguous tensor that is all of the window."""
        param = self.param
        return not isinstance(param, DTensor) and param.is_contiguous() and self.numel == param.numel()

    @property
    def simple(self) -> bool:
        """Whether it is so, and fp32."""
        return self.plain and self.param.dtype == torch.float32

    def check(self, numel: int, bound: int, device: str) -> None:
        """Raise ValueError if there are not as many elements as when it was `bound`, or not on this kind of device: a kernel is
        handed addresses."""
        here = self.param.device.type
        if numel != bound or here != device:
            raise ValueError(
                f"{self.spec.name!r} had {bound} elements on {device} here when the optimizer was bound, and has {numel} "
                f"on {here} now; build the optimizer after the model is moved or sharded"
            )

    def refuse_freed(self, tensor: Tensor | None, what: str = "") -> None:
        """Raise ValueError if the weights or the gradient (`what`: "the gradient of ") have no memory that a kernel can be
        handed."""
        local = None if tensor is None else local_tensor(tensor)
        if local is not None and local.numel() and not local.data_ptr():
            raise ValueError(
                f"{what}{self.spec.name!r} has no memory of its own now; was its storage freed, or does it wrap other tensors?"
            )

    def raw_shape(self) -> tuple[int, ...]:
        """Shape of `raw_weight` and `raw_grad`: the local shape, or flat for a part of it. What is only copied need not
        be flattened first, which costs more than the copy for small tensors."""
        return tuple(self.raw.shape) if self.whole else (self.numel,)

    def raw_weight(self) -> Tensor:
        """The weights in `raw_shape`, for copies under no_grad."""
        return self.raw if self.whole else self.weight()

    def raw_grad(self) -> Tensor:
        """The gradient in `raw_shape`; there must be one."""
        grad = self.param.grad
        if self.whole and grad is not None and not isinstance(grad, DTensor):
            return grad
        flat = self.grad()
        assert flat is not None
        return flat.view(self.raw_shape())

    def writable_grad(self) -> bool:
        """Whether there is a gradient, and each of its elements has memory of its own, with its sign."""
        grad = self.param.grad
        return grad is not None and (grad.is_contiguous() or 0 not in grad.stride()) and not grad.is_neg()

    def set_grad(self, value: Tensor) -> None:
        """Write this to the gradient, if that is there and lies elsewhere."""
        if self.writable_grad():
            raw = self.raw_grad()
            if raw.data_ptr() != value.data_ptr():
                raw.copy_(value.view(raw.shape))

    def weight(self) -> Tensor:
        """The weights, flat; call `finish` after writing to them."""
        return self.whole_weight()[self.start : self.stop]

    def whole_weight(self) -> Tensor:
        """All of the local weights, flat, whatever the window; call `finish` after writing to them."""
        local = local_tensor(self.param)
        if not local.is_contiguous():
            local = self._copy = local.contiguous()
        return local.view(-1)

    def finish(self) -> None:
        """Write back weights whose storage is not contiguous (channels_last)."""
        if self._copy is not None:
            local_tensor(self.param).copy_(self._copy)
            self._copy = None

    def grad(self) -> Tensor | None:
        """The gradient, flat; None where there is none."""
        grad = self.param.grad
        if grad is None:
            return None
        if isinstance(grad, DTensor):
            assert isinstance(self.param, DTensor)
            if grad.placements != self.param.placements:
                grad = grad.redistribute(placements=self.param.placements)
        # Complex numbers leave gradients of one element behind whose sign is not in memory.
        return local_tensor(grad).resolve_neg().contiguous().view(-1)[self.start : self.stop]

    def grad_at_address(self, given: Tensor | None, bound: int, device: torch.device) -> Tensor:
        """The gradient, contiguous, or zeros where what is `given` of it is None, for a kernel that is handed addresses.

        Raises:
            ValueError: the parameter has not as many elements here as when it was `bound`, or lies not on this device, or it or
                its gradient has no memory.
        """
        local = local_tensor(self.param)
        if local.numel() != bound or local.device.type != device.type or not local.data_ptr():
            self.check(local.numel(), bound, device.type)
            self.refuse_freed(local)
        if (
            type(given) is Tensor
            and given.numel() == self.numel == bound
            and given.is_contiguous()
            and given.data_ptr()
            and not given.is_neg()
        ):
            return given  # as it is
        self.refuse_freed(given, "the gradient of ")
        grad = None if given is None else self.grad()
        if grad is None:
            return torch.zeros(self.numel, dtype=torch.float32, device=device)
        self.check(grad.numel(), self.numel, device.type)
        return grad


def refuse_sparse(windows: list[Window], grads: list[Tensor | None]) -> None:
    """Raise ValueError if one of the gradients is not a dense tensor."""
    for window, grad in zip(windows, grads):
        if grad is not None and grad.layout is not torch.strided:
            name = window.spec.name
            raise ValueError(f"{name!r} has a sparse gradient; use sparse=False, or torch.optim.SparseAdam for it")


def scaled(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """The tensors times `factor` (0-D, where it is on the device): in place, except for low precision, whose product is made in
    fp32."""
    full = [tensor for tensor in tensors if tensor.dtype == torch.float32]
    if full:
        torch._foreach_mul_(full, factor)
    return [tensor if tensor.dtype == torch.float32 else tensor.float() * factor for tensor in tensors]


def wide(grad: Tensor, factor: Tensor | None) -> Tensor:
    """A gradient in fp32: what is so already, or what is of lower precision, times `factor`."""
    return grad.float() if grad.dtype == torch.float32 or factor is None else grad.float() * factor


def _raw(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def make_window(param: Tensor, spec: Spec) -> Window:
    """The window of a parameter under the layout it was planned with."""
    if isinstance(spec.layout, Partition):
        return Window(param, spec, spec.layout.cuts[spec.index], spec.layout.cuts[spec.index + 1])
    return Window(param, spec, 0, local_tensor(param).numel())


@dataclass
class Slabs:
    """The states of one stack of pieces or of owned matrices: fp32 tensors (k, …) by name."""

    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    coded: dict[str, list[Coded | Paged]] = field(default_factory=dict)
    """States of owner kind that are stored as codes, a store per matrix. What lies as pieces do is found by parameter."""


def piece_extent(state: State, piece: Piece) -> tuple[int, int]:
    """(rows, cols) of one piece's state of this kind."""
    rows, cols = piece.rect.r1 - piece.rect.r0, piece.rect.c1 - piece.rect.c0
    extents = {"like": (rows, cols), "row": (rows, 1), "col": (1, cols), "matrix": (1, 1), "owner": state.shape}
    return extents[state.kind]


def no_extent(state: State, shape: Shape) -> tuple[int, int, int]:
    """The shape of a state of no pieces."""
    rows = shape.rows if state.kind in ("like", "row") else 1
    return 0, rows, shape.cols if state.kind in ("like", "col") else 1


def initial(state: State, numel: int, weight: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A flat state as it starts; `weight` gives the flat weights that it lies like."""
    if state.fill == "weight":
        return weight().to(torch.float32, copy=True)
    return allocate(numel, torch.float32, device).fill_(state.fill)


def allocate_stacks(
    rule: Rule,
    bucket: Bucket,
    windows: list[Window],
    pieces: dict[int, list[Piece]],
    device: torch.device,
    storage: Storage,
    make: Callable[[int, int, str, State, Codec], Coded | Paged],
) -> tuple[list[Slabs], list[Slabs]]:
    """States of a bucket: (per stack of pieces, per stack of owned matrices).

    What lies as the pieces do is found again, flat and in the order of the pieces, in `window.state`. `pieces` holds all
    pieces of each parameter here, in the order in which they lie. `make` makes the store of a state that is coded and lives
    with its owner: parameter, matrix, name, state and codec.
    """
    stacks = []
    for stack in bucket.stacks:
        declared = rule.states(stack.shape)
        slabs = Slabs({}, {name: state.kind for name, state in declared.items()})
        for name, state in declared.items():
            codec = storage.codec(name, state, windows[stack.pieces[0].param].spec.layout.shape)
            if codec and state.kind == "like":
                continue
            if codec and not bucket.exchanged:
                slabs.coded[name] = [_made(make, bucket.entries[p.entry], name, state, codec) for p in stack.pieces]
            elif state.kind == "owner" and bucket.exchanged:
                slabs.tensors[name] = torch.empty((0, *state.shape), device=device)
            elif state.kind == "owner" and bucket.entries[stack.pieces[0].entry].geometry.logical.declared:
                # Its neighbours may have other shapes.
                shape = (len(stack.pieces), *state.shape)
                slabs.tensors[name] = torch.full(shape, float(state.fill), device=device)
            elif state.kind != "group":
                slabs.tensors[name] = _piece_slab(name, state, stack, windows, pieces, device)
        stacks.append(slabs)
    owned = []
    for group in bucket.owned:
        declared = rule.states(group.shape)
        slabs = Slabs({}, {name: state.kind for name, state in declared.items()})
        for name, state in declared.items():
            codec = storage.codec(name, state, ()) if state.kind == "owner" else None
            if codec:
                slabs.coded[name] = [_made(make, bucket.entries[i], name, state, codec) for i in group.entries]
            elif state.kind == "owner":
                shape = (len(group.entries), *state.shape)
                slabs.tensors[name] = torch.full(shape, float(state.fill), device=device)
            elif state.kind != "group":
                slabs.tensors[name] = torch.empty(no_extent(state, group.shape), device=device)
        owned.append(slabs)
    return stacks, owned


def _made(make: Callable[..., Coded | Paged], entry: Entry, name: str, state: State, codec: Codec) -> Coded | Paged:
    return make(entry.param, entry.matrix, name, state, codec)


def store_maker(
    plan: GroupPlan, device: torch.device, pager: Pager | None
) -> Callable[[int, int, str, State, Codec], Coded | Paged]:
    """Makes the store of a state of one matrix, which lives with its owner; see `allocate_stacks`."""
    firsts = list(accumulate((prod(spec.layout.shape) for spec in plan.specs), initial=0))

    def make(param: int, matrix: int, name: str, state: State, codec: Codec) -> Coded | Paged:
        packs, tiles = plan.storage.packs(state), whole_tiles(*plan.storage.extent(state))
        lengths = np.full(tiles.count, BLOCK) if tiles.lengths is None else tiles.lengths
        starts = firsts[param] + matrix * tiles.numel + np.cumsum(lengths, dtype=np.int64) - lengths
        fill = float(state.fill)
        if not plan.pages:
            return (Packed if packs else Coded)(codec, tiles, device, fill, starts, state.shape)
        assert pager is not None
        pages = plan.pages[param, matrix, name]
        sections = paged_sections(pager, pages, {name: codec}, {name: fill}, tiles, device, starts)
        return (PagedPacked if packs else Paged)(name, sections, codec, tiles, device, state.shape)

    return make


def _piece_slab(
    name: str, state: State, stack: Stack, windows: list[Window], pieces: dict[int, list[Piece]], device: torch.device
) -> Tensor:
    """A tensor (k, rows, cols) for one state of a stack. Where each parameter has a single piece the slab is made here
    and the parameters get views; else the parameter has one flat tensor and the stack is a view of that."""
    first = stack.pieces[0]
    rows, cols = piece_extent(state, first)
    if all(len(pieces[piece.param]) == 1 for piece in stack.pieces) and stack.rect.dense:
        slab = allocate(len(stack.pieces) * rows * cols, torch.float32, device).view(-1, rows, cols)
        for item, piece in zip(slab, stack.pieces):
            window = windows[piece.param]
            window.state[name] = item.view(-1)
            item.view(-1).copy_(initial(state, rows * cols, window.weight, device))
        return slab
    window, siblings = windows[first.param], pieces[first.param]
    if name not in window.state:
        total = sum(prod(piece_extent(state, sibling)) for sibling in siblings)
        window.state[name] = initial(state, total, window.weight, device)
    flat = window.state[name]
    if state.kind == "like":
        return strided(flat, stack)
    offset = sum(prod(piece_extent(state, sibling)) for sibling in siblings[: siblings.index(first)])
    return flat[offset : offset + len(stack.pieces) * rows * cols].view(len(stack.pieces), rows, cols)


def strided(flat: Tensor, stack: Stack) -> Tensor:
    """The stack (k, rows, cols) as a view of the flat storage of the one parameter that its pieces lie in."""
    k, rows, cols = stack.size
    offsets = [piece.rect.offset for piece in stack.pieces]
    step = offsets[1] - offsets[0] if k > 1 else 0
    return flat.as_strided(
        (k, rows, cols), (step, stack.rect.stride, stack.rect.step), flat.storage_offset() + offsets[0]
    )
