"""Where states in host memory are stepped: on the device, for which their pages move there and back, or on the host, for
which gradients and weights move to it and weights back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distopt.plan.cost import Rates
from distopt.plan.tiles import BLOCK

STEPPED = "cpu_step"
"""The tier of pages that never leave the host; as a value of `offload`, all of an elementwise rule's."""


def seconds_per_element(codecs: Iterable[Any], itemsize: int, rates: Rates) -> tuple[float, float]:
    """Seconds of a step by moving pages, and by stepping on the host, of one element with states in these codecs.

    Pages move both ways at once. On the host what comes, what goes and what is computed overlap as well, so the slowest of
    them counts; memory there is read and written for states, weights and gradients, and for what comes and goes. It depends
    on no shape, so that every rank chooses alike.
    """
    states = sum(codec.bits / 8 + (4 / BLOCK if codec.scaled else 0) for codec in codecs)
    link = rates.host_link
    return states / link, max(2 * itemsize / link, (2 * states + 6 * itemsize) / rates.host_memory)


def is_stepped_there(codecs: Mapping[str, Any], itemsize: int, rates: Rates, asked: bool | None, gpu: bool) -> bool:
    """Whether a step of these states is taken on the host: as `asked`, or, beside a GPU, where the model says that it is
    faster."""
    if asked is not None:
        return asked
    pages, step = seconds_per_element(codecs.values(), itemsize, rates)
    return gpu and step < pages
