"""States of bitsandbytes' 8-bit optimizers, as their state dicts hold them, in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NESTED = "__bnb_optimizer_quant_state__"
"""Where recent versions put everything but codes, so that torch's checkpoint path leaves it alone."""


def from_bitsandbytes(entry: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """One parameter's states under the names that a rule gives them; what is not bitsandbytes' comes back as it is.

    Args:
        entry: "state1" and "state2", uint8 with "qmap" (256 values) and "absmax" (one per block of consecutive elements),
            or fp32 for small parameters.
        names: the rule's states in the order of bitsandbytes': first moment, second moment.
    """
    if "state1" not in entry and NESTED not in entry:
        return entry
    flat = {**entry, **entry.get(NESTED, {})}
    found: dict[str, Any] = {"step": flat["step"]} if "step" in flat else {}
    for number, name in enumerate(names, start=1):
        value = flat.get(f"state{number}")
        if value is not None:
            found[name] = _decode(value, flat.get(f"qmap{number}"), flat.get(f"absmax{number}"))
    return found


def _decode(codes: Tensor, qmap: Tensor | None, absmax: Tensor | None) -> Tensor:
    if qmap is None or absmax is None or codes.is_floating_point():
        return codes.float()
    values = qmap.float()[codes.long().view(-1)]
    block = 1
    while -(-values.numel() // block) > absmax.numel():
        block *= 2
    scales = absmax.float().view(-1).repeat_interleave(block)[: values.numel()]
    return (values * scales).view(codes.shape).to(torch.float32)
