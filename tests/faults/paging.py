"""A run that pages its states to a directory: `python -m tests.faults.paging DIRECTORY` kills itself in its fourth step."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distopt
from distopt.state.pages.file import PageFile


def run(directory: Path, steps: int, *, killed: bool = False) -> list[torch.Tensor]:
    """Go on from the newest checkpoint, if there is one, to this number of steps; the weights. One that is to be `killed`
    dies in its last step, when some of its pages are written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 120), nn.Linear(120, 30))
    pages = f"disk:{directory / 'pages'}"
    optimizer = distopt.create_optimizer("soap", model, lr=1e-2, state_codec="int8", offload=pages)
    newest = distopt.checkpoint.latest(directory / "saved")
    first = 0
    if newest is not None:
        first = distopt.checkpoint.load(newest, model=model, optimizer=optimizer)["step"]
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        if killed and step == steps - 1:
            kill_in_third_write()
        optimizer.step()
        if step == 1:
            distopt.checkpoint.save(directory / "saved" / "2", model=model, optimizer=optimizer, extra={"step": 2})
    return [param.detach() for param in model.parameters()]


def kill_in_third_write() -> None:
    save, written = PageFile.save, []

    def save_or_die(*args: Any) -> None:
        save(*args)
        written.append(1)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    PageFile.save = save_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    run(Path(sys.argv[1]), 4, killed=True)
