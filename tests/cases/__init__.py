"""One declaration per update rule; every module of this package holds one as `CASE`.

The runners cross them with oracles (`tests/test_rules.py`) and with layouts (`tests/distributed/test_layouts.py`). A
new rule is one new module here, nothing else.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from distopt.rules import rule_class

Shape = tuple[int, ...]
Options = dict[str, Any]
# (weight, gradients in order, **options) -> the weight after the last step
Reference = Callable[..., Tensor]

# Tall, wide, square, dims of at most 16, one row, one column, more than 4,096 elements, vectors, a scalar, nothing.
MIXED: dict[str, Shape] = {
    "tall": (37, 16),
    "wide": (24, 130),
    "square": (32, 32),
    "small": (7, 5),
    "row": (1, 40),
    "column": (40, 1),
    "large": (72, 64),
    "vector": (33,),
    "long_vector": (5000,),
    "single": (1,),
    "scalar": (),
    "empty": (0, 16),
    "empty_vector": (0,),
    "experts": (3, 12, 8),
}


def always(shape: Shape, options: Options) -> bool:
    """The comparison is defined for every shape."""
    return True


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Something to hold a rule against.

    Attributes:
        name: Shown in the test's name.
        run: Naive reference, or a public class made into one by `public`.
        rel: Largest ‖Δ − Δref‖ / ‖Δref‖ of each parameter's change.
        why: Where this tolerance comes from.
        dtype: What the oracle computes in; ours always computes in float32.
        variants: The case's variants that it has; None is all of them.
        but: Less these.
        where: Shapes, under a variant's options, for which the comparison is defined.
    """

    name: str
    run: Reference
    rel: float
    why: str
    dtype: torch.dtype = torch.float64
    variants: Sequence[str] | None = None
    but: Sequence[str] = ()
    where: Callable[[Shape, Options], bool] = always

    def has(self, variant: str) -> bool:
        """Whether it computes this variant."""
        return (self.variants is None or variant in self.variants) and variant not in self.but


Package = partial(Oracle, dtype=torch.float32)
"""A public package, which computes in float32."""


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """How far the same steps on any layout may be from one process.

    Attributes:
        rel: Largest rel; 0 demands torch.equal.
        stacks: The same for models with several matrices of one shape, which may be batched differently, where that is
            more.
        why: Where these two come from.
    """

    rel: float
    stacks: float | None = None
    why: str


ELEMENTWISE = Sharded(rel=0, why="elementwise: no result depends on a cut")
SUMS = Sharded(rel=1e-6, why="sums over ranks come in another order")
BATCHED = Sharded(
    rel=0,
    stacks=1e-5,
    why="whole matrices at one owner give the same bits; a batch of another size may use another kernel",
)
AMPLIFYING = Sharded(rel=0, why="amplifies rounding, so nothing weaker is honest; matrices are computed one by one")
MATRICES = frozenset({2, 3})


@dataclass(frozen=True, kw_only=True)
class Case:
    """An update rule under test.

    Attributes:
        optimizer: Name of the class in `distopt`.
        variants: Options of the constructor, by a short name.
        oracles: What its results are held against, one process.
        ndims: Numbers of dims that it accepts.
        dtypes: Of parameters and gradients, beside float32.
        observes: What its optimizer is shown before every third step, if anything; references get it as `observed`, by the
            number of the step from 0.
        first_update: The step, counted from 1, that first changes weights.
        alone: Each shape is compared with its oracles in an optimizer of its own, since sums run over all parameters.
        torch_class: The class of torch.optim whose argument names, order and defaults it has, if torch has it.
        sharded: How far it may be from one process.
    """

    optimizer: str
    variants: dict[str, Options]
    oracles: tuple[Oracle, ...]
    ndims: frozenset[int] = frozenset({0, 1, 2, 3})
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    observes: str | None = None
    first_update: int = 1
    alone: bool = False
    torch_class: type[torch.optim.Optimizer] | None = None
    sharded: Sharded

    def limit(self, repeated: bool) -> float:
        """Largest rel on a layout, whose shapes may be repeated."""
        stacks = self.sharded.stacks
        return stacks if repeated and stacks is not None else self.sharded.rel

    def accepted(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        """The shapes that this rule takes."""
        return {name: shape for name, shape in shapes.items() if len(shape) in self.ndims}


def observation(kind: str, shape: Shape, step: int) -> Tensor:
    """What an optimizer is shown of one parameter before a step: like its gradient ("like"), or one positive number per
    block of rows ("row")."""
    generator = torch.Generator().manual_seed(1000 + step)
    if kind == "like":
        return torch.randn(shape, generator=generator)
    rows = prod(shape[:-1])
    return 300 * torch.rand(next(blocks for blocks in (4, 3, 2, 1) if rows % blocks == 0), generator=generator)


def show(optimizer: Any, name: str, params: Mapping[str, nn.Parameter], step: int) -> None:
    """Let an optimizer of one rule observe what belongs before this step."""
    kind = rule_class(optimizer.param_groups[0]["rule"]).observes[name]
    found = {key: observation(kind, tuple(param.shape), step) for key, param in params.items()}
    if kind == "row":
        optimizer.observe(name, found)
        return
    for key, param in params.items():
        param.grad = found[key]
    optimizer.observe(name)


@cache
def collect() -> dict[str, Case]:
    """All cases, by the name of their module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").CASE for name in names}


def public(cls: Callable[..., torch.optim.Optimizer], translate: Callable[[Options], Options] = dict) -> Reference:
    """Make a reference of a public optimizer; `translate` turns our options into its."""

    def run(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
        param = nn.Parameter(weight.clone())
        optimizer = cls([param], **translate(options))
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        return param.detach()

    return run


def against(
    cls: type[torch.optim.Optimizer], translate: Callable[[Options], Options] = dict, **settings: Any
) -> Oracle:
    """A public optimizer as an oracle with the name of its package; `translate` turns our options into its."""
    return Package(name=cls.__module__.partition(".")[0], run=public(cls, translate), **settings)


def without(*names: str) -> Callable[[Options], Options]:
    """Options less those that a public class does not have."""
    return lambda options: {name: value for name, value in options.items() if name not in names}
