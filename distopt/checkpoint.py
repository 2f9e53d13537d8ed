"""The native checkpoint of a model and its optimizer: logical tensors by fully qualified name.

What is written knows nothing of ranks, so that it loads on any layout and world size; on the same layout it continues
bit for bit. No pickle: safetensors and JSON (`distopt.state.files`).

In it are `model/<name>` (parameters and persistent buffers) and `state/<name>/<state>`. A statistic of rows is stored as
(rows of all logical matrices, 1), one of columns as (matrices, columns), a state that lives with owners as the matrices
stacked by rows; where a split makes matrices of several shapes, all of these are one flat run, matrix after matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.averaging import Average
from distopt.bound import Bound
from distopt.layouts import layout_of, reshard
from distopt.names import strip_prefixes
from distopt.quasi_newton.driver import QuasiNewton
from distopt.rule import Shape
from distopt.rules import group_rule
from distopt.state.agreement import Ranks
from distopt.state.faces import Faces
from distopt.state.files import Piece, check_writable, write
from distopt.state.loading import check_reading, is_own, log_changes
from distopt.state.manifest import CheckpointError
from distopt.state.parts import Part, is_primary, state_parts, tensor_parts
from distopt.state.reader import Reader, latest, prune
from distopt.state.units import MASTER

__all__ = ["CheckpointError", "check_writable", "latest", "load", "prune", "save"]


def save(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: Any,
    extra: dict[str, Any] | None = None,
    averages: Mapping[str, Average] | None = None,
) -> None:
    """Write a checkpoint directory; collective over all ranks of the default group.

    Args:
        path: directory to make; what is there is replaced once the new one is complete.
        model: whose parameters and persistent buffers are saved.
        optimizer: one of this package's.
        extra: JSON-able; comes back from `load` (schedule, data position, random number generators).
        averages: of this model's weights, by a name of your choice.

    Raises:
        CheckpointError: the same on every rank; what was there before is intact. Also in the middle of an accumulation, whose
            gradients would be lost.
        ValueError: a parameter of the optimizer is not in the model.
        TypeError: a quasi-Newton method.
    """
    bound = _bound(optimizer)
    with Ranks(None).together():
        if bound.accumulates():
            raise CheckpointError(
                "there are gradients that no step has taken yet, and a checkpoint has no gradients: save after "
                "optimizer.step(), or after optimizer.zero_grad() to drop them"
            )
    names = _names(model, bound)
    document = {
        "groups": [
            {
                "options": {k: v for k, v in group.items() if k not in ("params", "param_names")},
                "names": [names[id(param)] for param in group["params"]],
                "steps": counters.ages,
            }
            for group, counters in zip(optimizer.param_groups, bound.counters)
        ],
        "aliases": _aliases(model),
        "extra": extra or {},
        "averages": {label: average.num_updates for label, average in (averages or {}).items()},
    }
    document = _plain(document)
    everything = [*_parts(model, bound, names), *_average_parts(averages or {}, bound.rank)]
    parts = [part for part in everything if part.saves]
    pieces = (Piece(part.name, part.shape, part.rect, part.value()) for part in _once(parts))
    write(Path(path), pieces, document)


def _bound(optimizer: Any) -> Bound:
    if isinstance(optimizer, QuasiNewton):
        raise TypeError(
            f"distopt.checkpoint holds the states of rules, not the vectors of {type(optimizer).__name__}; torch's own "
            "checkpoint does: torch.distributed.checkpoint.save({'model': model.state_dict(), 'optimizer': "
            "get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path), which goes on bit for bit"
        )
    bound: Bound = optimizer._bind()
    return bound


def _once(parts: list[Part]) -> list[Part]:
    """What this rank is the first to have of what several ranks hold alike (replicas); collective. Empty parts stay: they
    tell of tensors without elements."""
    ranks = Ranks(None)
    keys = [f"{part.name} {part.rect}" if part.tensor.numel() else "" for part in parts]
    earlier = {key for listed in ranks.all_gather(keys)[: ranks.rank] for key in listed if key}
    return [part for part, key in zip(parts, keys) if key not in earlier]


def load(
    path: str | Path, *, model: nn.Module, optimizer: Any, averages: Mapping[str, Average] | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model and its optimizer, laid out in any way; collective.

    Hyperparameters of the groups are the checkpoint's. Everything is verified before anything is changed.

    Returns:
        What was passed to `save` as `extra`.

    Raises:
        CheckpointError: damaged or missing files, missing or unexpected tensors, shapes that differ, other groups.
        TypeError: a quasi-Newton method.
    """
    bound = _bound(optimizer)
    ranks = Ranks(None)
    with ranks.together():
        reader = Reader(Path(path))
    reader.verify(dist.group.WORLD if dist.is_initialized() else None)
    with ranks.together(), torch.no_grad():
        names = _names(model, bound)
        groups = reader.document["groups"]
        everything = [*_parts(model, bound, names), *_average_parts(averages or {}, bound.rank)]
        known = set(reader.names())
        parts = [part for part in everything if part.name in known or not part.name.endswith(f"/{MASTER}")]
        _check(reader, parts, groups, optimizer, names)
        values = [reader.read(part.name, part.rect) for part in parts]
    with torch.no_grad():
        decoded: dict[Faces, dict[tuple[int, int | None, str], Tensor]] = {}
        for part, value in zip(parts, values):
            if part.coded is not None:
                faces, key = part.coded
                window, flats = faces.windows[key[0]], decoded.setdefault(faces, {})
                if key not in flats:
                    numel = window.numel if key[1] is None else part.tensor.numel()
                    flats[key] = torch.empty(numel, device=window.param.device)
                flat = flats[key]
                part.within(flat).copy_(value.view(part.tensor.shape))
                continue
            part.tensor.copy_(value.view(part.tensor.shape))
            if part.copies_back is not None:
                target, staged = part.copies_back
                target.copy_(staged)
        for faces in bound.faces:
            found = decoded.get(faces, {})
            for number, window in enumerate(faces.windows):
                if faces.group.units.holds(number, MASTER):
                    found.setdefault((number, None, MASTER), window.weight().float())
            faces.group.units.write(found)
        for number, (group, saved, counters) in enumerate(zip(optimizer.param_groups, groups, bound.counters)):
            # Whatever the codec that it was saved under, it loads into this one's.
            options = {k: _restored(v) for k, v in saved["options"].items() if not is_own(k)}
            log_changes(number, group, options)
            group.update(options)
            ages = dict(zip(saved["names"], saved["steps"]))
            counters.assign([ages[names[id(param)]] for param in group["params"]])
    bound.watch()
    for label, average in (averages or {}).items():
        average.num_updates = reader.document["averages"][label]
    extra: dict[str, Any] = reader.document["extra"]
    reader.close()
    return extra


