"""Train with the Transformers Trainer and any optimizer of distopt, on one process or many, on CPU (gloo) or GPU (nccl).

    python launch/train_hf.py --config configs/train_hf.yaml --optim distopt_soap --learning_rate 3e-3
    torchrun --standalone --nproc-per-node 2 launch/train_hf.py --config configs/train_hf.yaml

With DeepSpeed add `--deepspeed configs/train_hf_zero2.json`; for FSDP2 see configs/train_hf_fsdp2.yaml.
Made to be copied: two lines of it are distopt's, the import and `register()`. Options are transformers' TrainingArguments
and the few of `Settings`, in YAML or on the command line, which wins.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from config import check_yaml
from data import Corpus, DataConfig, load_corpora, validation_starts
from model import ModelConfig, build_model, model_config
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

import distopt.integrations.transformers
from distopt.comm.ending import leave


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained on what.

    Attributes:
        model_dir: a local folder with config.json and safetensors; without it a Llama of the sizes below, from scratch.
        data_path: a text file or a folder of them; without it the source of Python's standard library, as bytes.
        tokenizer_dir: a local tokenizer folder; without it text is read as bytes (vocabulary of 256).
        seq_len: tokens per sequence.
        eval_sequences: how many held-out sequences the loss is taken over.
    """

    model_dir: str | None = None
    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    data_path: str | None = None
    tokenizer_dir: str | None = None
    seq_len: int = 256
    eval_sequences: int = 128


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`count` sequences, spread evenly over a corpus."""

    def __init__(self, corpus: Corpus, count: int, vocab_size: int) -> None:
        self.corpus, self.starts, self.vocab_size = corpus, validation_starts(corpus, count), vocab_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.corpus.read(self.starts[index : index + 1], self.vocab_size)[0, :-1]
        return {"input_ids": tokens, "labels": tokens}


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments and their YAML file say, evaluate, and save the model."""
    distopt.integrations.transformers.register()  # from here on `optim` may be distopt_<name>
    try:
        settings, args = parse(arguments)
        sizes = {f.name: getattr(settings, f.name) for f in fields(ModelConfig) if hasattr(settings, f.name)}
        config = ModelConfig(from_dir=settings.model_dir) if settings.model_dir else ModelConfig(**sizes)
        shape = model_config(config, settings.seq_len)
        train_data, val_data = load_corpora(
            DataConfig(path=settings.data_path, tokenizer=settings.tokenizer_dir, seq_len=settings.seq_len)
        )
    except ValueError as error:
        sys.exit(f"{error}")
    torch.manual_seed(args.seed)
    model = build_model(config, shape)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Sequences(train_data, train_data.tokens // settings.seq_len, shape.vocab_size),
        eval_dataset=Sequences(val_data, settings.eval_sequences, shape.vocab_size),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        optim = OptimizerNames(args.optim).value
        print(f"validation loss {loss:.4f} {val_data.unit} after {trainer.state.global_step} steps with {optim}")


def parse(arguments: Sequence[str]) -> tuple[Settings, TrainingArguments]:
    """`--config file.yaml`, whose keys are the options, then options, which win.

    `resume_from_checkpoint` may be "auto": the newest checkpoint in `output_dir`, if there is one.

    Raises:
        ValueError: for a key that is unknown (with the nearest known one) or given twice, or an unknown `optim`.
    """
    kinds: Any = (Settings, TrainingArguments)
    parser = HfArgumentParser(kinds)
    parser.add_argument("--config", type=Path)
    if not torch.cuda.is_available():
        parser.set_defaults(use_cpu=True, ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None)
        if any(argument.startswith("--deepspeed") for argument in arguments):
            _let_deepspeed_use_gloo()
    keys = [field.name for kind in kinds for field in fields(kind)]
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, given, value = argument.partition("=")
        value = value if given else following
        if flag == "--config":
            check_yaml(Path(value), [*keys, *(f"{key}.*" for key in keys)])
            parser.set_defaults(**(yaml.safe_load(Path(value).read_text()) or {}))
        elif flag == "--optim":
            OptimizerNames(value)  # names the nearest, which argparse does not
    found: tuple[Any, ...] = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    settings, args = found[:2]
    if args.resume_from_checkpoint == "auto":
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    return settings, args


def _let_deepspeed_use_gloo() -> None:
    """On a CPU. Its own all-reduce would first be compiled, for a minute and a half."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        sys.exit("--deepspeed needs DeepSpeed: pip install distopt[deepspeed]")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
