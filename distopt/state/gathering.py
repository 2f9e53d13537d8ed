"""Parameters that are partitioned over replicas, made whole again after a step."""

from __future__ import annotations

import torch

from distopt.comm.groups import Domains
from distopt.layouts import local_tensor
from distopt.plan.build import BUCKET_BYTES
from distopt.state.windows import Window


def gather(parted: list[Window], domains: Domains) -> None:
    """Make parameters that are partitioned over replicas whole again: every rank broadcasts what it updated."""
    chunk: list[Window] = []
    size = 0
    for window in parted:
        chunk.append(window)
        size += local_tensor(window.param).nbytes
        if size > BUCKET_BYTES or window is parted[-1]:
            _broadcast(chunk, domains)
            chunk, size = [], 0


def _broadcast(windows: list[Window], domains: Domains) -> None:
    domain = domains[windows[0].spec.layout.ranks]
    for dtype in sorted({window.param.dtype for window in windows}, key=str):
        members = [window for window in windows if window.param.dtype == dtype]
        flats = [window.whole_weight() for window in members]
        jobs = []
        for source in range(domain.size):
            views = [
                flat[window.spec.layout.cuts[source] : window.spec.layout.cuts[source + 1]]  # type: ignore[attr-defined]
                for flat, window in zip(flats, members)
            ]
            total = sum(view.numel() for view in views)
            if total:
                buffer = torch.cat(views) if source == domain.me else flats[0].new_empty(total)
                jobs.append((source, views, buffer, domain.broadcast(buffer, source)))
        for source, views, buffer, work in jobs:
            assert work is not None
            work.wait()
            if source != domain.me:
                torch._foreach_copy_(views, list(buffer.split([view.numel() for view in views])))
        for window in members:
            window.finish()
