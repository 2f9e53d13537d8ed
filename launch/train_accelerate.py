"""Pretrain a small Llama with Accelerate and any optimizer of distopt, on one process, DDP, FSDP2 or DeepSpeed.

    torchrun --standalone --nproc-per-node 2 launch/train_accelerate.py --config configs/accelerate_tiny.yaml
    accelerate launch --config_file <of `accelerate config`> launch/train_accelerate.py --config configs/accelerate_tiny.yaml

Made to be copied and changed: the one line of distopt is that with `create_optimizer`, whatever Accelerate was told to use.
What is supported is said in distopt/integrations/accelerate.py. A run that is started again goes on from its checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

try:
    from accelerate import Accelerator
except ImportError:
    sys.exit("launch/train_accelerate.py needs Accelerate: pip install distopt[accelerate]")
from config import load_config
from data import DataConfig, load_corpora, training_starts, validation_starts
from model import ModelConfig, build_model, model_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distopt.integrations.accelerate
from distopt.comm.ending import leave


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run; sharding and precision are Accelerate's.

    Attributes:
        optimizer: a rule's name, as in `distopt.list_optimizers()`.
        steps: optimizer steps, whatever the number of ranks.
        batch_size: sequences per step over all ranks; `accumulate` parts of a rank's share go through the model in turn.
        max_grad_norm: the norm that gradients are clipped to; under DeepSpeed its config says so.
        eval_sequences: sequences of the validation text that the last loss is a mean over.
        dir: where the checkpoint goes.
    """

    optimizer: str = "muon"
    lr: float = 1e-2
    weight_decay: float = 0.1
    seed: int = 0
    steps: int = 60
    batch_size: int = 16
    accumulate: int = 1
    max_grad_norm: float = 1.0
    log_every: int = 10
    eval_sequences: int = 64
    dir: str = "runs/accelerate_tiny"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments and their YAML files say, and print the losses on the first rank."""
    try:
        config = load_config(Config, arguments)
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            gradient_accumulation_steps=config.accumulate,
            step_scheduler_with_optimizer=False,
        )
        shape = model_config(config.model, config.data.seq_len)
        train_data, val_data = load_corpora(config.data)
        torch.manual_seed(config.seed)  # the same weights on every rank
        model = build_model(config.model, shape)
        optimizer = distopt.integrations.accelerate.create_optimizer(
            config.optimizer, model, lr=config.lr, weight_decay=config.weight_decay
        )
        share, left = divmod(config.batch_size, accelerator.num_processes * config.accumulate)
        if left or not share:
            raise ValueError(
                f"batch_size {config.batch_size} is not a multiple of {accelerator.num_processes} ranks times accumulate "
                f"{config.accumulate}"
            )
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{error}")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    folder, step = Path(config.dir), 0
    if (folder / "step.txt").is_file():
        accelerator.load_state(str(folder))
        step = int((folder / "step.txt").read_text())
    first = step
    while step < config.steps:
        starts = training_starts(
            train_data,
            seed=config.seed,
            step=step,
            batch_size=config.batch_size,
            ranks=accelerator.num_processes,
            rank=accelerator.process_index,
            micro_batch_size=share,
        )
        losses = []
        for part in starts:
            with accelerator.accumulate(model):
                loss = sequence_loss(model, train_data.read(part, shape.vocab_size).to(accelerator.device))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        schedule.step()
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            mean = accelerator.gather(torch.stack(losses)).mean().item()
            accelerator.print(f"step {step}: loss {mean:.4f}, lr {schedule.get_last_lr()[0]:.2e}", flush=True)
    if step > first:
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            (folder / "step.txt").write_text(f"{step}")

    model.eval()
    with torch.no_grad():
        rows = validation_starts(val_data, config.eval_sequences)
        parts = [rows[i : i + 16] for i in range(0, len(rows), 16)]
        total = sum(
            sequence_loss(model, val_data.read(part, shape.vocab_size).to(accelerator.device)).item() * len(part)
            for part in parts
        )
    accelerator.print(
        f"validation loss {total / len(rows):.4f} {val_data.unit} after steps {first} to {step} with {config.optimizer} on "
        f"{accelerator.num_processes} ranks ({accelerator.distributed_type.value})"
    )
    accelerator.end_training()


def sequence_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of each row's tokens after its first, in nats per token."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
