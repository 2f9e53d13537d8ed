"""What fine-tuning will use, before it starts, and how to make it fit a budget."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

import distopt

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How memory is spent. What is null is chosen so that the budget holds, the least costly measure first.

    Attributes:
        budget: bytes for everything below, such as 8GiB; null: as much as it takes.
        state_codec: how states are stored; null: fp32, or int8 where that does not fit. int4 is visibly inaccurate, so only
            if it is asked for.
        step_in_backward: step parameters as their gradients arrive, so that only the largest gradient is ever held. With
            optimizer.max_grad_norm or optimizer.nonfinite each step then takes two backward passes.
        activation_checkpointing: recompute activations in the backward pass.
        offload: where states lie that are not on the device, as of optimizers: cpu, cpu_step, disk:/path; null keeps them
            there, unless nothing else fits: then they are in pages in host memory, where there is a GPU and the memory for
            them, else in files in logging.dir.
    """

    budget: str | None = None
    state_codec: Literal["fp32", "bf16", "bf16_sr", "int8", "int4", "fp8"] | None = None
    step_in_backward: bool | None = None
    activation_checkpointing: bool | None = None
    offload: str | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen; and the bytes of it, by part."""

    state_codec: str
    step_in_backward: bool
    activation_checkpointing: bool
    offload: str | None
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def choose_memory(
    config: MemoryConfig,
    model: nn.Module,
    rule: str,
    options: Mapping[str, Any],
    *,
    sequences: int,
    length: int,
    gpu: bool,
    pages: Path,
) -> Choice:
    """The first choice that fits: as asked; int8 states; gradients released; activations recomputed; states in pages.

    Args:
        config: what is asked for.
        model: with what is trained requiring gradients.
        rule, options: as `distopt.create_optimizer` takes them.
        sequences, length: of one forward pass, in tokens.
        gpu: whether the budget is that of a GPU, beside which there is host memory.
        pages: the directory for states that fit nowhere else.

    Raises:
        ValueError: nothing fits; says what would, and how much it takes.
    """
    codecs = ["fp32", "int8"] if config.state_codec is None else [config.state_codec]
    chosen = Choice(codecs[0], bool(config.step_in_backward), bool(config.activation_checkpointing), config.offload, {})
    ladder = [chosen]
    if len(codecs) > 1:
        ladder.append(chosen := replace(chosen, state_codec=codecs[1]))
    if config.step_in_backward is None:
        ladder.append(chosen := replace(chosen, step_in_backward=True))
    if config.activation_checkpointing is None:
        ladder.append(chosen := replace(chosen, activation_checkpointing=True))
    if config.offload is None:
        host = gpu and distopt.state_bytes(rule, model, state_codec=chosen.state_codec, **options) < free_memory()
        ladder += [replace(chosen, offload=place) for place in (*["cpu"] * host, f"disk:{pages}")]
    budget = None if config.budget is None else parse_bytes(config.budget)
    for choice in ladder:
        parts = memory_parts(choice, model, rule, options, sequences=sequences, length=length, gpu=gpu)
        measured = replace(choice, parts=parts)
        if budget is None or measured.total <= budget:
            return measured
    table = ", ".join(f"{name} {count / 2**20:.1f} MiB" for name, count in measured.parts.items())
    raise ValueError(
        f"memory.budget={config.budget} cannot hold this: {measured.total / 2**20:.1f} MiB with state_codec="
        f"{measured.state_codec}, step_in_backward={measured.step_in_backward}, activation_checkpointing="
        f"{measured.activation_checkpointing}, offload={measured.offload} ({table}). Raise the budget to that, lower "
        "train.micro_batch_size or data.max_length, or train fewer parameters (method.kind=lora)"
    )


def memory_parts(
    choice: Choice, model: nn.Module, rule: str, options: Mapping[str, Any], *, sequences: int, length: int, gpu: bool
) -> dict[str, int]:
    """Bytes by part; all but the activations, which are an estimate, are those of the tensors that will be there."""
    trained = [param for param in model.parameters() if param.requires_grad]
    gradients = [param.nbytes for param in trained]
    states = partial(distopt.state_bytes, rule, model, state_codec=choice.state_codec, **options)
    host = choice.offload is not None and not gpu and not choice.offload.startswith("disk:")
    return {
        "parameters": sum(param.nbytes for param in model.parameters()),
        "gradients": max(gradients) if choice.step_in_backward else sum(gradients),
        "states": states(offload=choice.offload),
        **({"pages in the same memory": states()} if host else {}),
        "activations (estimate)": activation_bytes(model, sequences * length, choice.activation_checkpointing),
    }


def free_memory() -> int:
    """Bytes of host memory that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def activation_bytes(model: nn.Module, tokens: int, recomputed: bool) -> int:
    """An estimate: 34 bytes per token, layer and hidden unit in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, section
    4.1, without the attention matrix), twice that in fp32; 2 (or 4) and one layer's 34 where activations are recomputed;
    logits once as they are and twice in fp32."""
    config: Any = model.config
    width = next(model.parameters()).element_size()
    per_layer = tokens * config.hidden_size * 34 * width // 2
    kept = tokens * config.hidden_size * width
    layers = config.num_hidden_layers
    logits = tokens * config.vocab_size * (width + 8)
    return (layers * kept + per_layer if recomputed else layers * per_layer) + logits


def parse_bytes(text: str) -> int:
    """'8GiB' → 8589934592.

    Raises:
        ValueError: not a number with a unit.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"memory.budget={text!r}: expected a number and one of {', '.join(UNITS)}")
    return int(float(match[1]) * UNITS[match[2]])