def _check(reader: Reader, parts: list[Part], groups: Any, optimizer: Any, names: dict[int, str]) -> None:
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, groups)):
        if saved["options"]["rule"] != group["rule"]:
            raise CheckpointError(
                f"group {number} was saved by rule {saved['options']['rule']!r}, here it is {group['rule']!r}"
            )
        try:
            check_reading(number, group, saved["options"])
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        options = {key: _restored(value) for key, value in saved["options"].items()}
        for shape in (Shape(1, 4, 1), Shape(4, 4)):
            there, ours = (set(group_rule({**group, **o}).states(shape)) for o in (options, {}))
            if there != ours:
                raise CheckpointError(
                    f"group {number} was saved with options that keep states {sorted(there)}, here it keeps {sorted(ours)}"
                )
        here = [names[id(param)] for param in group["params"]]
        if sorted(here) != sorted(saved["names"]):
            lacking, extra = sorted(set(here) - set(saved["names"])), sorted(set(saved["names"]) - set(here))
            raise CheckpointError(
                f"group {number}: the checkpoint lacks parameters {lacking[:5]} and has {extra[:5]} besides"
            )
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(f"the checkpoint has {len(groups)} groups, the optimizer {len(optimizer.param_groups)}")
    # Master weights that are there and not wanted are left; those that are wanted and not there are the parameters.
    known = {name for name in reader.names() if not name.endswith(f"/{MASTER}")}
    wanted = {part.name for part in parts if not part.name.endswith(f"/{MASTER}")}
    if known - wanted:
        raise CheckpointError(f"the checkpoint has {sorted(known - wanted)[:5]} besides ({len(known - wanted)} in all)")
    if wanted - known:
        raise CheckpointError(f"the checkpoint lacks {sorted(wanted - known)[:5]} ({len(wanted - known)} in all)")
    for part in parts:
        if tuple(reader.shape(part.name)) != part.shape:
            raise CheckpointError(f"{part.name} has shape {tuple(reader.shape(part.name))} there and {part.shape} here")
        if reader.dtype(part.name) != part.tensor.dtype:
            raise CheckpointError(f"{part.name} is {reader.dtype(part.name)} there and {part.tensor.dtype} here")


