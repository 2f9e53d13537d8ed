"""What the ranks of the trainers' tests run, and the single process that they are compared with: the same global batches
on any number of ranks.

A kind is "one" (process), "ddp", "fsdp2", or "zero0" to "zero3" for DeepSpeed. On a CPU Accelerate never chooses FSDP2 by
itself: `on_cpu` tells it that these are GPUs, for that decision only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import distopt
import distopt.integrations.accelerate
import distopt.integrations.transformers as integration
from tests.distributed.pool import Pool, pool

GLOBAL_BATCH, TOKENS, VOCABULARY = 12, 8, 64
LR = 1e-2
# The word that switches FSDP on was a string before it was True.
FSDP: Any = True if Version(transformers.__version__) >= Version("5.10") else "full_shard auto_wrap"
Full = dict[str, Tensor]


def model(*, tied: bool = True, dropout: float = 0.0) -> LlamaForCausalLM:
    """A Llama of two blocks, with the same weights in every process."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_dropout=dropout,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def sequences(count: int, *, same: bool = False) -> list[dict[str, Tensor]]:
    """Examples for the Trainer; with `same` they are all one."""
    tokens = torch.randint(VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in (tokens[:1].expand(count, -1) if same else tokens)]


@contextmanager
def on_cpu(kind: str) -> Iterator[None]:
    """A fresh Accelerate in this process."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if dist.is_initialized():
        size = str(dist.get_world_size())
        os.environ.update(
            LOCAL_RANK=os.environ["RANK"], LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
        )
    if is_zero(kind):
        from tests.integrations.deepspeed_ranks import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if kind == "fsdp2":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


def is_zero(kind: str) -> bool:
    """Whether DeepSpeed trains."""
    return kind.startswith("zero")


def zero_config(kind: str, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config of this stage; small models are partitioned too."""
    zero = {"stage": int(kind[-1])} | ({"stage3_param_persistence_threshold": 0} if kind == "zero3" else {})
    return {"zero_optimization": zero, "steps_per_print": 1000000, **more}


def ranks_of(kind: str, size: int) -> Pool:
    """Ranks of their own for DeepSpeed, which replaces functions of torch for the life of a process."""
    return pool(size, "deepspeed") if is_zero(kind) else pool(size)


def full_weights(trained: nn.Module) -> Full:
    """Weights by name, whole, without the prefixes of wrappers; collective under ZeRO 3."""
    found = {}
    for name, param in trained.named_parameters():
        if hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                whole = param.detach().clone()
        else:
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def furthest(one: Full, other: Full) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def equal(one: Full, other: Full) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(trained: Full) -> bool:
    """Whether every weight was trained, ten times further than what differs."""
    return all((trained[name] - param).abs().max() > 1e-4 for name, param in full_weights(model()).items())


# ---- Trainer


