"""States divided over DDP's ranks, under the Transformers Trainer, which saves an optimizer on one rank: a callback writes
them on all ranks, in a checkpoint of this package's beside the Trainer's files, and reads them back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from distopt import checkpoint
from distopt.optimizer import Optimizer
from distopt.rule import require

NATIVE = "distopt_native"
"""Marks a state dict whose states are in a native checkpoint beside it; also the name of that checkpoint's directory."""


class StatesElsewhere(Optimizer):
    """An optimizer whose states are divided over replicas, so that the Trainer's file, written by one rank, holds the
    hyperparameters only."""

    written = False  # there is a NativeCheckpoint
    awaited = False  # hyperparameters were loaded, states not yet

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters, and a mark.

        Raises:
            ValueError: nobody writes the states.
        """
        if self._is_fresh():
            return super().state_dict()
        require(
            self.written,
            "states are divided over the ranks (partition=True), no rank has them all: add "
            "callbacks=[distopt.integrations.transformers.NativeCheckpoint()] to the Trainer",
        )
        self._stateless = True
        try:
            return {**torch.optim.Optimizer.state_dict(self), NATIVE: True}
        finally:
            self._stateless = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hyperparameters of a marked state dict, whose states `NativeCheckpoint` brings."""
        self.awaited = NATIVE in state_dict
        super().load_state_dict({key: value for key, value in state_dict.items() if key != NATIVE})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As Optimizer.step.

        Raises:
            ValueError: resumed without the states.
        """
        require(
            not self.awaited,
            f"hyperparameters were resumed, the states in '{NATIVE}' were not: add the callback NativeCheckpoint to the "
            "Trainer",
        )
        return super().step(closure)


def check_where_states_are(optimizer: Any, state_dict: dict[str, Any]) -> None:
    if NATIVE in state_dict:
        raise ValueError(
            f"this checkpoint was saved with partition=True, its states are in '{NATIVE}'; resume with partition=True on "
            "more than one rank, or load that directory with distopt.checkpoint.load"
        )


class NativeCheckpoint(TrainerCallback):
    """Writes a native checkpoint (weights and states, on all ranks) into each of the Trainer's checkpoints, and reads it
    back when the Trainer resumes. Does nothing where states are whole on every rank.

    Args:
        resume_from: the Trainer's checkpoint to resume from, where it is not `<output_dir>/checkpoint-<step>`.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the states, if the Trainer resumed.

        Raises:
            CheckpointError: there are none, or they do not fit; the same on every rank.
        """
        optimizer = _unwrapped(kwargs["optimizer"])
        if optimizer is None:
            return
        optimizer.written = True
        if optimizer.awaited:
            directory = Path(self.resume_from or _directory(args, state))
            checkpoint.load(directory / NATIVE, model=kwargs["model"], optimizer=optimizer)
            optimizer.awaited = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the states; collective.

        Raises:
            CheckpointError: the same on every rank.
        """
        optimizer = _unwrapped(kwargs["optimizer"])
        if optimizer is not None:
            checkpoint.save(_directory(args, state) / NATIVE, model=kwargs["model"], optimizer=optimizer)


def _unwrapped(optimizer: Any) -> StatesElsewhere | None:
    """The optimizer under Accelerate's wrapper, if its states are divided."""
    found = getattr(optimizer, "optimizer", optimizer)
    return found if isinstance(found, StatesElsewhere) else None


def _directory(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
