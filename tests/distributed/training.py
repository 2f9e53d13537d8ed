"""What the ranks of `test_layouts.py` run, and the single process that they are compared with.

Apart from the tests, so that a rank imports no public oracles.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distopt
from distopt.layouts import layout_of
from distopt.rules import rule_class
from tests.cases import observation
from tests.distributed.layouts import LAYOUTS, Full, Laid, lay_out, local_tensor

STEPS = 20
Shapes = dict[str, tuple[int, ...]]


def weights(shapes: Shapes) -> Full:
    """The same first weights in every process."""
    generator = torch.Generator().manual_seed(1)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gradients(shapes: Shapes, step: int) -> dict[str, Tensor | None]:
    """The same full gradients in every process: noise around a constant, so that the change is large against the
    rounding of weights. One parameter has none on every seventh step, on all ranks."""
    constant, noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(100 + step)
    grads: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=constant) + 0.5 * torch.randn(shape, generator=noise)
        for name, shape in shapes.items()
    }
    if step % 7 == 3:
        grads[next(iter(shapes))] = None
    return grads


def show(built: distopt.Optimizer, observes: str, laid: Laid, shapes: Shapes, step: int) -> None:
    """Let an optimizer observe what belongs before a step; of rows, what every rank has seen is another part."""
    kind = rule_class(built.param_groups[0]["rule"]).observes[observes]
    found = {name: observation(kind, shape, step) for name, shape in shapes.items()}
    if kind == "row":
        # Where the ranks of all parameters know each other, only the first has seen the largest numbers.
        known = len(laid.params) == len(shapes) and all(isinstance(param, DTensor) for param in laid.params.values())
        first = not known or dist.get_rank() == 0
        built.observe(observes, {name: found[name] if first else found[name] * 0.5 for name in laid.params})
        return
    laid.set_grads(found)
    built.observe(observes)


def train(built: distopt.Optimizer, observes: str | None, laid: Laid, shapes: Shapes) -> list[float | None]:
    """All steps; the gradient norm of each."""
    norms = []
    for step in range(STEPS):
        if observes and step % 3 == 0:
            show(built, observes, laid, shapes, step)
        laid.set_grads(gradients(shapes, step))
        built.step()
        norms.append(built.last_grad_norm)
    return norms


def one_process(
    optimizer: str, options: dict[str, Any], shapes: Shapes, observes: str | None = None
) -> tuple[Full, list[float | None]]:
    """The weights after all steps without any process group, and the gradient norm of each step."""
    params = {name: nn.Parameter(weight) for name, weight in weights(shapes).items()}
    laid = Laid(params, {name: torch.arange(param.numel()) for name, param in params.items()})
    built = getattr(distopt, optimizer)(params.items(), **options)
    norms = train(built, observes, laid, shapes)
    first = weights(shapes)
    assert all(not torch.equal(param, first[name]) for name, param in params.items() if param.numel()), "nothing moved"
    return {name: param.detach() for name, param in params.items()}, norms


def on_ranks(
    optimizer: str,
    options: dict[str, Any],
    layout: str,
    shapes: Shapes,
    expected: Full,
    observes: str | None = None,
) -> tuple[dict[str, tuple[bool, float, float]], list[float | None]]:
    """What one rank sees: per parameter whether its elements are equal, the squared norms of error and change; and the
    gradient norm of each step."""
    laid = lay_out(LAYOUTS[layout], weights(shapes))
    built = getattr(distopt, optimizer)(laid.named(), **options, **LAYOUTS[layout].options())
    norms = train(built, observes, laid, shapes)
    report = {}
    for name, param in laid.params.items():
        own, other = local_tensor(param).detach(), laid.local(name, expected[name])
        change = other.double() - laid.local(name, weights(shapes)[name]).double()
        error = (own.double() - other.double()).norm().item() ** 2
        report[name] = (torch.equal(own, other), error, change.norm().item() ** 2)
    return report, norms


def placed(layout: str) -> tuple[bool, bool, bool]:
    """Whether gathering gives back what was laid out; whether some shards here differ in size, whether one is empty."""
    shapes = LAYOUTS[layout].shapes
    laid = lay_out(LAYOUTS[layout], weights(shapes))
    gathered = laid.gather(shapes)
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, {name: len(laid.elements[name]) for name in laid.params})
    per_param = [[size.get(name, 0) for size in sizes] for name, shape in shapes.items() if 0 not in shape]
    return (
        all(torch.equal(gathered[name], weight) for name, weight in weights(shapes).items()),
        any(len(set(counts)) > 1 for counts in per_param),
        any(0 in counts for counts in per_param),
    )


def regions(layout: str) -> list[str]:
    """Parameters whose regions, in any matrix view, are not the elements that torch put here."""
    laid = lay_out(LAYOUTS[layout], weights(LAYOUTS[layout].shapes))
    wrong = []
    for name, param in laid.params.items():
        read = layout_of(param, dist.get_rank())
        index = read.ranks.index(dist.get_rank())
        for row_dims in range(param.ndim + 1):
            cols = torch.Size(param.shape[row_dims:]).numel()
            local = torch.full_like(laid.elements[name], -1)
            for rect in read.rects(index, row_dims):
                rows = torch.arange(rect.r1 - rect.r0)[:, None]
                columns = torch.arange(rect.c1 - rect.c0)[None, :]
                at = (rect.offset + rows * rect.stride + columns).flatten()
                local[at] = ((rect.r0 + rows) * cols + rect.c0 + columns).flatten()
            if not torch.equal(local, laid.elements[name]):
                wrong.append(f"{name} as a matrix with {row_dims} row dims")
    return wrong