def trainer(
    kind: str,
    directory: str | Path,
    *,
    steps: int = 10,
    same: bool = False,
    tied: bool = True,
    dropout: float = 0.0,
    optimizer: tuple[str, dict[str, Any]] | None = None,
    callbacks: tuple[Any, ...] = (),
    **settings: Any,
) -> Trainer:
    """A Trainer of `steps` steps over `GLOBAL_BATCH` sequences each, by `optimizer` (the official route) or `optim`."""
    integration.register()
    if kind == "fsdp2":
        settings |= {
            "fsdp": FSDP,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
    if is_zero(kind):
        auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        config = zero_config(kind, **auto, gradient_clipping="auto", bf16={"enabled": "auto"})
        settings = {"deepspeed": config, "ddp_backend": "gloo", **settings}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    options: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": GLOBAL_BATCH if same else GLOBAL_BATCH // ranks,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.0 if same else 1.0,  # under FSDP2 torch sums the norm in another order
        "weight_decay": 0.1,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    args = TrainingArguments(output_dir=str(directory), **options)
    assert args.device.type == "cpu"  # looked up now, which makes Accelerate's state
    if kind == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    route = (
        {} if optimizer is None else {"optimizer_cls_and_kwargs": integration.optimizer(optimizer[0], **optimizer[1])}
    )
    return Trainer(
        model(tied=tied, dropout=dropout),
        args,
        train_dataset=sequences(GLOBAL_BATCH * 4 * (ranks if same else 1), same=same),
        callbacks=list(callbacks),
        **route,
    )


def train(kind: str, directory: str | Path, *, resume: str | None = None, **options: Any) -> Full:
    """The weights after a Trainer has run."""
    with on_cpu(kind):
        made = trainer(kind, directory, **options)
        made.train(resume_from_checkpoint=resume)
        assert all(isinstance(param, DTensor) == (kind == "fsdp2") for param in made.model.parameters())
        assert is_zero(kind) == hasattr(made.model_wrapped, "zero_optimization_stage")
        found = full_weights(made.model)
        if is_zero(kind):
            made.model_wrapped.destroy()
            transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        return found


# ---- Accelerate


def build(kind: str, name: str, net: nn.Module) -> torch.optim.Optimizer:
    """ "torch", a class of distopt over bare parameters ("AdamW"), or a name for create_optimizer ("muon")."""
    if name == "torch":
        return torch.optim.AdamW(net.parameters(), lr=LR / 2, weight_decay=0.0, fused=True)
    if name[0].isupper():
        return getattr(distopt, name)(net.parameters(), lr=LR / 2)
    if is_zero(kind):
        return distopt.integrations.accelerate.create_optimizer(name, net, lr=LR / 2)
    return distopt.create_optimizer(name, net, lr=LR / 2)


def plugin(state_dict_type: str) -> FullyShardedDataParallelPlugin:
    """FSDP2, block by block."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type=state_dict_type,
    )


def accelerate(
    kind: str,
    name: str,
    *,
    steps: int = 10,
    same: bool = False,
    accumulate: int = 1,
    precision: str = "no",
    directory: str | None = None,
    save_at: int = 0,
    resume: bool = False,
    state_dict_type: str = "SHARDED_STATE_DICT",
) -> Full:
    """The weights after a plain Accelerate loop: what a user writes, with the optimizer's line as the only change."""
    with on_cpu(kind):
        chosen: dict[str, Any] = {"fsdp_plugin": plugin(state_dict_type)} if kind == "fsdp2" else {"cpu": True}
        if is_zero(kind):
            size = GLOBAL_BATCH // accumulate // (1 if same else dist.get_world_size())
            config = zero_config(kind, train_micro_batch_size_per_gpu=size, gradient_clipping=0.0 if same else 1.0)
            config["gradient_accumulation_steps"] = accumulate
            chosen = {
                "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config),
                "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")],
            }
        accelerator = Accelerator(gradient_accumulation_steps=accumulate, mixed_precision=precision, **chosen)
        net = model()
        optimizer = build(kind, name, net)
        net, optimizer = accelerator.prepare(net, optimizer)
        assert all(isinstance(param, DTensor) == (kind == "fsdp2") for param in net.parameters())
        assert is_zero(kind) == hasattr(net, "zero_optimization_stage")
        ranks, rank = accelerator.num_processes, accelerator.process_index
        if resume:
            assert directory is not None
            accelerator.load_state(directory)
        for step in range(save_at if resume else 0, steps):
            generator = torch.Generator().manual_seed(100 + step)
            tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, TOKENS), generator=generator)
            mine = tokens if same else tokens.chunk(ranks)[rank]
            for part in mine.chunk(accumulate):
                with accelerator.accumulate(net):
                    loss = net(input_ids=part, labels=part).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and not same:
                        accelerator.clip_grad_norm_(net.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            if directory is not None and not resume and step + 1 == save_at:
                accelerator.save_state(directory)
        found = full_weights(net)
        if is_zero(kind):
            net.destroy()
        return found


# ---- both


def run(route: str, kind: str, name: str, directory: str = "unused", **options: Any) -> Full:
    """The weights after training by `route`, "trainer" or "accelerate"; `name` is a rule, or "torch" for its AdamW.

    Options are those of `accelerate` beside `state_dict_type`: `steps`, `same`, `accumulate`, `precision`, and `save_at`,
    which writes the trainer's own checkpoint after that step, or with `resume` starts from it.
    """
    if route == "accelerate":
        return accelerate(kind, name, directory=directory if "save_at" in options else None, **options)
    accumulate, save_at = options.pop("accumulate", 1), options.pop("save_at", 0)
    resume = f"{directory}/checkpoint-{save_at}" if options.pop("resume", False) else None
    if options.pop("precision", "no") == "bf16":
        options["bf16"] = True
    if save_at:
        options |= {"save_strategy": "steps", "save_steps": save_at, "dropout": 0.2}
    if accumulate > 1:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        options["per_device_train_batch_size"] = GLOBAL_BATCH // ranks // accumulate
        options["gradient_accumulation_steps"] = accumulate
    optim = "adamw_torch_fused" if name == "torch" else f"distopt_{name}"
    return train(kind, directory, optim=optim, resume=resume, **options)
