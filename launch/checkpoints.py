"""What a bit-exact resume needs beside model and optimizer.

distopt.checkpoint writes tensors of any layout; this adds the position, the schedule and the random number generators.
"""

import base64
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, by the names that distopt.checkpoint.latest looks for."""
    return directory / f"step-{step:09d}"


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group, as the settings of this run made them."""
    return [
        {key: group[key] for key in group if key not in ("params", "param_names")} for group in optimizer.param_groups
    ]


def keep_options(optimizer: torch.optim.Optimizer, options: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Put this run's options back after a load, which brings the checkpoint's; a warning names those that differ.

    The learning rate always differs, as the schedule moves it.
    """
    for index, (group, mine) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        for name, value in mine.items():
            if name != "lr" and group[name] != value:
                warnings.warn(
                    f"checkpoint '{path}' was trained with {name}={group[name]!r} in parameter group {index}; "
                    f"this run goes on with its own setting, {value!r}",
                    stacklevel=2,
                )
        group.update(mine)


def rng_states(device: torch.device) -> dict[str, list[str]]:
    """The generator states of all ranks, in rank order, as base64; collective."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        name: [base64.b64encode(row).decode() for row in _gather_bytes(state, device)] for name, state in states.items()
    }


def restore_rng(states: Mapping[str, list[str]], device: torch.device, *, reseed: int) -> None:
    """Put this rank's generators back.

    Saved by another number of ranks or on another kind of device, the states have no owner any more: the generators are
    then seeded with `reseed`, and a warning says so.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if len(states["cpu"]) != world or ("cuda" in states) != (device.type == "cuda"):
        warnings.warn(
            f"the checkpoint has the random number generators of {len(states['cpu'])} process(es) "
            f"{'with' if 'cuda' in states else 'without'} GPU, now {world} run on {device.type}: they are seeded anew "
            "(the data order is not affected)",
            stacklevel=2,
        )
        torch.manual_seed(reseed)
        return
    torch.set_rng_state(_decode(states["cpu"][rank]))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_decode(states["cuda"][rank]), device)


def require(extra: Mapping[str, Any], path: Path, *names: str) -> list[Any]:
    """The named entries of a checkpoint.

    Raises:
        ValueError: when one is absent: the run would continue with a fresh one and be another run.
    """
    for name in names:
        if name not in extra:
            raise ValueError(
                f"checkpoint '{path}' holds no '{name}', so the run cannot continue exactly; "
                "start a new run from its weights with model.from_dir, or use another checkpoint"
            )
    return [extra[name] for name in names]


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue at a position that means something else under the present data settings.

    Raises:
        ValueError: naming what differs, with both values.
    """
    for name, value in now.items():
        if name not in saved or saved[name] != value:
            raise ValueError(
                f"checkpoint '{path}' was trained with {name}={saved.get(name)!r}, now it is {value!r}: its position "
                "in the data would mean something else; restore the setting, or start a new run with model.from_dir"
            )


def _gather_bytes(state: torch.Tensor, device: torch.device) -> list[bytes]:
    if not dist.is_initialized():
        return [state.numpy().tobytes()]
    mine = state.to(device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [row.cpu().numpy().tobytes() for row in rows]


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
