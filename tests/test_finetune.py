"""Fine-tuning: all weights and LoRA, end to end on a tiny model; resume; what is chosen for a budget."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

import budget
import finetune
from budget import MemoryConfig, choose_memory, parse_bytes
from config import load_config
from instructions import IGNORED, ExamplesConfig, choose, load_examples, make_batch
from report import read_metrics

TINY = ["--model.dtype=float32", "--data.max_length=48", "--train.batch_size=4", "--logging.every=1",
        "--logging.tensorboard=false", "--val_examples=4", "--optimizer.lr=3e-3"]  # fmt: skip


def run(directory: Path, *arguments: str, steps: int = 6) -> list[dict[str, Any]]:
    finetune.main([*TINY, f"--logging.dir={directory}", f"--train.steps={steps}", *arguments])
    return read_metrics(directory)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    lines = [{"instruction": f"double {n}", "input": "please", "output": f"{2 * n}"} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_all_weights_are_trained_and_saved_where_from_pretrained_finds_them(tmp_path: Path, instructions: Path) -> None:
    lines = run(tmp_path / "run", f"--data.path={instructions}", "--memory.state_codec=int8", steps=12)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    saved = tmp_path / "run" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    _, held_out, _ = load_examples(ExamplesConfig(path=str(instructions), max_length=48), tokenizer)
    again = finetune.evaluate(model, tokenizer, held_out[:4], 4, torch.device("cpu"))
    assert again == pytest.approx(lines[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("merged", ["true", "false"])
def test_lora_trains_few_weights_and_saves_an_adapter_or_a_whole_model(tmp_path: Path, merged: str) -> None:
    import peft

    base = tmp_path / "base"
    run(base, steps=1)
    lines = run(tmp_path / "lora", f"--model.path={base / 'model'}", "--method.kind=lora", f"--method.merged={merged}")
    cls = transformers.AutoModelForCausalLM if merged == "true" else peft.AutoPeftModelForCausalLM
    model = cls.from_pretrained(tmp_path / "lora" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lora" / "model")
    _, held_out, _ = load_examples(ExamplesConfig(max_length=48), tokenizer)
    again = finetune.evaluate(model, tokenizer, held_out[:4], 4, torch.device("cpu"))
    assert again == pytest.approx(lines[-1]["val_loss"], rel=1e-4)


def test_an_adapter_of_the_built_in_model_finds_its_base(tmp_path: Path) -> None:
    import peft

    lines = run(tmp_path / "lora", "--method.kind=lora")
    for cls in (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        model = cls.from_pretrained(tmp_path / "lora" / "model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lora" / "model")
        _, held_out, _ = load_examples(ExamplesConfig(max_length=48), tokenizer)
        again = finetune.evaluate(model, tokenizer, held_out[:4], 4, torch.device("cpu"))
        assert again == pytest.approx(lines[-1]["val_loss"], rel=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "base")
    assert finetune.evaluate(base, tokenizer, held_out[:4], 4, torch.device("cpu")) > again + 0.01


@pytest.mark.parametrize("release", ["false", "true"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, release: str) -> None:
    options = ["--memory.state_codec=int8", f"--memory.step_in_backward={release}", "--train.micro_batch_size=2"]
    run(tmp_path / "whole", *options)
    run(tmp_path / "parts", *options, "--schedule.kind=constant", "--checkpoint.every=3", steps=3)
    run(tmp_path / "parts", *options, "--checkpoint.resume=must", "--schedule.kind=constant")
    run(tmp_path / "constant", *options, "--schedule.kind=constant")
    found, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("parts", "constant")
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_releasing_gradients_changes_nothing_but_the_norm_s_rounding(tmp_path: Path) -> None:
    usual = run(tmp_path / "usual", "--train.micro_batch_size=2")
    released = run(tmp_path / "released", "--train.micro_batch_size=2", "--memory.step_in_backward=true")
    for a, b in zip(usual, released, strict=True):
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-4)


def test_the_loss_is_on_the_response_alone() -> None:
    batch = make_batch([([5, 6, 7, 8], 2), ([9, 4], 0)], pad=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, 7, 8, IGNORED], [4, IGNORED, IGNORED, IGNORED]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_every_epoch_sees_every_example_once() -> None:
    numbers = [n for step in range(6) for n in choose(9, seed=1, step=step, batch_size=3)]
    assert sorted(numbers[:9]) == sorted(numbers[9:]) == list(range(9))
    assert numbers[:9] != numbers[9:]


def tiny() -> torch.nn.Module:
    return finetune.build_model(finetune.FinetuneConfig(), torch.device("cpu"))[0]


def chosen(limit: str | None, *, gpu: bool = False, **options: Any) -> budget.Choice:
    asked = MemoryConfig(budget=limit, **options)
    return choose_memory(asked, tiny(), "adamw", {}, sequences=4, length=64, gpu=gpu, pages=Path("pages"))


@pytest.mark.parametrize(
    ("gpu", "room", "place"), [(False, True, "disk:pages"), (True, True, "cpu"), (True, False, "disk:pages")]
)
def test_the_budget_decides_in_steps_and_each_fits(
    gpu: bool, room: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda: 1 << 30 if room else 1000)
    everything = chosen(None, gpu=gpu)
    assert (everything.state_codec, everything.step_in_backward, everything.activation_checkpointing) == (
        "fp32", False, False,
    )  # fmt: skip
    seen, limit = [], everything.total
    while True:
        try:
            choice = chosen(f"{limit - 1}B", gpu=gpu)
        except ValueError as error:
            assert "cannot hold this" in str(error)
            break
        assert choice.total < limit
        seen.append((choice.state_codec, choice.step_in_backward, choice.activation_checkpointing, choice.offload))
        limit = choice.total
    assert seen == [
        ("int8", False, False, None), ("int8", True, False, None), ("int8", True, True, None), ("int8", True, True, place),
    ]  # fmt: skip


def test_pages_in_the_memory_that_the_budget_is_of_save_nothing() -> None:
    resident, paged = chosen(None, state_codec="int8"), chosen(None, state_codec="int8", offload="cpu")
    assert paged.total > resident.total
    assert chosen(None, state_codec="int8", offload="cpu", gpu=True).total < resident.total


def test_a_budget_that_nothing_else_fits_pages_states_to_files_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(finetune.FinetuneConfig, TINY)
    model = finetune.build_model(config, torch.device("cpu"))[0]
    asked = MemoryConfig(state_codec="int8", step_in_backward=True, activation_checkpointing=True)
    pages = tmp_path / "paged" / "pages"
    smallest = choose_memory(asked, model, "adamw", {}, sequences=4, length=48, gpu=False, pages=pages)
    limit = f"--memory.budget={smallest.total - 1}B"
    finetune.main([*TINY, limit, f"--logging.dir={tmp_path / 'paged'}", "--explain=true"])
    assert f"adamw, int8, on disk:{pages}" in capsys.readouterr().out
    assert not pages.exists()
    same = ["--memory.state_codec=int8", "--memory.step_in_backward=true", "--memory.activation_checkpointing=true"]
    run(tmp_path / "paged", limit, steps=3)
    assert pages.exists()
    run(tmp_path / "resident", *same, steps=3)
    found, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("paged", "resident")
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_is_asked_for_is_kept() -> None:
    with pytest.raises(ValueError, match="state_codec=fp32, step_in_backward=False"):
        chosen("1MiB", state_codec="fp32", step_in_backward=False, activation_checkpointing=False)
    assert chosen(None, state_codec="int4").state_codec == "int4"


def test_the_parts_are_those_of_the_tensors_that_are_made(tmp_path: Path) -> None:
    model, choice = tiny(), chosen(None, state_codec="int8")
    import distopt

    optimizer = distopt.create_optimizer("adamw", model, lr=1e-3, state_codec="int8")
    assert choice.parts["states"] == optimizer.plan.summary()["state_bytes"]
    assert choice.parts["parameters"] == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method.kind=qlora", "--train.device=cpu"], "needs a GPU"),
        (["--memory.budget=lots"], "expected a number and one of"),
        (["--memory.budget=1KiB"], "cannot hold this"),
        (["--data.path=nowhere.jsonl"], "no such file"),
        (["--train.batch_size=4", "--train.micro_batch_size=3"], "is no multiple of"),
        (["--memry.budget=1GiB"], "did you mean"),
        (["--train.steps=5", "--schedule.warmup_steps=6"], "schedule.warmup_steps=6: expected 0 to train.steps=5"),
    ],
)
def test_bad_settings_end_before_anything_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        finetune.main([*TINY, f"--logging.dir={tmp_path / 'run'}", *arguments])
    assert not (tmp_path / "run").exists()


def test_explain_prints_what_will_be_used_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main([*TINY, f"--logging.dir={tmp_path / 'run'}", "--explain=true", "--memory.budget=1GiB"])
    assert "bytes of states" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_sizes_have_units() -> None:
    assert [parse_bytes(text) for text in ("8GiB", "1.5 MB", "12 B")] == [8 * 2**30, 1_500_000, 12]
    with pytest.raises(ValueError, match="a number and one of B, KiB"):
        parse_bytes("16")
