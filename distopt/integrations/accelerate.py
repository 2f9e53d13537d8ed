"""Accelerate: one line that is right under every plugin.

    accelerator = Accelerator(…)
    optimizer = distopt.integrations.accelerate.create_optimizer("muon", model, lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Needs `accelerate>=1.13`: `pip install 'distopt[accelerate]'`. The script is the same for one process, DDP, FSDP2 and
DeepSpeed, whichever `accelerate launch` was told to use: under the DeepSpeed plugin the line builds what
`distopt.integrations.deepspeed.optimizer` does, with the plugin's config checked, and elsewhere what
`distopt.create_optimizer` does. Options are those of `distopt.create_optimizer`.

Without DeepSpeed no line of this module is needed: `prepare` takes any optimizer of this package, those made by
`distopt.create_optimizer(name, model, …)` and `distopt.AdamW(model.parameters(), …)` alike. Under DeepSpeed those are an
error on the first step; with offloaded states Accelerate puts DeepSpeed's Adam in their place, as it does with any optimizer,
and says nothing. Nothing is allocated before the model is sharded; layouts are read on the first step.

| | one process | DDP | FSDP2 | DeepSpeed 0, 1, 2, 3 | FSDP1 |
| --- | --- | --- | --- | --- | --- |
| training, 2 and 3 ranks | as without Accelerate | as one process | as one process | as one process | no |
| `accumulate`, `clip_grad_norm_` | yes | yes | yes | yes; clipping is `gradient_clipping` of the config | |
| `mixed_precision="bf16"` | yes | yes | yes | yes | |
| `save_state`, `load_state`, same world size | bit-identical | bit-identical | bit-identical | bit-identical | |

**Not supported.** FSDP1 (`fsdp_version=1`): parameters are flattened when `prepare` wraps the model, after the optimizer was
built; it is an error on the first step. Wrap the model in FSDP1 yourself, and build the optimizer then (`distopt.layouts`). Under
DeepSpeed what the page of `distopt.integrations.deepspeed` excludes. The states of DDP's replicas are on every rank; given
`process_group=`, they are divided, and saved with `distopt.checkpoint.save` in the place of `save_state`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distopt import build
from distopt.integrations import deepspeed
from distopt.rule import require

try:
    from accelerate.state import AcceleratorState
except ImportError as error:
    raise ImportError(
        f"distopt.integrations.accelerate needs accelerate >= 1.13; pip install 'distopt[accelerate]' ({error})"
    ) from error


def create_optimizer(name: str, model: nn.Module, *, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Build the optimizer to hand to `accelerator.prepare`.

    Args:
        name: of a rule, as in `distopt.list_optimizers()`.
        model: before `accelerator.prepare`.
        lr: learning rate of all groups, in the rule's units.
        options: of `distopt.create_optimizer`.

    Raises:
        ValueError: there is no Accelerator yet; as `distopt.create_optimizer`; under DeepSpeed as
            `distopt.integrations.deepspeed.optimizer`.
    """
    require(
        bool(AcceleratorState._shared_state),
        "make the Accelerator before the optimizer: its plugin decides what the optimizer will be handed",
    )
    plugin = AcceleratorState().deepspeed_plugin
    if plugin is None:
        return build.create_optimizer(name, model, lr=lr, **options)
    config = plugin.deepspeed_config
    # With offloaded states Accelerate puts DeepSpeed's Adam in the place of any other optimizer, unless this says not to.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return deepspeed.optimizer(name, model, config=config, lr=lr, **options)
