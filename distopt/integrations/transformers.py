"""The Transformers Trainer: what to write, what is supported and what is not. (Accelerate: `distopt.integrations.accelerate`.)

Needs `transformers>=5.2` and `accelerate>=1.13`: `pip install 'distopt[transformers]'`.

**Trainer, from Python.** One argument, and the Trainer's parameter groups, sharding and checkpoints as before:

    trainer = Trainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=distopt.integrations.transformers.optimizer("muon", lr=3e-3, weight_decay=0.1),
    )

The options are those of `distopt.create_optimizer`, which routes the parameters: hidden matrices to the matrix rule,
embeddings, head, norms, biases and scalars to AdamW (`rest=`, `rest_options=`); norms and biases are not decayed. The
Trainer hands such a factory nothing of TrainingArguments, so that learning rate and weight decay are given here.

**Trainer, by name.** After `distopt.integrations.transformers.register()`, `optim="distopt_muon"` and the other rules
of `distopt.list_optimizers()` work in TrainingArguments, as `--optim` on the command line and in config files:

- `_8bit` at the end of a name keeps the states in 8 bits (`state_codec="int8"`), for the rules that can.
- `learning_rate` and `weight_decay` are those of all groups.
- `adam_beta1`, `adam_beta2` and `adam_epsilon` reach the rules that have them (of the matrices and of the rest) where
  they differ from their defaults in TrainingArguments; at those defaults a rule keeps its own. What no rule has is
  ignored with a warning.
- `optim_args="momentum=0.9,nesterov=false,rest=lion,rest.beta1=0.95"` are further options; `beta1`, `beta2`, … stand for
  the entries of `betas`, `rest.` for the options of the rest's rule. An unknown one is an error that names the nearest.
- `optim_target_modules` (names, a regular expression, or "all-linear") chooses the modules whose weights a matrix rule
  takes. For other rules, and where it matches nothing, it is an error.

`register` adds names to transformers' enum of optimizers, which it validates against; nothing is added without the call.
A process that unpickles TrainingArguments with such a name calls `register()` before.

| | one process | DDP | FSDP2 | DeepSpeed 0, 1, 2, 3 | FSDP1 |
| --- | --- | --- | --- | --- | --- |
| training, 2 and 3 ranks, both ways | as without a Trainer | as one process | as one process | as one process | an error |
| gradient accumulation, clipping, bf16 | yes | yes | yes | yes, by DeepSpeed | |
| resume, same world size | bit-identical | bit-identical | bit-identical | bit-identical | |
| states | here | on every rank | divided | divided (0: on every rank) | |
| `partition=True`, with `NativeCheckpoint` | | states divided | no need | refused, ZeRO 1 divides | |

**DeepSpeed.** `TrainingArguments(deepspeed="zero2.json")` and one of the ways above; both build what
`distopt.integrations.deepspeed.optimizer` does, and that page says what is and is not supported there: the config is checked
when the Trainer starts to train, after it has filled in what is "auto". The config has no section `optimizer`: two optimizers
are an error when the Trainer is made. FSDP2 is `fsdp_config={"version": 2, …}`.

**States divided over DDP's ranks.** The Trainer saves the optimizer on one rank, which under DDP is right only where
every rank has all states. `optimizer("muon", lr=…, partition=True)` divides them; a callback then writes them, with the
weights, in the package's own checkpoint beside the Trainer's files, on all ranks, and reads them back on resume:

    trainer = Trainer(…, callbacks=[distopt.integrations.transformers.NativeCheckpoint()])

**Not supported.** The Trainer under FSDP1, which is an error that names FSDP2; optimizers that need a closure (L-BFGS and its
kin), of which the Trainer has none; parameters on several devices (`device_map="auto"`); fp64; tensor, context and sequence
parallelism, which were not tried. With fp16 (read in the sources, not run) a skipped step is skipped on all ranks and not
counted, but the learning rate's schedule moves on, as with torch's fused optimizers: only the optimizer knows that it skipped.
Resume on another number of ranks was not tried; DeepSpeed's checkpoints do not do it. Old Trainers have faults of their own,
which no optimizer mends: 5.2 divides accumulated gradients by their number twice, and on a CPU does not resume on ranks.
"""

from __future__ import annotations

from typing import Any

try:
    import transformers.trainer_optimizer  # noqa: F401

    from distopt.integrations.trainer_factory import Factory, check_deepspeed, promise, refuse_two
    from distopt.integrations.trainer_names import register
    from distopt.integrations.trainer_states import NATIVE, NativeCheckpoint
except ImportError as error:
    raise ImportError(
        "distopt.integrations.transformers needs transformers >= 5.2 and accelerate >= 1.13; "
        f"pip install 'distopt[transformers]' ({error})"
    ) from error
from distopt.rules import rule_class

__all__ = ["NATIVE", "Factory", "NativeCheckpoint", "optimizer", "register"]


def optimizer(
    name: str, *, lr: float, target_modules: str | list[str] | None = None, partition: bool = False, **options: Any
) -> tuple[type[Factory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=…)` takes.

    Args:
        name: of a rule, as in `distopt.list_optimizers()`.
        lr: learning rate of all groups, in the rule's units.
        target_modules: the modules whose weights a matrix rule takes: parts of their names, a regular expression, or
            "all-linear"; None leaves it to their roles.
        partition: divide the states over DDP's ranks; needs the callback `NativeCheckpoint` to be saved.
        options: of `distopt.create_optimizer`: `weight_decay`, `rest`, `rest_options`, the rule's, and the keyword-only
            ones that all optimizers have.

    Raises:
        ValueError: there is no such rule (the nearest is named), or the DeepSpeed config has an optimizer of its own.
    """
    rule_class(name)
    check_deepspeed(name)
    refuse_two()
    return Factory, {
        "name": promise(name),
        "lr": lr,
        "target_modules": target_modules,
        "partition": partition,
        **options,
    }
