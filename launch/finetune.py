"""Fine-tune a transformers causal language model on one device within a stated memory budget: all of it, LoRA, or QLoRA.

    python launch/finetune.py --config configs/finetune_tiny.yaml
    python launch/finetune.py --model.path <directory> --data.path instructions.jsonl --memory.budget 16GiB --explain true

Without a model it makes a tiny one with random weights, without data it reads the standard library. Made to be copied and
changed: `main` reads top to bottom.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from budget import Choice, MemoryConfig, choose_memory
from checkpoints import check_same_data, checkpoint_path, group_options, keep_options, require, restore_rng, rng_states
from config import load_config
from instructions import IGNORED, ExamplesConfig, Tokens, choose, load_examples, make_batch
from pretrain import build_schedule, due
from report import Metrics, human_bytes, loss_rows, memory_in_use, plot_losses, summary
from settings import CheckpointConfig, Config, LoggingConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from torch import nn
from torch.nn.functional import cross_entropy

import distopt
import distopt.checkpoint

UNIT = "nats per token"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """The model to start from.

    Attributes:
        path: a local directory, or the name of one on the hub; null makes a tiny Llama on bytes with random weights.
        dtype: of the weights, gradients and activations.
    """

    path: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is trained.

    Attributes:
        kind: full: every weight; lora: low-rank additions to the linear layers (peft); qlora: the same on weights stored in
            4 bits (bitsandbytes NF4, needs a GPU).
        rank, alpha, dropout: of LoRA.
        targets: names of the modules that get additions; null: all hidden linear layers.
        merged: at the end add LoRA's additions to the weights and save a whole model; else an adapter.
    """

    kind: Literal["full", "lora", "qlora"] = "full"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: list[str] | None = None
    merged: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All settings; `train.steps`, `batch_size`, `micro_batch_size` and `device` are those of pretraining.

    Attributes:
        explain: print what will be used, and stop.
        val_examples: held-out examples in an evaluation, at most.
    """

    seed: int = 0
    explain: bool = False
    val_examples: int = 64
    model: SourceConfig = field(default_factory=SourceConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="adamw", lr=2e-5, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, batch_size=16))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(dir="runs/finetune"))


def main(arguments: Sequence[str]) -> None:
    """Fine-tune as the arguments and their YAML files say, and print what was used and reached."""
    try:
        config = load_config(FinetuneConfig, arguments)
        device = find_device(config)
        micro = config.train.micro_batch_size or config.train.batch_size
        if config.train.batch_size % micro:
            raise ValueError(
                f"train.batch_size={config.train.batch_size} is no multiple of train.micro_batch_size={micro}"
            )
        schedule = build_schedule(Config(schedule=config.schedule, train=config.train))
        torch.manual_seed(config.seed)
        model, tokenizer = build_model(config, device)
        train_data, val_data, fingerprint = load_examples(config.data, tokenizer)
        options = rule_options(config.optimizer)
        choice = choose_memory(
            config.memory, model, config.optimizer.name, options, sequences=micro, length=config.data.max_length,
            gpu=device.type == "cuda", pages=Path(config.logging.dir) / "pages",
        )  # fmt: skip
    except (ValueError, OSError) as error:  # OSError: no such model
        sys.exit(str(error))
    print(summary(memory_rows(choice, config)))
    if config.explain:
        return

    if choice.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = distopt.create_optimizer(
        config.optimizer.name,
        model,
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        nonfinite=config.optimizer.nonfinite,
        state_codec=choice.state_codec,
        offload=choice.offload,
        **options,
    )
    two_pass = config.optimizer.max_grad_norm is not None or config.optimizer.nonfinite is not None
    stepper = distopt.step_in_backward(model, optimizer, two_pass=two_pass) if choice.step_in_backward else None
    base_lrs = [group["lr"] for group in optimizer.param_groups]

    directory = Path(config.logging.dir)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = directory / "checkpoints"
    step = 0
    identity = {
        "data": fingerprint, "seed": config.seed, "train.batch_size": config.train.batch_size,
        "data.max_length": config.data.max_length, "method.kind": config.method.kind,
    }  # fmt: skip
    newest = None if config.checkpoint.resume == "never" else distopt.checkpoint.latest(checkpoints)
    if newest is None and config.checkpoint.resume == "must":
        sys.exit(f"checkpoint.resume=must, but '{checkpoints}' holds no valid checkpoint")
    if newest is not None:
        mine = group_options(optimizer)
        extra = distopt.checkpoint.load(newest, model=model, optimizer=optimizer)
        keep_options(optimizer, mine, newest)
        position, rng = require(extra, newest, "position", "rng")
        check_same_data(position["data"], identity, newest)
        step = position["step"]
        restore_rng(rng, device, reseed=config.seed + step)

    first_step, steps, start = step, config.train.steps, time.perf_counter()
    with Metrics(directory, config.logging, first_step=step, total_steps=steps, active=True) as metrics:
        while step < steps:
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * schedule(step)
            numbers = choose(len(train_data), seed=config.seed, step=step, batch_size=config.train.batch_size)
            examples = [train_data[number] for number in numbers]
            model.train()
            loss = 0.0
            for _ in stepper.passes() if stepper is not None and two_pass else (0,):
                loss = backward(model, tokenizer, examples, micro, device, stepper)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if due(step, config.logging.every, steps):
                metrics.write(step, loss=loss, lr=optimizer.param_groups[0]["lr"], memory_bytes=memory_in_use(device))
            if step == steps:
                val_loss = evaluate(model, tokenizer, val_data[: config.val_examples], micro, device)
                metrics.write(step, val_loss=val_loss)
            if due(step, config.checkpoint.every, steps):
                extra = {"position": {"step": step, "data": identity}, "rng": rng_states(device)}
                path = checkpoint_path(checkpoints, step)
                distopt.checkpoint.save(path, model=model, optimizer=optimizer, extra=extra)
                distopt.checkpoint.prune(checkpoints, config.checkpoint.keep)
            metrics.advance()
    seconds = time.perf_counter() - start

    saved = directory / "model"
    rows = {
        "run": f"{config.method.kind}, {steps} steps; {steps - first_step} steps here in {seconds:.0f} s",
        "trained": f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "state": human_bytes(optimizer.plan.summary()["state_bytes"]),
        "memory": human_bytes(memory_in_use(device)),
        "model": f"{saved}",
    }
    base = directory / "base" if config.model.path is None else None
    save_model(model, tokenizer, config.method, saved, base)
    picture = plot_losses(directory, title=f"{config.optimizer.name}, {config.method.kind}", unit=UNIT)
    print(summary({**rows, **loss_rows(directory, UNIT), "loss curves": f"{picture}"}))


def find_device(config: FinetuneConfig) -> torch.device:
    """The device asked for.

    Raises:
        ValueError: QLoRA without a GPU.
    """
    cuda = config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available())
    if config.method.kind == "qlora" and not cuda:
        raise ValueError("method.kind=qlora stores weights in bitsandbytes' 4 bits, which needs a GPU; use lora")
    return torch.device("cuda" if cuda else "cpu")


def build_model(config: FinetuneConfig, device: torch.device) -> tuple[Any, Any]:
    """The model, with what is trained requiring gradients, and its tokenizer."""
    dtype = getattr(torch, config.model.dtype)
    if config.model.path is None:
        tokenizer: Any = transformers.ByT5Tokenizer()  # bytes; needs no file
        tiny = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=config.data.max_length,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(tiny)
        model = model.to(device, dtype)
    else:
        quantized = {}
        if config.method.kind == "qlora":
            nf4 = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            quantized = {"quantization_config": nf4, "device_map": {"": device}}
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype, **quantized)
        model = model if quantized else model.to(device)
    model.config.use_cache = False
    if config.method.kind == "full":
        return model, tokenizer
    try:
        import peft
    except ImportError:
        raise ValueError(f"method.kind={config.method.kind} needs peft: pip install peft") from None
    if config.method.kind == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(
        r=config.method.rank,
        lora_alpha=config.method.alpha,
        lora_dropout=config.method.dropout,
        target_modules=config.method.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora), tokenizer


def rule_options(config: OptimizerConfig) -> dict[str, Any]:
    """What `create_optimizer` takes beside lr, decay and the options that all optimizers have."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in config.options.items()}
    rest = {"rest": config.rest} if config.rest is not None else {}
    return {**options, **rest, **({"rest_options": config.rest_options} if config.rest_options else {})}


