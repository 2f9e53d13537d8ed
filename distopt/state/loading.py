"""State dicts in: torch.optim's format, ours, and what torch's distributed checkpoint hands over.

Everything is matched and checked before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.layouts import Sharded, local_tensor
from distopt.plan.geometry import READING
from distopt.state.counters import Counters
from distopt.state.faces import Faces
from distopt.state.foreign import from_bitsandbytes
from distopt.state.units import MASTER
from distopt.state.windows import Window

Write = Callable[[], None]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What bitsandbytes calls state1 and state2, in the rules that both have."""
NOT_OURS = {"foreach", "capturable", "differentiable", "fused", "maximize", "decoupled_weight_decay"}
"""What torch.optim keeps in groups and this package does not."""


def load_state_dict(
    groups: list[dict[str, Any]],
    names: list[list[str]],
    faces: list[Faces],
    counters: list[Counters],
    saved: dict[str, Any],
) -> None:
    """Load `saved` into bound groups. Collective where states travel to owners.

    Args:
        groups: the optimizer's param_groups; hyperparameters are taken over from `saved`.
        names: names of the parameters of each group.
        faces: the faces of each group.
        counters: the step counters of each group.
        saved: {"state": {index: {name: value}}, "param_groups": [...]}. A parameter without an entry keeps its state:
            torch's checkpoint path leaves out frozen ones.

    Raises:
        ValueError: what is missing, unexpected, or of another shape, dtype or mesh. Nothing has been changed.
    """
    saved_groups = saved["param_groups"]
    _check_groups(groups, saved_groups)
    writes: list[Write] = []
    travelling: list[dict[int, dict[str, Tensor]]] = []
    counted: list[list[int]] = []
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups)):
        order = match_parameters(number, names[number], saved_group, named=group.get("param_names") is not None)
        values: dict[int, dict[str, Tensor]] = {}
        ages = list(counters[number].ages)
        for position, index in enumerate(order):
            entry = from_bitsandbytes(saved["state"].get(index) or {}, MOMENTS)
            if not entry:
                param = faces[number].windows[position].param
                if saved["state"] and param.requires_grad and ages[position]:
                    raise ValueError(
                        f"{names[number][position]!r}: the state dict has no state for it, while this optimizer has; "
                        "to start afresh build a new optimizer"
                    )
                continue
            # torch's SGD and Muon keep no counter: that there is a state says that there was a step.
            ages[position] = int(entry.get("step", 1))
            found = {name: value for name, value in entry.items() if name != "step"}
            writes += _check_parameter(faces[number], position, names[number][position], found, values)
        counted.append(ages)
        travelling.append(values)
    for write in writes:
        write()
    for group_faces, values in zip(faces, travelling):
        if values:
            group_faces.read(values)
    for counter, ages in zip(counters, counted):
        counter.assign(ages)
    _take_over(groups, saved_groups)


def load_groups(
    groups: list[dict[str, Any]], names: list[list[str] | None], saved_groups: list[dict[str, Any]]
) -> None:
    """Load the hyperparameters of a state dict without states; `names` are None for bare tensors.

    Raises:
        ValueError: other groups, rules or parameters.
    """
    _check_groups(groups, saved_groups)
    for number, (group, given, saved_group) in enumerate(zip(groups, names, saved_groups)):
        match_parameters(number, given or [""] * len(group["params"]), saved_group, named=given is not None)
    _take_over(groups, saved_groups)


def _check_groups(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}")
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups)):
        if saved_group.get("rule", group["rule"]) != group["rule"]:
            raise ValueError(f"group {number} was saved by rule {saved_group['rule']!r}, here it is {group['rule']!r}")
        check_reading(number, group, saved_group)


def _take_over(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups)):
        # Schedulers keep numbers of theirs in groups; everything comes back but what has no meaning here.
        taken = {k: v for k, v in saved_group.items() if k not in NOT_OURS and not is_own(k)}
        log_changes(number, group, taken)
        group.update(taken)


def is_own(option: str) -> bool:
    """Whether a group keeps its own value of an option: whatever the codec that states were saved under, and the layout that
    they were planned for, they load into these."""
    own = ("params", "param_names", "rule", "strategy", "packed", "wire_dtype", "offload")
    return option in own or option.endswith("_codec")


