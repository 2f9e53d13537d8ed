"""`distopt plan`: what an optimizer costs on a mesh that need not exist.

    distopt plan --model config.json --mesh dp=128,tp=8 --optimizer muon --optimizer.ns gram
    distopt plan --model config.json --mesh dp=64 --compare adamw,muon,soap,shampoo --png loads.png

The model is built on the meta device, sharded as FSDP2 with tensor parallelism would, and routed to rules as
`create_optimizer` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distopt.build import model_of_shapes, parameter_groups
from distopt.cli.tables import OnPaper, comparison, draw, table
from distopt.options import check_options, complete_group, known_options, optimizer_defaults
from distopt.plan.buckets import Spec
from distopt.plan.build import plan_group
from distopt.plan.cost import Rates, load_rates
from distopt.plan.paper import Mesh, loads_of, tensor_parallel_dim
from distopt.state.grouping import planned_group


def add_command(commands: Any) -> None:
    """Declare `distopt plan`."""
    parser = commands.add_parser(
        "plan",
        help="what an optimizer costs on a mesh that need not exist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a transformers config (JSON file, or folder with config.json), or a JSON object of name → shape",
    )
    parser.add_argument(
        "--mesh", required=True, help="sizes of the axes replicate (HSDP, DDP), dp (FSDP2), tp: dp=128,tp=8"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--optimizer", help="a rule; its options follow as --optimizer.NAME VALUE")
    what.add_argument("--compare", help="several, with commas; each takes those --optimizer.NAME that it has")
    parser.add_argument(
        "--rest", default="adamw", help="the rule for what a matrix rule does not take; --rest.NAME VALUE"
    )
    parser.add_argument("--partition", action="store_true", help="replicas partition states and work (process_group=)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="decides dtypes and the default rates"
    )
    parser.add_argument("--rates", help="h100, cpu, or a file of `distopt calibrate`; the device's preset by default")
    parser.add_argument("--json", type=Path, help="write everything here, loads of each rank included")
    parser.add_argument("--png", type=Path, help="draw the load of each rank")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Plan, print, write."""
    options = read_options(rest, [f"--{name.replace('_', '-')}" for name in vars(arguments)])
    mesh = Mesh.parse(arguments.mesh)
    gpu = arguments.device == "cuda"
    rates = load_rates(arguments.rates or ("h100" if gpu else "cpu"))
    model = read_model(arguments.model)
    names = [arguments.optimizer] if arguments.optimizer else arguments.compare.split(",")
    own = [{k: v for k, v in options["optimizer"].items() if arguments.optimizer or _has(name, k)} for name in names]
    for key in options["optimizer"]:
        if not any(key in found for found in own):
            raise ValueError(f"--optimizer.{key}: none of {', '.join(names)} has this option")
    plans = [
        plan_model(
            model, name, mesh, rates, gpu=gpu, partition=arguments.partition, rest=arguments.rest,
            rest_options=options["rest"] or None, **given,
        )
        for name, given in zip(names, own)
    ]  # fmt: skip
    baseline = plan_model(model, "adamw", mesh, rates, gpu=gpu, partition=arguments.partition)
    print(f"{Path(arguments.model).name} on {mesh.size:,} ranks ({arguments.mesh}); rates: {rates.name}")
    for plan in plans:
        print(f"\n{table(plan, baseline)}")
    if len(plans) > 1:
        print(f"\n{comparison(plans, baseline)}")
    if arguments.json:
        record = {
            "model": arguments.model,
            "mesh": asdict(mesh),
            "rates": asdict(rates),
            "adamw_seconds": baseline.seconds,
            "plans": [plan.record() for plan in plans],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.png:
        draw(plans, arguments.png, f"{Path(arguments.model).name}, {arguments.mesh}")


def plan_model(
    model: nn.Module,
    name: str,
    mesh: Mesh,
    rates: Rates,
    *,
    gpu: bool,
    partition: bool = False,
    lr: float = 1e-3,
    **options: Any,
) -> OnPaper:
    """Plan one optimizer for a model, which may be on the meta device.

    Args:
        name: of a rule; `options` are those of `create_optimizer`.
        gpu: whether rules compute as on a GPU (dtypes).
        partition: replicas partition states and work over themselves, as with `process_group=`.

    Raises:
        ValueError: a mesh, a parameter or an option that cannot be served.
    """
    groups, own, _ = parameter_groups(name, model, lr=lr, **options)
    check_options(name, own)
    if partition and (mesh.dp > 1 or mesh.tp > 1):
        raise ValueError(
            f"partitioning is for replicas of plain parameters; mesh {mesh} shards them already: leave it out"
        )
    tp_dims = {key: tensor_parallel_dim(key, tuple(p.shape)) for group in groups for key, p in group["params"]}
    if mesh.tp > 1 and not any(dim is not None for dim in tp_dims.values()):
        raise ValueError(
            f"mesh {mesh}: no parameter of this model has a tensor-parallel plan (known: the projections of Llama's "
            "family, q_proj … down_proj); use tp=1"
        )
    found = OnPaper(name, mesh.size)
    replicas = tuple(range(mesh.size)) if partition else None
    for number, group in enumerate(groups):
        rule_name = group.get("rule", name)
        check_options(rule_name, group.keys() - {"params", "rule"})
        complete = complete_group(group, optimizer_defaults(name, own))
        specs = []
        for key, param in group["params"]:
            layout = mesh.layout(tuple(param.shape), tp_dims[key])
            specs.append(Spec(key, layout, 0, param.dtype))
        plan = plan_group(planned_group(complete, specs, replicas, gpu=gpu, rates=rates), 0)
        title = f"{number} ({rule_name})"
        found.rows += [(title, strategy, loads) for strategy, loads in loads_of(plan, mesh, rates).items()]
    found.add_verdict(len(tp_dims), rates)
    return found


def read_model(source: str) -> nn.Module:
    """The model that a JSON file (or a folder's config.json) describes, on the meta device.

    Raises:
        ValueError: no such file, or neither a transformers config nor an object of name → shape.
        ImportError: a config, but transformers is not there.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--model {source}: no such file; give a JSON file, or a folder with config.json")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--model {source}: not JSON ({error})") from error
    if isinstance(content, dict) and "model_type" in content:
        return _from_config(content)
    if isinstance(content, dict) and content and all(_is_shape(shape) for shape in content.values()):
        return model_of_shapes({name: tuple(shape) for name, shape in content.items()})
    raise ValueError(f"--model {source}: neither a transformers config (no model_type) nor an object of name → [sizes]")


def read_options(words: Sequence[str], known: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{"optimizer": …, "rest": …} from `--optimizer.NAME VALUE` and `--rest.NAME=VALUE`; values are JSON, names of torch
    dtypes, or strings. `known` are the options that there are beside these.

    Raises:
        ValueError: anything else, or an option without a value.
    """
    found: dict[str, dict[str, Any]] = {"optimizer": {}, "rest": {}}
    queue = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while queue:
        word = queue.pop(0)
        target, _, name = word.removeprefix("--").partition(".")
        if not word.startswith("--") or target not in found or not name:
            near = get_close_matches(word, known, n=1)
            raise ValueError(
                f"unknown argument {word!r}{f', did you mean {near[0]}?' if near else ''}; options of a rule are "
                "--optimizer.NAME VALUE or --rest.NAME VALUE"
            )
        if not queue:
            raise ValueError(f"{word} needs a value")
        found[target][name] = _value(queue.pop(0))
    return found


def _value(text: str) -> Any:
    if isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    try:
        value = json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def _has(name: str, option: str) -> bool:
    return option in known_options(name)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and n >= 0 for n in value) and prod(value) > 0


def _from_config(content: dict[str, Any]) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "a transformers config needs transformers (pip install 'distopt[launch]'); a JSON object of name → shape does not"
        ) from error
    content = dict(content)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        model: nn.Module = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
    return model
