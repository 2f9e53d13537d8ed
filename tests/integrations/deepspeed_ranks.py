"""What the ranks of `test_deepspeed.py` run. Every run is 10 steps of a small model through `deepspeed.initialize`."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import distopt  # noqa: E402
import distopt.integrations.deepspeed as integration  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# gloo's own all-reduce: DeepSpeed's is compiled for a minute and a half before it is used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STEPS, SEQUENCES, VOCABULARY = 10, 24, 50
Weights = dict[str, Tensor]


class Tiny(nn.Module):
    """Matrices whose rows no partition boundary respects, a matrix of one row, tied weights, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.up = nn.Linear(16, 37)
        self.middle = nn.Linear(37, 37, bias=False)
        self.down = nn.Linear(37, 16)
        self.gate = nn.Linear(16, 1, bias=False)
        self.norm = nn.LayerNorm(16)
        self.fixed = nn.Linear(16, 16)
        self.fixed.requires_grad_(False)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens[:, :-1])
        hidden = hidden + self.down(torch.tanh(self.middle(torch.tanh(self.up(hidden))))) * self.gate(hidden)
        logits = self.lm_head(self.norm(self.fixed(hidden)))
        return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def build() -> Tiny:
    """The same model in every process."""
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        model.embed.weight.mul_(0.2)
    return model


def tokens(step: int) -> Tensor:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCABULARY, (SEQUENCES, 9), generator=generator)


def one_process(
    name: str, options: dict[str, Any], clip: float | None = None, dtype: torch.dtype = torch.float32, scale: float = 1
) -> Weights:
    """The weights of a run without any trainer: fp32 copies of low-precision weights are what is stepped, and the loss is
    scaled for fp16."""
    model = build().to(dtype)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    live = dict(model.named_parameters())
    masters = build() if dtype == torch.float32 else build().to(dtype).float()
    copies = dict(masters.named_parameters())
    made = (
        torch.optim.AdamW([copies[name] for name in names], fused=True, **options)
        if name == "torch"
        else distopt.create_optimizer(name, masters, **options)
    )
    for step in range(STEPS):
        (model(tokens(step)).float() * scale).backward()
        for key in names:
            grad = live[key].grad
            assert grad is not None
            copies[key].grad, live[key].grad = grad.float() / scale, None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([copies[key] for key in names], clip)
        made.step()
        with torch.no_grad():
            for key in names:
                live[key].copy_(copies[key])
    return {key: copies[key].detach().clone() for key in names}


