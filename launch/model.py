"""A Llama and the ways to spread it: DDP, FSDP2, HSDP, tensor parallel (TP), and FSDP2 or HSDP over TP.

`resolve_mesh` judges sizes from numbers alone, before any process group exists; `parallelize` then applies torch's own
pieces in the order they compose: TP, FSDP2 (or DDP), mixed precision.
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

TP_PLAN: dict[str, ParallelStyle] = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields of transformers' `LlamaConfig`, for random weights; or a folder to continue from.

    Attributes:
        from_dir: a local folder with config.json and safetensors weights. It fixes the shape, so the fields below must
            then stay at their defaults.
        num_key_value_heads: null is `num_attention_heads`.
        max_position_embeddings: null is `data.seq_len`.
    """

    from_dir: str | None = None
    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        changed = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        if self.from_dir is not None and changed != ["from_dir"]:
            changed.remove("from_dir")
            raise ValueError(f"model.from_dir already fixes {', '.join(changed)}; remove them from the model section")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the processes are arranged; `replicate` × `dp` × `tp` is their number, `tp` varying fastest.

    Attributes:
        dp: ranks that share the parameters among them (FSDP2); null is whatever the others leave.
        replicate: copies of that: plain DDP when dp and tp are 1, else HSDP.
        tp: ranks that share every matrix product of a layer (tensor parallel).
        partition_states: with DDP, spread the optimizer's states over the copies (ZeRO-1).
    """

    dp: int | None = None
    replicate: int = 1
    tp: int = 1
    partition_states: bool = False


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A mesh whose sizes have been judged; see `MeshConfig`."""

    replicate: int
    dp: int
    tp: int
    partition_states: bool

    @property
    def data_ranks(self) -> int:
        return self.replicate * self.dp

    def data_rank(self, rank: int) -> int:
        return rank // self.tp

    @property
    def layout(self) -> Literal["one process", "DDP", "FSDP2", "HSDP", "TP", "FSDP2 x TP", "HSDP x TP"]:
        if self.tp > 1:
            return "HSDP x TP" if self.replicate > 1 else "FSDP2 x TP" if self.dp > 1 else "TP"
        if self.dp > 1:
            return "HSDP" if self.replicate > 1 else "FSDP2"
        return "DDP" if self.replicate > 1 else "one process"


def model_config(config: ModelConfig, seq_len: int) -> PretrainedConfig:
    """The transformers config of a `ModelConfig`; reads the folder's config.json for `from_dir`.

    Raises:
        ValueError: for a missing folder, or sizes that make no model.
    """
    if config.from_dir is not None:
        if not (Path(config.from_dir) / "config.json").is_file():
            raise ValueError(f"model.from_dir='{config.from_dir}' holds no config.json")
        return AutoConfig.from_pretrained(config.from_dir, local_files_only=True, trust_remote_code=False)
    shape: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "from_dir"}
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"model.hidden_size={config.hidden_size} does not divide by "
            f"model.num_attention_heads={config.num_attention_heads}"
        )
    if config.max_position_embeddings is None:
        shape["max_position_embeddings"] = seq_len
    return LlamaConfig(**shape, attention_dropout=0.0, bos_token_id=None, eos_token_id=None)


def resolve_mesh(config: MeshConfig, model: PretrainedConfig, world_size: int) -> Mesh:
    """Judge a mesh against the number of processes and the model; uses no process group.

    Raises:
        ValueError: when the sizes do not multiply to `world_size`, TP does not divide the model, or states are to be
            partitioned on anything but DDP.
    """
    for name in ("replicate", "dp", "tp"):
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ValueError(f"mesh.{name}={size}: expected at least 1")
    others = config.replicate * config.tp
    if config.dp is None and world_size % others:
        raise ValueError(
            f"mesh: replicate={config.replicate} x tp={config.tp} does not divide the {world_size} processes; "
            "change them or torchrun's --nproc-per-node"
        )
    dp = world_size // others if config.dp is None else config.dp
    if dp * others != world_size:
        raise ValueError(
            f"mesh: replicate={config.replicate} x dp={dp} x tp={config.tp} = {dp * others}, but {world_size} "
            f"process(es) run; change the mesh, or start with torchrun --nproc-per-node {dp * others}"
        )
    if config.tp > 1:
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in sizes:
            size = getattr(model, name, None)
            if size is None:
                raise ValueError(
                    f"mesh.tp={config.tp}: a '{model.model_type}' has no {name}; TP is for the Llama family"
                )
            if size % config.tp:
                raise ValueError(f"mesh.tp={config.tp} does not divide the model's {name}={size}; choose a divisor")
    mesh = Mesh(replicate=config.replicate, dp=dp, tp=config.tp, partition_states=config.partition_states)
    if config.partition_states and mesh.layout != "DDP":
        raise ValueError(
            f"mesh.partition_states is for DDP (replicate > 1, dp = tp = 1), but this is {mesh.layout}, which "
            "partitions its states already or has nothing to partition over; remove it"
        )
    return mesh