def backward(
    model: nn.Module, tokenizer: Any, examples: Sequence[Tokens], micro: int, device: torch.device, stepper: Any
) -> float:
    """Gradients of the mean loss over all response tokens of the batch; that loss, in nats per token."""
    total, count = 0.0, sum(len(tokens) - max(prompt, 1) for tokens, prompt in examples)
    for start in range(0, len(examples), micro):
        loss = summed_loss(model, tokenizer, examples[start : start + micro], device) / count
        last = start + micro >= len(examples)
        if stepper is None or last:
            loss.backward()
        else:
            with stepper.accumulate():
                loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any, examples: Sequence[Tokens], micro: int, device: torch.device) -> float:
    """The mean loss over all response tokens, in nats."""
    model.eval()
    count = sum(len(tokens) - max(prompt, 1) for tokens, prompt in examples)
    parts = (examples[start : start + micro] for start in range(0, len(examples), micro))
    return sum(summed_loss(model, tokenizer, part, device).item() for part in parts) / count


def summed_loss(model: nn.Module, tokenizer: Any, examples: Sequence[Tokens], device: torch.device) -> torch.Tensor:
    """Cross entropy, added up over the response tokens."""
    batch = make_batch(examples, tokenizer.pad_token_id or 0)
    logits = model(input_ids=batch.tokens.to(device), attention_mask=batch.mask.to(device)).logits
    targets = batch.targets.to(device)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def memory_rows(choice: Choice, config: FinetuneConfig) -> dict[str, str]:
    """What will be used."""
    two_pass = config.optimizer.max_grad_norm is not None or config.optimizer.nonfinite is not None
    passes = ", two backward passes per step" if two_pass else ""
    return {
        "states": f"{config.optimizer.name}, {choice.state_codec}, on {choice.offload or 'the device'}",
        "gradients": f"freed as they arrive{passes}" if choice.step_in_backward else "kept until the step",
        "activations": "recomputed" if choice.activation_checkpointing else "kept",
        **{f"bytes of {name}": human_bytes(count) for name, count in choice.parts.items()},
        "bytes in all": f"{human_bytes(choice.total)} (budget: {config.memory.budget or 'none'})",
    }


def save_model(model: Any, tokenizer: Any, method: MethodConfig, path: Path, base: Path | None) -> None:
    """A directory that from_pretrained loads: the model, or LoRA's adapter, which names the model that it belongs to. A
    model that was made here is written to `base` for that."""
    save: Callable[[Path], Any] = model.save_pretrained
    if method.kind != "full" and method.merged:
        save = model.merge_and_unload().save_pretrained
    elif method.kind != "full" and base is not None:
        model.active_peft_config.base_model_name_or_path = str(base.resolve())
    save(path)
    if method.kind != "full" and not method.merged and base is not None:
        model.unload().save_pretrained(base)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    main(sys.argv[1:])