def _parts(model: nn.Module, bound: Bound, names: dict[int, str]) -> Iterator[Part]:
    """Everything that lies on this rank."""
    mine = {id(param) for param in bound.params}
    for name, param in model.named_parameters():
        if id(param) not in mine:
            yield from tensor_parts(f"model/{strip_prefixes(name)}", param, layout_of(param, bound.rank), bound.rank)
    persistent = {strip_prefixes(key) for key in model.state_dict()}
    for name, buffer in model.named_buffers():
        if strip_prefixes(name) in persistent:
            yield from tensor_parts(f"model/{strip_prefixes(name)}", buffer, layout_of(buffer, bound.rank), bound.rank)
    for group, faces in zip(bound.groups, bound.faces):
        for number, window in enumerate(group.windows):
            name = names[id(window.param)]
            # Parameters partitioned over replicas are whole in storage; their states are not.
            stored = layout_of(window.param, bound.rank)
            yield from tensor_parts(f"model/{name}", window.param, stored, bound.rank)
            primary = is_primary(window.param)
            for key, state in faces.declared(number).items():
                for part in state_parts(f"state/{name}/{key}", key, state, number, faces):
                    part.saves = part.saves and primary
                    yield part


def _average_parts(averages: Mapping[str, Average], rank: int) -> Iterator[Part]:
    for label, average in averages.items():
        for name, param, kept in average.tensors():
            yield from tensor_parts(f"average/{label}/{name}", kept, layout_of(param, rank), rank)


def _names(model: nn.Module, bound: Bound) -> dict[int, str]:
    """Fully qualified names by parameter identity; what the model does not know keeps the optimizer's name."""
    reshard(model)
    names = {id(param): strip_prefixes(name) for name, param in model.named_parameters()}
    for param, name in zip(bound.params, bound.names):
        if id(param) not in names:
            if getattr(param, "_distopt_flat", None) is None:
                raise ValueError(
                    f"the optimizer's parameter {name!r} is not in the model; pass the model it was built for"
                )
            names[id(param)] = name
    return names


def _aliases(model: nn.Module) -> dict[str, str]:
    """Other names of tied parameters."""
    first: dict[int, str] = {}
    aliases = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in first:
            aliases[strip_prefixes(name)] = first[id(param)]
        else:
            first[id(param)] = strip_prefixes(name)
    return aliases


def _restored(value: Any) -> Any:
    """The reverse of `_plain`, for options."""
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value


def _plain(value: Any) -> Any:
    """JSON-able: tuples become lists, dtypes and numbers plain ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor):
        return value.item()
    return value