def build_model(config: ModelConfig, shape: PretrainedConfig) -> nn.Module:
    """The whole model in fp32 on the host, the same on every rank that seeded alike.

    Each process holds it once in host memory before it is sharded: 4 bytes per parameter.
    """
    if config.from_dir is None:
        assert isinstance(shape, LlamaConfig)
        return LlamaForCausalLM(shape)
    return AutoModelForCausalLM.from_pretrained(
        config.from_dir,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,  # the other format is a pickle
    )


def device_mesh(mesh: Mesh, device: torch.device) -> DeviceMesh:
    """The (replicate, dp, tp) mesh over all processes."""
    return init_device_mesh(device.type, (mesh.replicate, mesh.dp, mesh.tp), mesh_dim_names=("replicate", "dp", "tp"))


def parallelize(
    model: nn.Module, mesh: Mesh, device: torch.device, *, bf16: bool, activation_checkpointing: bool
) -> nn.Module:
    """Spread `model`, in place, over the processes and put it on `device`.

    Args:
        model: as `build_model` returns it.
        mesh: more than one rank needs an initialised process group.
        device: this process's device.
        bf16: FSDP2 gathers bf16 copies and reduces gradients in fp32. (Without FSDP2, use autocast.)
        activation_checkpointing: recompute each layer's activations in the backward pass.

    Returns:
        What to call in training: the DDP wrapper, else `model` itself.
    """
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if mesh.layout == "one process":
        return model.to(device)

    axes = device_mesh(mesh, device)
    layers: nn.ModuleList = model.model.layers  # type: ignore[union-attr,assignment]
    if mesh.tp > 1:
        model.to(device)
        for layer in layers:
            parallelize_module(layer, axes["tp"], TP_PLAN)
    if mesh.layout == "DDP":
        model.to(device)
        group = axes["replicate"].get_group()
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, process_group=group
        )
    if mesh.data_ranks > 1:
        shard_mesh = axes["replicate", "dp"] if mesh.replicate > 1 else axes["dp"]
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if bf16
            else MixedPrecisionPolicy()
        )
        for layer in layers:
            fully_shard(layer, mesh=shard_mesh, mp_policy=policy)
        fully_shard(model, mesh=shard_mesh, mp_policy=policy)
    return model


def casts_parameters(mesh: Mesh) -> bool:
    """Whether FSDP2 casts the parameters itself for mixed precision, so that autocast is not needed."""
    return mesh.layout not in ("one process", "DDP", "TP")


def set_gradient_sync(module: nn.Module, on: bool) -> None:
    """Reduce gradients over the data ranks in the next backward pass, or only accumulate them locally.

    Call it before the forward pass: DDP prepares its buckets there.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = on
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)


def reshard(module: nn.Module) -> None:
    """Give up the parameters that FSDP2 keeps gathered after a forward pass without a backward pass.

    Of the root it does, and `model.parameters()` are then not those that the optimizer and a checkpoint know.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


def state_process_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """The ranks over which the optimizer partitions its states; None leaves them as the parameters lie."""
    return dist.group.WORLD if mesh.partition_states else None


def export_model(model: nn.Module, path: Path, *, write: bool) -> None:
    """Gather the whole weights, on the host, and write them as a transformers folder (config.json, safetensors).

    Collective; `write` is true on the one rank that writes.
    """
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if write:
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(path, state_dict=weights)  # type: ignore[operator]
