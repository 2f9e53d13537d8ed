"""create_optimizer: routes a model's parameters to rules by the role of their modules."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from distopt.classes import optimizer_class
from distopt.fused import known_splits
from distopt.layouts import declare_fsdp1, global_shape
from distopt.names import strip_prefixes
from distopt.optimizer import Optimizer
from distopt.options import ENGINE_OPTIONS
from distopt.plan.split import parse_split
from distopt.quasi_newton import DRIVERS, driver_class
from distopt.rule import Rule, require
from distopt.rules import RULES, nearest, rule_class

HEADS = {"lm_head", "head", "heads", "embed_out", "score", "classifier", "output_layer", "unembed"}
HIDDEN_MODULES = (nn.Linear, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Route:
    """Where one parameter goes and why."""

    name: str
    param: Tensor
    hidden: bool
    decays: bool
    why: str
    split: str | None = None


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    rest: str = "adamw",
    rest_options: dict[str, Any] | None = None,
    select: Callable[[str], bool] | None = None,
    find_splits: bool = True,
    per_head: bool = False,
    **options: Any,
) -> Optimizer:
    """Build an optimizer for a model, each parameter with the rule that its role asks for.

    A rule that wants whole matrices gets the weights of hidden linear layers, 2-D and 3-D convolutions and experts;
    embeddings, the output head, norms, biases, scalars and what else there is go to `rest`. Other rules get everything.
    Norms, biases and scalars are not decayed. Tied weights are taken once, as what they are first. The model may be
    sharded before or after.

    Fused projections of known transformers models (`distopt.fused`: GPT-2, GPT-NeoX, Bloom, Falcon, Phi-3, GLM, experts)
    are split into logical matrices for rules that see matrices, and weights that are stored transposed are read so.

    Args:
        name: as in `distopt.list_optimizers()`. Those of `distopt.quasi_newton` take every parameter, in one group.
        lr, weight_decay: of all groups, unless `rest_options` says otherwise.
        rest: the rule for what a matrix rule does not take.
        rest_options: that rule's options.
        select: whether a matrix rule takes the weight of this name, of those that it could take; all of them by default.
        find_splits: look for such weights; not done where `split` is given, which is for all weights of the rule.
        per_head: give every head of attention a matrix of its own as well. Rules with a moment per head (adam_mini) always
            do so for queries and keys.
        options: the rule's options, and the keyword-only ones that all optimizers have.

    Returns:
        The optimizer; `.routing` explains, parameter by parameter.

    Raises:
        ValueError: no parameter is for the matrix rule, `select` is given to another one, or an option or name is not
            known.
    """
    if name in DRIVERS:
        return _create_driver(name, model, lr, weight_decay, options)
    require(
        name in RULES,
        f"no optimizer is called {name!r}{nearest(name, [*RULES, *DRIVERS])} (known: {', '.join([*RULES, *DRIVERS])})",
    )
    engine = {key: options.pop(key) for key in list(options) if key in ENGINE_OPTIONS}
    groups, own, routing = parameter_groups(
        name,
        model,
        lr=lr,
        weight_decay=weight_decay,
        rest=rest,
        rest_options=rest_options,
        select=select,
        find_splits=find_splits,
        per_head=per_head,
        **options,
    )
    optimizer = optimizer_class(name)(groups, **own, **engine)
    optimizer.attach_model(weakref.ref(model))
    if rule_class(name).modes:
        model.register_forward_pre_hook(_ModeGuard(weakref.ref(optimizer)))
    optimizer.routing = routing
    return optimizer


def _create_driver(name: str, model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]) -> Any:
    """A quasi-Newton method on all trainable parameters of a model that is sharded already."""
    require(
        not weight_decay,
        f"weight_decay={weight_decay}: {DRIVERS[name]} minimizes what the closure returns; add it to the closure's loss",
    )
    named = [(strip_prefixes(key), param) for key, param in model.named_parameters() if param.requires_grad]
    return driver_class(DRIVERS[name])(named, lr=lr, **options)


def parameter_groups(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    rest: str = "adamw",
    rest_options: dict[str, Any] | None = None,
    select: Callable[[str], bool] | None = None,
    find_splits: bool = True,
    per_head: bool = False,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[tuple[str, str, str]]]:
    """What `create_optimizer` makes an optimizer of: its groups, the rule's own options, the routing. The model may be on
    the meta device.

    Raises:
        ValueError: no parameter is for the matrix rule, or a name is not known.
    """
    require(
        isinstance(model, nn.Module),
        f"create_optimizer takes the model itself, whose modules say what each parameter is for, got {type(model).__name__}",
    )
    rule = rule_class(name)
    matrix = rule.reach == "matrix"
    declare_fsdp1(model)
    routes = list(_routes(model))
    if select is not None:
        if not matrix:
            raise ValueError(f"select has no meaning for {name}, which takes every parameter; leave it out")
        if not any(route.hidden and select(route.name) for route in routes):
            takes = [route.name for route in routes if route.hidden]
            raise ValueError(f"select chooses none of the weights that {name} could take, such as {takes[:5]}")
        routes = [
            replace(route, hidden=False, why=f"{route.why}, not selected")
            if route.hidden and not select(route.name)
            else route
            for route in routes
        ]
    if find_splits and "split" not in options:
        routes = _with_splits(rule, model, routes, per_head=per_head)
    if matrix and not any(route.hidden for route in routes):
        raise ValueError(
            f"no parameter of this {type(model).__name__} is for {name}: it takes the weights of hidden linear layers; "
            f"use rest's rule ({rest!r}) alone instead"
        )
    if rest_options and not matrix:
        warnings.warn(f"rest_options are ignored: {name} takes every parameter itself", stacklevel=3)
    own = {**getattr(rule, "create_defaults", {}), **options, "lr": lr, "weight_decay": weight_decay}
    known = {f.name for f in fields(rule)}
    own = {key: value for key, value in own.items() if key in known or key in options}
    other = {"rule": rest, "lr": lr, "weight_decay": weight_decay, **(rest_options or {})} if matrix else {}
    without_decay = {each for each in (name, *([rest] if matrix else [])) if not _has(each, "weight_decay")}
    if rest in without_decay:
        other.pop("weight_decay", None)
    if weight_decay and without_decay:
        warnings.warn(f"weight_decay={weight_decay} is ignored by {', '.join(sorted(without_decay))}", stacklevel=3)
    groups = []
    for hidden in (True, False):
        for decays in (True, False):
            chosen = [route for route in routes if (route.hidden or not matrix) == hidden and route.decays == decays]
            for split in dict.fromkeys(route.split for route in chosen):
                members = [(route.name, route.param) for route in chosen if route.split == split]
                group: dict[str, Any] = {"params": members, **({"split": split} if split else {})}
                group.update({} if hidden else other)
                if not decays and (name if hidden else rest) not in without_decay:
                    group["weight_decay"] = 0.0
                groups.append(group)
    return groups, own, [(route.name, name if route.hidden or not matrix else rest, route.why) for route in routes]


def _with_splits(rule: type[Rule], model: nn.Module, routes: list[Route], *, per_head: bool) -> list[Route]:
    """The routes with the splits that are known, for rules to which they make a difference."""
    named = set(getattr(rule(), "whole_parts", ()))
    if rule.reach == "elementwise" or (rule.reach == "reduce" and not (named or per_head)):
        return routes
    found = known_splits(model, per_head=per_head or bool(named))
    if named:  # what has no such part is not cut: its moments are per row anyway
        for key, words in list(found.items()):
            if not named & {part.name for part in parse_split(words).parts}:
                found[key] = "transposed" if "transposed" in words.split() else ""
    return [
        replace(route, split=found[route.name], why=f"{route.why}; split: {found[route.name]}")
        if found.get(route.name) and (route.hidden or rule.reach != "matrix")
        else route
        for route in routes
    ]


class _ModeGuard:
    """Refuses to evaluate a model while it has the weights that are trained, which are not those to evaluate."""

    def __init__(self, optimizer: Callable[[], Optimizer | None]) -> None:
        self.optimizer = optimizer

    def __reduce__(self) -> Any:  # a copy of the model is nobody's
        return _ModeGuard, (_nobody,)

    def __call__(self, model: nn.Module, args: Any) -> None:
        optimizer = self.optimizer()
        if not model.training and optimizer is not None and any(g.get("train_mode") for g in optimizer.param_groups):
            raise ValueError(
                "this model is in eval mode, but its weights are those that are trained: call optimizer.eval() before "
                "evaluating, and optimizer.train() before the next step"
            )


def _nobody() -> None:
    return None


def _has(rule: str, option: str) -> bool:
    return any(f.name == option for f in fields(rule_class(rule)))


def _routes(model: nn.Module) -> Iterator[Route]:
    """Every trainable parameter once, with its role."""
    heads = _output_modules(model)
    tables = (nn.Embedding, nn.EmbeddingBag)
    embeddings = {id(p) for m in model.modules() if isinstance(m, tables) for p in m.parameters(recurse=False)}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, param in module.named_parameters(prefix, recurse=False):
            if id(param) in seen or not param.requires_grad:
                continue
            seen.add(id(param))
            name = strip_prefixes(key)
            *path, leaf = name.split(".")
            words = leaf.split("_")
            shape = global_shape(param)
            if id(param) in embeddings or "embed" in leaf or {"pos", "token", "cls"} & set(words):
                yield Route(name, param, False, len(shape) > 1 and "bias" not in name, "embedding")
            elif "Norm" in type(module).__name__ or "bias" in words:
                yield Route(name, param, False, False, "norm or bias")
            elif id(module) in heads or (path and (path[0] in HEADS or path[-1] in HEADS)):
                yield Route(name, param, False, len(shape) > 1, "output head")
            elif len(shape) < 2 or sorted(shape)[-2] == 1:
                yield Route(name, param, False, False, "vector or scalar")
            elif isinstance(module, HIDDEN_MODULES) or type(module).__name__ == "Conv1D":
                yield Route(name, param, True, True, f"weight of a hidden {type(module).__name__}")
            elif len(shape) == 2 or (len(shape) == 3 and not isinstance(module, nn.Conv1d)):
                yield Route(name, param, True, True, f"matrices of a {type(module).__name__}")
            else:
                yield Route(name, param, False, True, f"{len(shape)}-D weight of a {type(module).__name__}")


def model_of_shapes(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A skeleton with parameters of these names and shapes on the meta device; what is called embed…, wte or wpe is an
    embedding."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for depth, part in enumerate(path):
            if part not in module._modules:
                last = depth == len(path) - 1
                embeds = last and len(shape) == 2 and (part.startswith("embed") or part in ("wte", "wpe"))
                module.add_module(part, _Table() if embeds else nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


class _Table(nn.Embedding):
    """An embedding that gets its weight later."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def _output_modules(model: nn.Module) -> set[int]:
    """Modules that a transformers model names as its output embeddings, under any wrapper."""
    found = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            found.add(id(head))
    return found
