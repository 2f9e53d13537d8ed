"""Splits under test: a line of words, the shape it is for, and the same cut written out with slices and views.

`tests/test_logical.py` (one process) and `tests/distributed/test_logical.py` (layouts, checkpoints) compare a parameter
with a split with the parameters that it is made of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import distopt

STEPS = 4
# A view of the stored tensor that has the elements of one matrix, in the order of the matrix where it is not transposed,
# and the shape of that.
Views = list[tuple[Tensor, tuple[int, ...]]]


@dataclass(frozen=True)
class Case:
    """See the module. `cut` views one stored tensor as the weights that it is made of."""

    split: str
    shape: tuple[int, ...]
    cut: Callable[[Tensor], Views]
    transposed: bool = False

    def parts(self, stored: Tensor) -> list[Tensor]:
        """The weights that the tensor is made of, contiguous copies, as (out, in)."""
        found = [view.reshape(shape) for view, shape in self.cut(stored)]
        return [(part.mT if self.transposed else part).clone(memory_format=torch.contiguous_format) for part in found]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The stored tensor made of these weights."""
        stored = torch.full(self.shape, torch.nan)
        for (view, _), part in zip(self.cut(stored), parts, strict=True):
            view.copy_((part.mT if self.transposed else part).reshape(view.shape))
        assert not stored.isnan().any()
        return stored


def whole(*views: Tensor) -> Views:
    return [(view, tuple(view.shape)) for view in views]


def rows(*views: Tensor) -> Views:
    """Views of more than two dims whose leading ones are rows."""
    return [(view, (-1, view.shape[-1])) for view in views]


def columns(*views: Tensor) -> Views:
    """Views of more than two dims whose trailing ones are columns."""
    return [(view, (view.shape[0], -1)) for view in views]


CASES = {
    "equal": Case("q,k,v", (54, 20), lambda w: whole(*w.split(18))),
    "grouped": Case("q:3h,k:1h,v:1h", (55, 20), lambda w: whole(*w.split([33, 11, 11]))),
    "rows": Case("q:31,k:7,v:5", (43, 20), lambda w: whole(*w.split([31, 7, 5]))),
    "heads": Case("q:3h,k:1h,v:1h per_head", (55, 20), lambda w: whole(*w.split(11))),
    "interleaved": Case(
        "q,k,v interleaved=4", (84, 20), lambda w: rows(*(w.view(4, 3, 7, 20)[:, part] for part in range(3)))
    ),
    "interleaved_grouped": Case(
        "q:4h,k:2h,v:2h interleaved=2",
        (56, 20),
        lambda w: rows(*(w.view(2, 28, 20)[:, a:b] for a, b in ((0, 14), (14, 21), (21, 28)))),
    ),
    "interleaved_heads": Case(
        "q,k,v interleaved=4 per_head",
        (84, 20),
        lambda w: whole(*(w.view(4, 3, 7, 20)[head, part] for part in range(3) for head in range(4))),
    ),
    "alternating": Case("gate,up interleaved=11", (22, 20), lambda w: whole(w[::2], w[1::2])),
    "output_heads": Case("heads=3 cols", (20, 33), lambda w: whole(*w.split(11, 1))),
    "interleaved_columns": Case(
        "a,b cols interleaved=3", (20, 42), lambda w: columns(*(w.view(20, 3, 2, 7)[:, :, part] for part in range(2)))
    ),
    "transposed": Case("transposed q,k,v", (20, 54), lambda w: whole(*w.split(18, 1)), transposed=True),
    "transposed_alone": Case("transposed", (20, 33), lambda w: whole(w), transposed=True),
    "transposed_heads": Case("transposed heads=3 cols", (33, 20), lambda w: whole(*w.split(11)), transposed=True),
    "experts": Case("gate,up", (3, 24, 16), lambda w: whole(w[:, :12], w[:, 12:])),
    "experts_transposed": Case(
        "transposed gate:16,up:8", (3, 16, 24), lambda w: whole(w[..., :16], w[..., 16:]), transposed=True
    ),
    "flattened": Case("flattened", (10, 4, 3), lambda w: columns(w)),
}
# What a rule with block_size=16 makes of them: every block is compared with one that is a parameter of its own.
BLOCKS = {
    "blocks": Case(
        "", (37, 50), lambda w: whole(*(w[r : r + 16, c : c + 16] for r in (0, 16, 32) for c in (0, 16, 32, 48)))
    ),
    "blocks_of_parts": Case("q,k", (40, 10), lambda w: whole(w[:16], w[16:20], w[20:36], w[36:])),
    "blocks_of_interleaved": Case(
        "q,k interleaved=4",
        (64, 10),
        lambda w: rows(*(w.view(4, 2, 8, 10)[half : half + 2, part] for part in (0, 1) for half in (0, 2))),
    ),
    "blocks_of_transposed": Case(
        "transposed",
        (20, 33),
        lambda w: whole(*(w[c : c + 16, r : r + 16] for r in (0, 16, 32) for c in (0, 16))),
        transposed=True,
    ),
    "blocks_of_experts": Case("", (3, 20, 10), lambda w: whole(*(w[e, r : r + 16] for e in range(3) for r in (0, 16)))),
}
NAMES = ("q", "out")  # tensor parallelism cuts the one along its rows, the other along its columns


def weights(case: Case, seed: int = 1) -> dict[str, Tensor]:
    """The same first weights everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(case.shape, generator=generator) for name in NAMES}


def gradients(case: Case, step: int) -> dict[str, Tensor | None]:
    """The same gradients everywhere."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(case.shape, generator=generator) for name in NAMES}


def alone() -> Any:
    """Within it no two matrices are computed together: a batch may use another kernel, with other bits."""
    return patch("distopt.plan.build.BATCH_NUMEL", 0)


def in_parts(case: Case, optimizer: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after all steps where every part is a parameter of its own, in one process."""
    params = {name: [nn.Parameter(part) for part in case.parts(weight)] for name, weight in weights(case).items()}
    named = [(f"{name}.{i}", param) for name, parts in params.items() for i, param in enumerate(parts)]
    with alone():
        built = getattr(distopt, optimizer)(named, **options)
        for step in range(STEPS):
            for name, grad in gradients(case, step).items():
                assert grad is not None
                for param, part in zip(params[name], case.parts(grad), strict=True):
                    param.grad = part
            built.step()
    first = weights(case)
    joined = {name: case.join([param.detach() for param in parts]) for name, parts in params.items()}
    assert all((joined[name] != first[name]).float().mean() > 0.9 for name in NAMES), "little moved"
    return joined
