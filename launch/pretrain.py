"""Pretrain a Llama with a distopt optimizer, on one process or many, on CPU (gloo) or GPU (nccl).

    python launch/pretrain.py --config configs/pretrain_tiny.yaml
    torchrun --standalone --nproc-per-node 2 launch/pretrain.py --config configs/pretrain_tiny.yaml --optimizer.lr 3e-3

Made to be copied and changed: `main` reads top to bottom. The settings are explained in settings.py.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from checkpoints import (
    check_same_data,
    checkpoint_path,
    group_options,
    keep_options,
    require,
    restore_rng,
    rng_states,
)
from config import load_config
from curvature import ESTIMATES
from data import Corpus, load_corpora, training_starts, validation_starts
from model import (
    Mesh,
    build_model,
    casts_parameters,
    export_model,
    model_config,
    parallelize,
    reshard,
    resolve_mesh,
    set_gradient_sync,
    state_process_group,
)
from numpy.typing import NDArray
from report import (
    Metrics,
    human_bytes,
    loss_rows,
    memory_in_use,
    optimizer_rows,
    plot_losses,
    precision_row,
    sum_over_ranks,
    summary,
)
from settings import Config, OptimizerConfig
from torch import nn
from torch.nn.functional import cross_entropy

import distopt
import distopt.checkpoint
from distopt.comm.ending import leave
from distopt.schedules import (
    WarmupConstant,
    WarmupCosine,
    WarmupCyclic,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments and their YAML files say, and print the summary on rank 0."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:  # All that a user can get wrong, before any process group exists.
        config = load_config(Config, arguments)
        shape = model_config(config.model, config.data.seq_len)
        mesh = resolve_mesh(config.mesh, shape, world_size)
        micro_batch_size = resolve_micro_batch(config, mesh)
        schedule = build_schedule(config)
        train_data, val_data = load_corpora(config.data)
    except ValueError as error:
        sys.exit(f"rank {rank}: {error}")

    device = start_processes(config, world_size)
    directory = run_directory(config, device)
    torch.manual_seed(config.seed)  # the same weights on every rank,
    model = build_model(config.model, shape)
    wrapped = parallelize(
        model,
        mesh,
        device,
        bf16=config.train.precision == "bf16",
        activation_checkpointing=config.train.activation_checkpointing,
    )
    optimizer = build_optimizer(config.optimizer, model, mesh)
    estimate = ESTIMATES.get(config.optimizer.name)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    rank_seed = config.seed + 1 + mesh.data_rank(rank)  # but other random numbers where the data are others
    torch.manual_seed(rank_seed)

    # `step` is the position in the data, `updates` that in the schedule: a skipped step moves only the first.
    step = updates = 0
    data_identity = {
        "data": train_data.fingerprint(),
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "train.batch_size": config.train.batch_size,
    }
    checkpoints = directory / "checkpoints"
    distopt.checkpoint.check_writable(checkpoints)
    newest = None if config.checkpoint.resume == "never" else distopt.checkpoint.latest(checkpoints)
    if newest is None and config.checkpoint.resume == "must":
        sys.exit(f"rank {rank}: checkpoint.resume=must, but '{checkpoints}' holds no valid checkpoint")
    if newest is not None:
        options = group_options(optimizer)
        extra = distopt.checkpoint.load(newest, model=model, optimizer=optimizer)
        keep_options(optimizer, options, newest)
        position, schedule_state, rng = require(extra, newest, "position", "schedule", "rng")
        check_same_data(position["data"], data_identity, newest)
        step, updates = position["step"], schedule_state["updates"]
        restore_rng(rng, device, reseed=rank_seed + step)

    passes = Passes(wrapped, config, mesh, mesh.data_rank(rank), device, shape.vocab_size)
    first_step, steps, seconds = step, config.train.steps, 0.0
    optimizer.reset_traffic()
    with Metrics(directory, config.logging, first_step=step, total_steps=steps, active=rank == 0) as metrics:
        window_step, window_start = step, time.perf_counter()
        while step < steps:
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * schedule(updates)
            if estimate is not None and step % config.optimizer.estimate_every == 0:
                batch = partial(passes.accumulate_gradients, train_data, step, micro_batch_size)
                estimate(batch, model, config.seed + step)
                optimizer.observe("hessian")
                optimizer.zero_grad()
            loss = passes.accumulate_gradients(train_data, step, micro_batch_size)
            updates += take_step(optimizer, config.optimizer)
            step += 1

            if due(step, config.logging.every, steps):
                (mean_loss,) = sum_over_ranks([loss.item() / world_size], device)
                window = time.perf_counter() - window_start
                metrics.write(
                    step,
                    loss=mean_loss,
                    lr=optimizer.param_groups[0]["lr"],
                    tokens_per_second=(step - window_step) * passes.tokens_per_step / window,
                    grad_norm=optimizer.last_grad_norm,
                    memory_bytes=memory_in_use(device),
                )
                seconds += window
                window_step, window_start = step, time.perf_counter()
            pause_start = time.perf_counter()
            if due(step, config.eval.every, steps):
                optimizer.eval()  # the weights to keep, where a rule trains others (Schedule-Free)
                metrics.write(step, val_loss=passes.evaluate(val_data))
                optimizer.train()
            if due(step, config.checkpoint.every, steps):
                extra = {
                    "position": {"step": step, "data": data_identity},
                    "schedule": {"updates": updates},
                    "rng": rng_states(device),
                }
                path = checkpoint_path(checkpoints, step)
                distopt.checkpoint.save(path, model=model, optimizer=optimizer, extra=extra)
                if rank == 0:
                    distopt.checkpoint.prune(checkpoints, config.checkpoint.keep)
            window_start += time.perf_counter() - pause_start  # the tokens per second are those of training
            metrics.advance()

    optimizer.eval()
    if config.checkpoint.export:
        export_model(model, directory / "model", write=rank == 0)
    steps_here = step - first_step
    rows = {
        "run": f"{steps} steps, {steps * passes.tokens_per_step:,} tokens; {steps_here} steps here in {seconds:.0f} s",
        "model": f"{shape.model_type}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "mesh": f"{mesh.layout}: replicate {mesh.replicate} x dp {mesh.dp} x tp {mesh.tp} on {device.type}",
        "precision": precision_row(model, optimizer, bf16=config.train.precision == "bf16"),
        **optimizer_rows(optimizer, steps_here, device),
        "memory": f"{human_bytes(memory_in_use(device))} on rank 0",
    }
    if rank == 0:
        picture = plot_losses(directory, title=f"{config.optimizer.name}, {rows['model']}", unit=train_data.unit)
        print(summary({**rows, **loss_rows(directory, train_data.unit), "loss curves": f"{picture}"}))
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Passes:
    """The forward and backward passes of one rank over its part of a batch.

    Attributes:
        module: what to call: the model in its parallel wrapper.
        vocab_size: the limit of tokens.
    """

    module: nn.Module
    config: Config
    mesh: Mesh
    data_rank: int
    device: torch.device
    vocab_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    def accumulate_gradients(
        self, corpus: Corpus, step: int, micro_batch_size: int, sampled: bool = False
    ) -> torch.Tensor:
        """Add to `.grad` the gradient of the mean loss over the global batch of `step`, or, `sampled`, of its cross
        entropy against labels drawn from the model's own predictions.

        Returns:
            the cross entropy of this rank's part, in nats per token, detached.
        """
        starts = training_starts(
            corpus,
            seed=self.config.seed,
            step=step,
            batch_size=self.config.train.batch_size,
            ranks=self.mesh.data_ranks,
            rank=self.data_rank,
            micro_batch_size=micro_batch_size,
        )
        self.module.train()
        total = torch.zeros((), device=self.device)
        for index, part in enumerate(starts):
            set_gradient_sync(self.module, index == len(starts) - 1)
            losses, z_losses = self.sequence_losses(corpus, part, sampled)
            loss = losses.mean() + (0 if sampled else self.config.train.z_loss) * z_losses.mean()
            (loss / len(starts)).backward()
            total += losses.detach().mean() / len(starts)
        return total

    @torch.no_grad()
    def evaluate(self, corpus: Corpus) -> float:
        """The mean cross entropy over the validation sequences, in nats per token, the same on any number of ranks."""
        starts = validation_starts(corpus, self.config.eval.sequences)
        block = self.config.eval.batch_size * self.mesh.data_ranks
        # Every rank makes the same number of passes, as sharded parameters require; what is beyond the end counts 0.
        padded_size = -(-len(starts) // block) * block
        mine = np.arange(padded_size).reshape(-1, self.mesh.data_ranks, self.config.eval.batch_size)[:, self.data_rank]
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for indices in mine:
            losses, _ = self.sequence_losses(corpus, starts[indices % len(starts)])
            total += losses.double()[torch.from_numpy(indices < len(starts))].sum()
        reshard(self.module)
        (all_ranks,) = sum_over_ranks([total.item()], self.device)
        return all_ranks / self.mesh.tp / len(starts)

    def sequence_losses(
        self, corpus: Corpus, starts: NDArray[np.int64], sampled: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy and mean squared log-partition of each sequence, both of shape (len(starts),)."""
        rows = corpus.read(starts, self.vocab_size).to(self.device, non_blocking=True)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        bf16 = self.config.train.precision == "bf16" and not casts_parameters(self.mesh)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.module(input_ids=tokens, use_cache=False).logits
        logits = logits.float()
        if sampled:
            targets = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).view_as(targets)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        z_losses = logits.logsumexp(-1).square() if self.config.train.z_loss else torch.zeros_like(losses)
        return losses.mean(1), z_losses.mean(1)


