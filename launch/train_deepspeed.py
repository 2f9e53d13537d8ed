"""Pretrain a small Llama through DeepSpeed with an optimizer of distopt, which the DeepSpeed config names.

    torchrun --standalone --nproc-per-node 2 launch/train_deepspeed.py --config configs/deepspeed_tiny.yaml
    deepspeed launch/train_deepspeed.py --config configs/deepspeed_tiny.yaml --deepspeed configs/deepspeed_zero3.json

Made to be copied and changed: the two lines of distopt are those with `from_config` and `deepspeed.initialize`. What is
supported is said in distopt/integrations/deepspeed.py. A run that is started again goes on from its last checkpoint.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from config import load_config
from data import Corpus, DataConfig, load_corpora, training_starts, validation_starts
from model import ModelConfig, build_model, model_config
from report import summary
from torch import Tensor
from torch.nn.functional import cross_entropy

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
try:
    import deepspeed
except ImportError:
    sys.exit("launch/train_deepspeed.py needs DeepSpeed: pip install distopt[deepspeed]")

from distopt.comm.ending import leave
from distopt.integrations.deepspeed import from_config


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run; batch sizes, clipping, precision, schedule and optimizer are in the DeepSpeed config.

    Attributes:
        deepspeed: the DeepSpeed config, a JSON file.
        steps: optimizer steps, whatever the number of ranks.
        eval_sequences: sequences of the validation text that the last loss is a mean over.
        checkpoint_every: steps between checkpoints; 0 saves after the last step only.
        dir: where checkpoints go.
    """

    deepspeed: str = "configs/deepspeed_zero2.json"
    seed: int = 0
    steps: int = 60
    log_every: int = 10
    eval_sequences: int = 64
    checkpoint_every: int = 30
    dir: str = "runs/deepspeed_tiny"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments and their YAML files say, and print the losses on rank 0."""
    try:
        config = load_config(Config, arguments)
        shape = model_config(config.model, config.data.seq_len)
        train_data, val_data = load_corpora(config.data)
        torch.manual_seed(config.seed)  # the same weights on every rank
        model = build_model(config.model, shape)
        optimizer, ds_config = from_config(config.deepspeed, model)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"rank {os.environ.get('RANK', '0')}: {error}")

    start_processes()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    rank, device = engine.global_rank, engine.device
    # Where a run begins again: DeepSpeed's own checkpoint holds weights, optimizer, schedule and this number.
    _, saved = engine.load_checkpoint(config.dir)
    step = saved["step"] if saved else 0

    first_step, start, losses = step, time.perf_counter(), []
    while step < config.steps:
        losses.append(train_step(engine, train_data, config.seed, step, shape.vocab_size))
        step += 1
        if rank == 0 and (step % config.log_every == 0 or step == config.steps):
            recent = sum(losses[-config.log_every :]) / len(losses[-config.log_every :])
            print(f"step {step}: loss {recent:.4f}, lr {engine.get_lr()[0]:.2e}", flush=True)
        if step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0):
            engine.save_checkpoint(config.dir, client_state={"step": step})
    seconds = time.perf_counter() - start

    val_loss = evaluate(engine, val_data, config.eval_sequences, shape.vocab_size)
    if rank == 0:
        matrices = sum(name == optimizer.param_groups[0]["rule"] for _, name, _ in optimizer.routing)
        rows = {
            "run": f"steps {first_step} to {step} in {seconds:.0f} s on {engine.world_size} x {device}",
            "optimizer": f"{optimizer.param_groups[0]['rule']} for {matrices} of {len(optimizer.routing)} parameters",
            "ZeRO": f"stage {engine.zero_optimization_stage()}, {engine.get_data_types()[0]}",
            "validation loss": f"{val_loss:.4f} {val_data.unit}",
        }
        print(summary(rows))
    engine.destroy()
    torch.distributed.destroy_process_group()


def start_processes() -> None:
    """Join the process group: of one, where no launcher started this process."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
        deepspeed.init_distributed("nccl")
    else:
        # gloo reduces; DeepSpeed's own all-reduce for CPUs would first be compiled, for a minute and a half.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")


def train_step(engine: Any, corpus: Corpus, seed: int, step: int, vocab_size: int) -> float:
    """One step on this rank's part of the global batch; the mean loss over all ranks."""
    engine.train()
    starts = training_starts(
        corpus,
        seed=seed,
        step=step,
        batch_size=engine.train_batch_size(),
        ranks=engine.dp_world_size,
        rank=engine.global_rank,
        micro_batch_size=engine.train_micro_batch_size_per_gpu(),
    )
    total = torch.zeros((), device=engine.device)
    for part in starts:
        loss = sequence_loss(engine, corpus.read(part, vocab_size))
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(starts)
    torch.distributed.all_reduce(total)
    return total.item() / engine.dp_world_size


@torch.no_grad()
def evaluate(engine: Any, corpus: Corpus, sequences: int, vocab_size: int) -> float:
    """The mean loss over the same validation sequences on every rank; collective, as stage 3 gathers weights."""
    engine.eval()
    starts = validation_starts(corpus, sequences)
    losses = [sequence_loss(engine, corpus.read(part, vocab_size)).item() * len(part) for part in batches(starts)]
    return sum(losses) / len(starts)


def batches(starts: Any, size: int = 16) -> list[Any]:
    """Runs of at most `size`."""
    return [starts[i : i + size] for i in range(0, len(starts), size)]


def sequence_loss(engine: Any, rows: Tensor) -> Tensor:
    """Mean cross entropy of each row's tokens after its first, in nats per token."""
    rows = rows.to(engine.device)
    logits = engine(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


if __name__ == "__main__":
    # DeepSpeed's launcher passes --local_rank, which the environment says too.
    main([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    leave()