def log_changes(number: int, group: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Say (logger "distopt") which hyperparameters of a group a load changes: those of the state dict hold. What schedulers
    move is only worth an INFO."""
    for key, value in taken.items():
        before = tuple(group[key]) if isinstance(group.get(key), list) else group.get(key)
        after = tuple(value) if isinstance(value, list) else value
        if key in group and key not in ("params", "param_names") and before != after:
            level = logging.INFO if key in ("lr", "initial_lr", "train_mode") else logging.WARNING
            logging.getLogger("distopt").log(
                level, "group %d: %s was %r here and is %r now, as it was saved", number, key, before, after
            )


def check_reading(number: int, group: dict[str, Any], saved_group: dict[str, Any]) -> None:
    """Refuse states of other matrices than those that a group has here.

    Raises:
        ValueError: the group was saved with another split or other blocks.
    """
    for key in READING:
        both = (saved_group.get(key, group.get(key)), group.get(key))
        there, here = (
            tuple(value) if isinstance(value, list) else value for value in both
        )  # as JSON gives tuples back
        if there != here:
            raise ValueError(
                f"group {number} was saved with {key}={there!r}, here it has {here!r}: its states are of "
                "other matrices; build the optimizer as it was saved"
            )


def match_parameters(number: int, here: list[str], saved_group: dict[str, Any], *, named: bool) -> list[Any]:
    """The saved index of each parameter of a group: by name where both sides have names (`named`: this one does), by
    position otherwise."""
    indices = saved_group["params"]
    there = saved_group.get("param_names")
    if there is None or not named:
        if len(indices) != len(here):
            raise ValueError(f"group {number} has {len(here)} parameters, the state dict has {len(indices)}")
        return list(indices)
    by_name = dict(zip(there, indices))
    missing = [name for name in here if name not in by_name]
    extra = [name for name in by_name if name not in here]
    if missing or extra:
        raise ValueError(
            f"group {number}: the state dict lacks {missing[:5]} and has {extra[:5]} besides "
            f"({len(missing)} missing, {len(extra)} unexpected)"
        )
    return [by_name[name] for name in here]


def _check_parameter(
    faces: Faces, position: int, name: str, found: dict[str, Any], values: dict[int, dict[str, Tensor]]
) -> list[Write]:
    """Writes for one parameter, after its values have been found to fit; what travels is put into `values`."""
    declared = faces.declared(position)
    if 0 in faces.windows[position].spec.layout.shape:
        return []
    if MASTER in declared and MASTER not in found:
        # A state dict without master weights (torch's, or of master_codec="none"): they are the parameter's.
        found = {**found, MASTER: faces.parameter(position)}
    if MASTER not in declared:
        found = {key: value for key, value in found.items() if key != MASTER}
    if set(found) - set(declared) or set(declared) - set(found):
        raise ValueError(
            f"{name!r}: the state dict has states {sorted(found)}, {type(faces.rule).__name__} keeps {sorted(declared)}"
        )
    writes: list[Write] = []
    live = {**faces.here(position), **faces.placeholders(position)}
    for key, state in declared.items():
        value = found[key]
        if not isinstance(value, Tensor) or value.is_complex():
            raise ValueError(f"{name!r}: state {key!r} is {type(value).__name__}, expected a tensor")
        shape = faces.face_shape(position, key)
        window = faces.windows[position]
        if faces.travels(position, state):
            local = _local_part(value, shape, faces.face_layout(position, key), window, name, key)
            values.setdefault(position, {})[key] = local
            continue
        if faces.gathers(position, state):
            whole = local_tensor(value)
            if tuple(whole.shape) != shape:
                raise ValueError(f"{name!r}: state {key!r} has shape {tuple(value.shape)}, expected {shape}")
            values.setdefault(position, {})[key] = whole
            continue
        target = local_tensor(live[key])
        source = fitting(value, live[key], shape, name, key)
        if target.is_meta:
            values.setdefault(position, {})[key] = source
            continue
        writes.append(lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
    return writes


def fitting(value: Tensor, live: Tensor, shape: tuple[int, ...], name: str, key: str) -> Tensor:
    """The part of `value` that belongs into the local tensor of `live`."""
    if isinstance(value, DTensor):
        if isinstance(live, DTensor) and value.shape != live.shape:
            raise ValueError(f"{name!r}: state {key!r} has shape {tuple(value.shape)}, expected {shape}")
        if (
            not isinstance(live, DTensor)
            or value.device_mesh != live.device_mesh
            or value.placements != live.placements
        ):
            raise ValueError(
                f"{name!r}: state {key!r} comes with mesh {value.device_mesh} and placements {value.placements}, here it "
                f"is {live.placements if isinstance(live, DTensor) else 'a plain tensor'}; reshard it through "
                "torch.distributed.checkpoint or the native checkpoint"
            )
        return local_tensor(value)
    target = local_tensor(live)
    if isinstance(live, DTensor) and tuple(value.shape) == shape:
        axes = _sharding_layout(live)
        return value[tuple(slice(start, stop) for start, stop in axes)]
    if value.shape != target.shape:
        raise ValueError(f"{name!r}: state {key!r} has shape {tuple(value.shape)}, expected {shape}")
    return value


def _sharding_layout(live: DTensor) -> tuple[tuple[int, int], ...]:
    from distopt.layouts.dtensor import dtensor_layout

    layout = dtensor_layout(live)
    rank = live.device_mesh.mesh[tuple(live.device_mesh.get_coordinate() or ())].item()
    return layout.box(layout.ranks.index(int(rank)))


def _local_part(value: Tensor, shape: tuple[int, ...], layout: Sharded, window: Window, name: str, key: str) -> Tensor:
    """The rows of a state that lives with owners which this rank's face holds."""
    box = layout.box(window.spec.index)
    if isinstance(value, DTensor):
        local = local_tensor(value)
        expected = tuple(stop - start for start, stop in box)
        if tuple(value.shape) != shape or (tuple(local.shape) != expected and local.numel() + _numel(expected) > 0):
            raise ValueError(
                f"{name!r}: state {key!r} is a DTensor of shape {tuple(value.shape)} with local shape {tuple(local.shape)}, "
                f"expected {shape} with {expected}"
            )
        return local
    if tuple(value.shape) == shape:
        return value[tuple(slice(start, stop) for start, stop in box)]
    if value.numel() == _numel(tuple(stop - start for start, stop in box)):  # a flat face, as flat shards have
        return value
    raise ValueError(f"{name!r}: state {key!r} has shape {tuple(value.shape)}, expected {shape}")


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