def build_optimizer(config: OptimizerConfig, model: nn.Module, mesh: Mesh) -> distopt.Optimizer:
    """The optimizer of a sharded model; embeddings, head, norms and biases go to the `rest` rule."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in config.options.items()}
    if config.rest is not None:
        options["rest"] = config.rest
    if config.rest_options:
        options["rest_options"] = config.rest_options
    return distopt.create_optimizer(
        config.name,
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        nonfinite=config.nonfinite,
        process_group=state_process_group(mesh),
        **options,
    )


def take_step(optimizer: distopt.Optimizer, config: OptimizerConfig) -> int:
    """Update and clear the gradients; 1, or 0 if a non-finite gradient made all ranks skip the update."""
    # Asked only where a step can be skipped: on a GPU the answer waits for the device.
    before = optimizer.skipped_steps if config.nonfinite == "skip" else 0
    optimizer.step()
    optimizer.zero_grad()
    return 1 - (optimizer.skipped_steps - before) if config.nonfinite == "skip" else 1


def build_schedule(config: Config) -> Callable[[int], float]:
    """The factor of the learning rate, as a function of the updates done.

    Raises:
        ValueError: for warmup or decay that do not fit into train.steps, naming the keys.
    """
    try:
        return _schedule(config)
    except ValueError as error:
        message = str(error).replace("total_steps", "train.steps")
        raise ValueError(message if message.startswith("train.") else f"schedule.{message}") from None


def _schedule(config: Config) -> Callable[[int], float]:
    chosen, steps = config.schedule, config.train.steps
    warmup, low = chosen.warmup_steps, chosen.min_lr_ratio
    match chosen.kind:
        case "cosine":
            return WarmupCosine(total_steps=steps, warmup_steps=warmup, min_lr_ratio=low)
        case "linear":
            return WarmupLinear(total_steps=steps, warmup_steps=warmup, min_lr_ratio=low)
        case "inverse_sqrt":
            return WarmupInverseSqrt(warmup_steps=warmup)
        case "constant":
            return WarmupConstant(warmup_steps=warmup)
        case "cyclic":
            cycle = max(2, steps // 5) if chosen.cycle_steps is None else chosen.cycle_steps
            return WarmupCyclic(cycle_steps=cycle, warmup_steps=warmup, min_lr_ratio=low)
    return WarmupStableDecay(
        total_steps=steps,
        warmup_steps=warmup,
        decay_steps=steps // 5 if chosen.decay_steps is None else chosen.decay_steps,
        min_lr_ratio=low,
        decay_shape=chosen.decay_shape or "linear",
    )


def resolve_micro_batch(config: Config, mesh: Mesh) -> int:
    """Sequences per forward pass and rank.

    Raises:
        ValueError: when the global batch does not divide into equal parts.
    """
    batch_size, micro = config.train.batch_size, config.train.micro_batch_size
    per_pass = mesh.data_ranks * (1 if micro is None else micro)
    if per_pass < 1 or batch_size < 1 or batch_size % per_pass:
        raise ValueError(
            f"train.batch_size={batch_size} does not divide by {mesh.data_ranks} data-parallel ranks x "
            f"train.micro_batch_size={micro or 1}; choose a multiple of {max(1, per_pass)}"
        )
    return batch_size // mesh.data_ranks if micro is None else micro


def start_processes(config: Config, world_size: int) -> torch.device:
    """Join the process group, if there is more than one process; this process's device."""
    cuda = config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def run_directory(config: Config, device: torch.device) -> Path:
    """The run's folder: `logging.dir`, or for a fresh run the first of dir, dir-2, dir-3, ... that is not in use.

    Rank 0 looks and creates it; the others are told which.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    names = [config.logging.dir] + [f"{config.logging.dir}-{count}" for count in range(2, 1000)]
    chosen = 0
    if rank == 0:
        if config.checkpoint.resume == "never":
            chosen = next(index for index, name in enumerate(names) if not Path(name).exists() or not os.listdir(name))
        Path(names[chosen]).mkdir(parents=True, exist_ok=True)
        (Path(names[chosen]) / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    (chosen,) = map(int, sum_over_ranks([chosen], device))
    return Path(names[chosen])


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens `every` so many steps (0: never before the last) happens after `step`."""
    return step == last or (every > 0 and step % every == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
