"""The settings of launch/pretrain.py: frozen dataclasses that the YAML files in configs/ mirror, field by field."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data import DataConfig
from model import MeshConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What `distopt.create_optimizer` is given.

    Attributes:
        name: the rule of the hidden matrices, or of everything if it is elementwise: muon, soap, adamw, ...
        lr: the peak learning rate; the schedule multiplies it.
        weight_decay: decoupled, times the learning rate.
        max_grad_norm: clip the global gradient norm to this; null does not clip.
        nonfinite: a NaN or Inf gradient on any rank stops the run, or skips the step on all; null does not look.
        options: further options of the rule, such as `momentum` or `betas`.
        estimate_every: with sophia_g and sophia_h, the steps from one estimate of the Hessian to the next. Tell sophia_g
            the labels in its mean by options.bs: train.batch_size times data.seq_len.
        rest: with a matrix rule, the rule of embeddings, head, norms and biases; null is distopt's default.
        rest_options: options of that rule.
    """

    name: str = "muon"
    lr: float = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    nonfinite: Literal["raise", "skip"] | None = "raise"
    options: dict[str, Any] = field(default_factory=dict)
    estimate_every: int = 10
    rest: str | None = None
    rest_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.estimate_every < 1:
            raise ValueError(f"optimizer.estimate_every={self.estimate_every}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over `train.steps`; see distopt.schedules.

    Attributes:
        kind: what follows the warmup: cosine, linear, inverse_sqrt, cyclic, constant, or wsd: stable, then decay.
        warmup_steps: steps of linear warmup.
        decay_steps: with wsd only: steps of decay at the end; null is a fifth of the run.
        decay_shape: with wsd only.
        cycle_steps: with cyclic only: length of a cycle; null is a fifth of the run.
        min_lr_ratio: the last (cyclic: the lowest) learning rate over the peak; inverse_sqrt and constant have none.
    """

    kind: Literal["cosine", "wsd", "linear", "inverse_sqrt", "cyclic", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay_shape: Literal["linear", "sqrt", "cosine"] | None = None
    cycle_steps: int | None = None
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.kind != "wsd" and (self.decay_steps is not None or self.decay_shape is not None):
            raise ValueError(
                f"schedule.decay_steps and decay_shape belong to schedule.kind='wsd'; {self.kind} has neither"
            )
        if self.kind != "cyclic" and self.cycle_steps is not None:
            raise ValueError(f"schedule.cycle_steps belongs to schedule.kind='cyclic'; {self.kind} has none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per step, over all ranks: the same on any number of ranks.
        micro_batch_size: sequences per forward pass and rank; null is all of a rank's at once. Gradients accumulate.
        precision: bf16 is mixed: weights, gradients and states stay fp32.
        z_loss: weight of the mean squared log-partition (Chowdhery et al. 2022, PaLM, section 5), 0 for none.
        activation_checkpointing: recompute activations in the backward pass: less memory, a third more compute.
        device: auto is a GPU if there is one.
        deterministic: torch's deterministic algorithms, for a bit-exact resume on GPU; the CPU's are already.
    """

    steps: int = 300
    batch_size: int = 32
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    z_loss: float = 0.0
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and whether to continue.

    Attributes:
        every: steps between checkpoints; 0 saves after the last step only.
        keep: how many of the newest to keep.
        export: after the last step, write the weights as a transformers folder, `<logging.dir>/model`.
        resume: never starts afresh in a new folder; auto continues from the newest valid checkpoint in `logging.dir` if
            there is one; must fails if there is none.
    """

    every: int = 0
    keep: int = 2
    export: bool = True
    resume: Literal["never", "auto", "must"] = "never"

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(f"checkpoint: every={self.every}, keep={self.keep}: expected every >= 0 and keep >= 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation.

    Attributes:
        every: steps between evaluations; 0 evaluates after the last step only.
        sequences: how many, spread evenly over the validation text, the same every time.
        batch_size: sequences per forward pass and rank.
    """

    every: int = 0
    sequences: int = 128
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.every < 0 or self.sequences < 1 or self.batch_size < 1:
            raise ValueError("eval: expected every >= 0, sequences >= 1 and batch_size >= 1")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written where.

    Attributes:
        dir: the run's folder. A fresh run never writes into one that is in use: it appends -2, -3, ...
        every: steps between lines of metrics.
        tensorboard: write TensorBoard events.
    """

    dir: str = "runs/pretrain"
    every: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"logging.every={self.every}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run; every section is one of the classes above."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.optimizer.name == "sophia_h" and self.train.precision == "bf16":
            raise ValueError(
                "optimizer.name=sophia_h takes the difference of two gradients, of which train.precision=bf16 leaves "
                "nothing: use fp32, or sophia_g"
            )
