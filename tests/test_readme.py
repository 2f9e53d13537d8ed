"""What the README says: files that it names are there, and its code runs as it is written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.report import fill

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_file_and_module_it_names_is_there() -> None:
    paths = set(re.findall(r"\b((?:launch|configs|tests|benchmarks|distopt)/[\w./-]+\.\w+)", README))
    modules = set(re.findall(r"python -m ((?:benchmarks|tests)\.[\w.]+)", README))
    assert len(paths) > 15 and len(modules) > 8
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
    assert not missing


def test_its_tables_are_those_of_the_results() -> None:
    assert fill(README) == README


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 2)).to(torch.bfloat16)
    names = {"model": model}
    ran = [block for block in blocks("python") if "distopt.integrations" not in block]
    assert len(ran) == 2
    for block in ran:
        if "checkpoint" in block:
            Path("runs").mkdir()
        exec(block, names)
    assert "AdamW on" in capsys.readouterr().out
    assert names["extra"] == {"step": 100}


def test_a_plan_is_made_as_it_says(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    [command] = [line for block in blocks("bash") for line in block.splitlines() if "distopt plan" in line]
    arguments = [sys.executable, *shlex.split(command)[1:]]
    path = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("adamw", "muon", "soap", "shampoo"))
    assert (tmp_path / "load.png").stat().st_size > 1000


def recipe(start: str) -> list[str]:
    """The command that begins so, as it is written."""
    [command] = [line for block in blocks("bash") for line in block.splitlines() if line.startswith(start)]
    return shlex.split(command)


def run_at_a_checkout(folder: Path, command: list[str]) -> str:
    """What a command says, in a folder that looks like the repository's."""
    for name in ("launch", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **more}, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_pretraining_recipe_trains(tmp_path: Path) -> None:
    short = "--train.steps 2 --schedule.warmup_steps 1 --eval.every 2 --eval.sequences 4 --checkpoint.every 2"
    said = run_at_a_checkout(tmp_path, [*recipe("torchrun --nproc-per-node 2 launch/pretrain.py"), *short.split()])
    assert "2 steps here" in said
    assert (tmp_path / "runs" / "pretrain_tiny").is_dir()


def test_the_fine_tuning_recipe_explains_what_it_would_use(tmp_path: Path) -> None:
    lines = [{"instruction": f"double {n}", "output": f"{2 * n}"} for n in range(60)]
    (tmp_path / "instructions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = "python launch/finetune.py --data.path instructions.jsonl --train.steps 1 --logging.dir made"
    run_at_a_checkout(tmp_path, made.split())
    (tmp_path / "made" / "model").rename(tmp_path / "my-model")
    said = run_at_a_checkout(tmp_path, recipe("python launch/finetune.py"))
    assert "(budget: 16GiB)" in said
