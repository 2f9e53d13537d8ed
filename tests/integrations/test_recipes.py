"""The README's recipes for trainers, run as they are written, on two ranks."""

import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import pool

pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate", minversion="1.13")

README = (Path(__file__).parents[2] / "README.md").read_text()
RECIPES = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "distopt.integrations." in block]


def test_there_is_a_recipe_of_each_trainer() -> None:
    assert len(RECIPES) == 3
    for name, text in zip(("transformers", "accelerate", "deepspeed"), RECIPES):
        assert f"import distopt.integrations.{name}" in text


def trainer(recipe: str) -> dict[str, str]:
    """Run by ranks: the rules after training with what the recipe made."""
    from transformers import Trainer, TrainingArguments

    from tests.integrations.training import model, on_cpu, sequences

    with on_cpu("ddp"):
        args = TrainingArguments(use_cpu=True, max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True)
        names: dict[str, Any] = {"Trainer": Trainer, "model": model(), "args": args, "data": sequences(32)}
        exec(recipe, names)
        names["trainer"].train()
        assert TrainingArguments(use_cpu=True, optim="distopt_muon").optim.value == "distopt_muon"
        return {name: rule for name, rule, _ in names["trainer"].optimizer.optimizer.routing}


def accelerate(recipe: str) -> dict[str, str]:
    """Run by ranks."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from tests.integrations.training import model, on_cpu, sequences

    with on_cpu("ddp"):
        accelerator = Accelerator(cpu=True)
        loader = DataLoader(sequences(32), batch_size=4)  # type: ignore[arg-type]
        names: dict[str, Any] = {"accelerator": accelerator, "model": model(), "loader": loader}
        exec(recipe, names)
        for batch in names["loader"]:
            accelerator.backward(names["model"](**batch).loss)
            names["optimizer"].step()
            names["optimizer"].zero_grad()
        return {name: rule for name, rule, _ in names["optimizer"].optimizer.routing}


def deepspeed(recipe: str, folder: str) -> dict[str, str]:
    """Run by ranks."""
    from tests.integrations import deepspeed_ranks

    deepspeed_ranks.connect()
    names: dict[str, Any] = {"deepspeed": deepspeed_ranks.deepspeed, "model": deepspeed_ranks.build()}
    with chdir(folder):
        exec(recipe, names)
    deepspeed_ranks.train(names["engine"], range(2))
    names["engine"].destroy()
    return {name: rule for name, rule, _ in names["optimizer"].routing}


HERE = "tests.integrations.test_recipes"


def test_the_trainers_recipe_trains() -> None:
    for routing in pool(2).run(f"{HERE}:trainer", RECIPES[0]):
        assert {"muon", "adamw"} == set(routing.values())


def test_accelerates_recipe_trains() -> None:
    for routing in pool(2).run(f"{HERE}:accelerate", RECIPES[1]):
        assert {"soap", "adamw"} == set(routing.values())


def test_deepspeeds_recipe_trains(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", minversion="0.19.8")
    [section] = re.findall(r"# ds.json: (.*)", RECIPES[2])
    (tmp_path / "ds.json").write_text(
        '{"train_micro_batch_size_per_gpu": 12, "zero_optimization": {"stage": 2}, ' + section + "}"
    )
    for routing in pool(2, "deepspeed").run(f"{HERE}:deepspeed", RECIPES[2], str(tmp_path)):
        assert {"muon", "adamw"} == set(routing.values())