def engine_config(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config with these settings."""
    accumulation = config.get("gradient_accumulation_steps", 1)
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES // dist.get_world_size() // accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }


def connect() -> None:
    """DeepSpeed over the ranks of the pool. Before every engine: whoever ran here before may have taken LOCAL_RANK back."""
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    deepspeed.init_distributed("gloo", verbose=False)


def start(name: str, options: dict[str, Any], config: dict[str, Any]) -> Any:
    """An engine on the same first weights; `zero_init` among the settings makes the model under zero.Init."""
    zero_init = "zero_init" in config
    settings = engine_config({key: value for key, value in config.items() if key != "zero_init"})
    connect()
    if zero_init:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = Tiny()
        for param, value in zip(model.parameters(), build().parameters()):
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                if dist.get_rank() == 0:
                    param.data.copy_(value)
    else:
        model = build()
    made: Any = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **options)
        if name == "torch"
        else integration.optimizer(name, model, config=settings, **options)
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=settings)
    return engine


def train(engine: Any, steps: range, same_batch: bool = False) -> None:
    """Step through global batches, of which every rank takes its part, or all of it."""
    parts, rank = engine.gradient_accumulation_steps(), dist.get_rank()
    size = engine.train_micro_batch_size_per_gpu()
    for step in steps:
        batch = tokens(step)
        for part in range(parts):
            begin = (part * dist.get_world_size() + rank) * size
            loss = engine(batch if same_batch else batch[begin : begin + size])
            engine.backward(loss)
            engine.step()


def weights(engine: Any) -> Weights:
    """The fp32 weights, whole; collective."""
    optimizer = engine.optimizer
    low = [param for group in getattr(optimizer, "fp16_groups", []) for param in group]
    copies = [copy for group in getattr(optimizer, "fp32_groups", []) for copy in group]
    at_stage_0 = {id(param): copy for param, copy in zip(low, copies)}
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            full = at_stage_0.get(id(param), param)
            # DeepSpeed's own account of where fp32 weights are is asked only where they are nowhere else.
            if full is param and (param.dtype != torch.float32 or hasattr(param, "ds_id")):
                full = deepspeed.utils.safe_get_full_fp32_param(param)
            found[name] = full.detach().clone()
    return found


@contextmanager
def running(name: str, options: dict[str, Any], config: dict[str, Any]) -> Iterator[Any]:
    """An engine that is taken down again."""
    engine = start(name, options, config)
    try:
        yield engine
    finally:
        engine.destroy()


def distance(found: Weights, expected: Weights) -> float:
    """Largest difference of any weight."""
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def trained(name: str, options: dict[str, Any], config: dict[str, Any], same_batch: bool = False) -> Weights:
    """The weights after all steps."""
    with running(name, options, config) as engine:
        train(engine, range(STEPS), same_batch)
        return weights(engine)


def distances(name: str, options: dict[str, Any], configs: dict[str, dict[str, Any]], **how: Any) -> dict[str, float]:
    """How far a run under each config ends from one process."""
    reference = one_process(name, options, **how)
    return {label: distance(trained(name, options, config), reference) for label, config in configs.items()}


def unequal(name: str, options: dict[str, Any], configs: dict[str, dict[str, Any]], **how: Any) -> dict[str, list[str]]:
    """Which weights are not bit for bit those of one process, where every rank is fed the same batch."""
    get_accelerator().is_fp16_supported = lambda: True  # asks for an instruction of the CPU; torch needs none
    reference = one_process(name, options, **how)
    found = {label: trained(name, options, config, same_batch=True) for label, config in configs.items()}
    return {label: [key for key in reference if not torch.equal(w[key], reference[key])] for label, w in found.items()}


def overflow(name: str, options: dict[str, Any]) -> tuple[int, set[int]]:
    """Skipped steps of 12, and the steps that parameters count."""
    get_accelerator().is_fp16_supported = lambda: True
    config = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    with running(name, options, config) as engine:
        train(engine, range(12), same_batch=True)
        states = [state for part in engine.basic_optimizer.parts for state in part.inner.state.values()]
        return engine.skipped_steps, {int(state["step"]) for state in states}


def resumed_differently(
    name: str, options: dict[str, Any], configs: dict[str, dict[str, Any]], folder: str
) -> dict[str, list[str]]:
    """The weights that a run which was saved and loaded in the middle does not share with one that was not."""
    wrong = {}
    for label, config in configs.items():
        with running(name, options, config) as engine:
            train(engine, range(4))
            engine.save_checkpoint(f"{folder}/{label}")
            train(engine, range(4, STEPS))
            whole = weights(engine)
        with running(name, {**options, "lr": 1.0}, config) as engine:
            train(engine, range(2))
            engine.load_checkpoint(f"{folder}/{label}")
            train(engine, range(4, STEPS))
            again = weights(engine)
        wrong[label] = [key for key in whole if not torch.equal(whole[key], again[key])]
    return wrong


def from_file(path: str, options: dict[str, Any]) -> float:
    """How far a run that a file sets up ends from one process."""
    connect()
    model = build()
    made, config = integration.from_config(path, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    train(engine, range(STEPS))
    found = distance(weights(engine), one_process("muon", options))
    engine.destroy()
    return found


def complaint(how: str, stage: int, folder: str) -> str:
    """What is said about something that cannot be right."""
    options, config = {"lr": 0.1}, {"zero_optimization": {"stage": stage}}
    if how == "an ordinary optimizer":
        model = build()
        settings = engine_config(config)
        made = distopt.create_optimizer("adafactor", model, **options)
        engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=settings)
    elif how.startswith("a group in pieces"):
        engine = start("prodigy", {"lr": 1.0}, {"zero_optimization": {"stage": 3, "sub_group_size": 700}})
    else:
        engine = start("muon", options, config)
    try:
        if how == "weights loaded behind its back":
            for param in engine.module.parameters():
                (param.ds_tensor if stage == 3 else param).data.add_(1.0)
        if how == "a checkpoint of another optimizer":
            engine.basic_optimizer.load_state_dict(torch.optim.AdamW(build().parameters()).state_dict())
        if how == "other sub-groups":
            train(engine, range(1))
            engine.save_checkpoint(folder)
            engine.destroy()
            engine = start("muon", options, {"zero_optimization": {"stage": 3, "sub_group_size": 700}})
            engine.load_checkpoint(folder)
        train(engine, range(1))
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return "nothing"
