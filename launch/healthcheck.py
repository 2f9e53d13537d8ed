"""One step of Muon and AdamW on a small model: exits with 0 if weights move. For the container's health check.

python launch/healthcheck.py [cpu|cuda]
"""

import sys

import torch
from torch import nn

import distopt


def main(device: str) -> None:
    """Take the step.

    Raises:
        RuntimeError: the device is not there.
        SystemExit: a weight is as it was, or not finite.
    """
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(device)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = distopt.create_optimizer("muon", model, lr=1e-2)
    model(torch.randn(8, 16, device=device)).square().mean().backward()
    optimizer.step()
    for old, (name, param) in zip(before, model.named_parameters()):
        if torch.equal(old, param) or not param.isfinite().all():
            sys.exit(f"{name} did not move, or is not finite")
    print(f"distopt {distopt.__version__}, torch {torch.__version__}: a step on {device}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
