"""The main job: its settings, its data, its layouts, and runs from start to finish, resumed and not."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import distopt.checkpoint
from tests.distributed.pool import pool

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launch"))  # as when its scripts run

import checkpoints  # noqa: E402
import config as config_loader  # noqa: E402
import curvature  # noqa: E402
import data  # noqa: E402
import model as model_building  # noqa: E402
import pretrain  # noqa: E402
from settings import Config  # noqa: E402

TINY = [
    *("--model.hidden_size", "32", "--model.intermediate_size", "48", "--model.num_hidden_layers", "2"),
    *("--model.num_attention_heads", "4", "--data.seq_len", "16", "--train.batch_size", "8", "--eval.sequences", "11"),
    *("--eval.batch_size", "4", "--logging.every", "1", "--logging.tensorboard", "false", "--optimizer.lr", "1e-2"),
]


def load(*arguments: str) -> Config:
    return config_loader.load_config(Config, arguments)


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Twenty small files of text, some of them empty."""
    folder = tmp_path / "text"
    (folder / "deeper").mkdir(parents=True)
    for index in range(20):
        place = folder / "deeper" if index % 2 else folder
        (place / f"{index:02}.txt").write_text(f"file {index}: the quick brown fox, {index**3} times. " * (index % 7))
    return folder


# Settings


def test_yaml_exponent_without_a_dot_is_a_float(tmp_path):
    config = load("--config", yaml_file(tmp_path, "optimizer:\n  lr: 1e-3\n  options: {eps: 1e-9}\n"))
    assert config.optimizer.lr == 0.001
    assert config.optimizer.options == {"eps": 1e-9}


def test_command_line_wins_over_yaml_wherever_it_stands(tmp_path):
    path = yaml_file(tmp_path, "optimizer: {lr: 1e-3, weight_decay: 0.3}\n")
    config = load("--config", path, "--optimizer.lr", "3e-3", "--optimizer.options.momentum=0.9")
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.003, 0.3)
    assert config.optimizer.options == {"momentum": 0.9}


@pytest.mark.parametrize(
    "name", ["optimizer.weight_decay", "schedule.min_lr_ratio", "data.val_fraction", "train.z_loss"]
)
def test_explicit_zero_is_kept_or_refused_but_never_replaced(tmp_path, name):
    section, field = name.split(".")
    path = yaml_file(tmp_path, f"{section}:\n  {field}: 0\n")
    if name == "data.val_fraction":
        with pytest.raises(ValueError, match="val_fraction=0"):
            load("--config", path)
    else:
        assert getattr(getattr(load("--config", path), section), field) == 0


def test_duplicate_yaml_key_is_an_error_with_both_lines(tmp_path):
    path = yaml_file(tmp_path, "seed: 1\noptimizer:\n  lr: 1e-3\n  name: muon\n  lr: 2e-3\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml, line 5: 'optimizer.lr' is given twice, first on line 3"):
        load("--config", path)


def test_duplicate_key_is_found_in_a_free_dictionary_too(tmp_path):
    path = yaml_file(tmp_path, "optimizer:\n  options:\n    eps: 1\n    eps: 2\n")
    with pytest.raises(ValueError, match=r"line 4: 'optimizer.options.eps' is given twice"):
        load("--config", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimizer:\n  wieght_decay: 1e-3\n",
            r"line 2: 'optimizer.wieght_decay'.*did you mean 'optimizer.weight_decay'",
        ),
        ("optimzer:\n  lr: 1e-3\n", r"line 1: 'optimzer'.*did you mean 'optimizer'"),
        ("train:\n  lr: 1e-3\n", r"'train.lr'.*did you mean 'optimizer.lr'"),
        ("optimizer:\n  lr:\n    peak: 1\n", r"'optimizer.lr' is not an option"),
        ("- seed\n", "expected keys with values"),
        ("seed: [1\n", "not valid YAML"),
    ],
)
def test_unknown_yaml_key_is_an_error_with_the_nearest_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load("--config", yaml_file(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr", "1"], "--optimizer.lrr is not an option; did you mean 'optimizer.lr'"),
        (["--optimzer.lr=1"], "--optimzer.lr is not an option; did you mean 'optimizer.lr'"),
        (["--optimizer.l", "1"], "--optimizer.l is not an option"),
        (["--mesh", "x.yaml"], "--mesh is not an option"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--model.from_dir", "x", "--model.hidden_size", "64"], "from_dir already fixes hidden_size"),
        (["--schedule.decay_steps", "5"], "belong to schedule.kind='wsd'"),
        (["--schedule.cycle_steps", "5"], "belongs to schedule.kind='cyclic'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("pretrain*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_mesh_batch_and_schedule_fit(path):
    config = load("--config", str(path))
    shape = model_building.model_config(config.model, config.data.seq_len)
    world_size = (config.mesh.dp or 2) * config.mesh.replicate * config.mesh.tp
    mesh = model_building.resolve_mesh(config.mesh, shape, world_size)
    assert pretrain.resolve_micro_batch(config, mesh) >= 1
    assert pretrain.build_schedule(config)(config.train.steps) == config.schedule.min_lr_ratio


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "inverse_sqrt", "cyclic", "constant"])
def test_every_kind_of_schedule_warms_up_to_the_peak(kind):
    schedule = pretrain.build_schedule(load("--schedule.kind", kind, "--schedule.warmup_steps", "5"))
    assert [schedule(step) for step in (0, 5)] == [0.2, 1.0]


# Mesh


def resolve(world_size: int, *arguments: str) -> model_building.Mesh:
    config = load(*TINY, *arguments)
    shape = model_building.model_config(config.model, config.data.seq_len)
    return model_building.resolve_mesh(config.mesh, shape, world_size)


@pytest.mark.parametrize(
    ("world_size", "arguments", "layout"),
    [
        (1, [], "one process"),
        (4, [], "FSDP2"),
        (4, ["--mesh.replicate", "4"], "DDP"),
        (4, ["--mesh.replicate", "2"], "HSDP"),
        (4, ["--mesh.tp", "4"], "TP"),
        (4, ["--mesh.tp", "2"], "FSDP2 x TP"),
        (8, ["--mesh.tp", "2", "--mesh.replicate", "2"], "HSDP x TP"),
    ],
)
def test_sizes_choose_the_layout(world_size, arguments, layout):
    assert resolve(world_size, *arguments).layout == layout


@pytest.mark.parametrize(
    ("world_size", "arguments", "message"),
    [
        (4, ["--mesh.dp", "3"], "= 3, but 4 process.*--nproc-per-node 3"),
        (1, ["--mesh.dp", "2"], "= 2, but 1 process.*--nproc-per-node 2"),
        (4, ["--mesh.tp", "3"], "tp=3 does not divide the 4 processes"),
        (4, ["--mesh.dp", "0"], "mesh.dp=0"),
        (8, ["--mesh.tp", "8"], "tp=8 does not divide the model's num_attention_heads=4"),
        (3, ["--mesh.tp", "3"], "tp=3 does not divide the model's hidden_size=32"),
        (2, ["--mesh.tp", "2", "--model.num_key_value_heads", "1"], "num_key_value_heads=1"),
        (2, ["--mesh.partition_states", "true"], "partition_states is for DDP.*this is FSDP2"),
    ],
)
def test_wrong_mesh_is_refused(world_size, arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(world_size, *arguments)


@pytest.mark.parametrize("arguments", [["--mesh.dp", "3"], ["--mesh.tp", "4", "--model.num_attention_heads", "2"]])
def test_wrong_mesh_is_refused_before_any_process_group(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")

    def refuse(*args, **kwargs):
        raise AssertionError("a process group was started")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    with pytest.raises(SystemExit, match="mesh"):
        pretrain.main([*TINY, *arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.batch_size", "6"], "batch_size=6 does not divide by 4"),
        (["--train.micro_batch_size", "3"], "choose a multiple of 12"),
        (["--train.micro_batch_size", "0"], "does not divide"),
    ],
)
def test_batch_that_does_not_divide_is_refused(arguments, message):
    config = load(*TINY, *arguments)
    with pytest.raises(ValueError, match=message):
        pretrain.resolve_micro_batch(config, resolve(4, *arguments))


# Data


def corpora(*arguments: str) -> tuple[data.Corpus, data.Corpus]:
    return data.load_corpora(load(*arguments).data)


def test_standard_library_is_split_by_file_and_holds_no_file_twice():
    train, val = corpora()
    assert train.unit == "nats/byte"
    assert 0.01 < val.tokens / (train.tokens + val.tokens) < 0.12
    held_out = bytes(val.arrays[0]).split(b"\0")
    trained_on = set(bytes(train.arrays[0]).split(b"\0"))
    assert [text for text in held_out if len(text) > 200 and text in trained_on] == []
    again, _ = corpora()
    assert again.fingerprint() == train.fingerprint()


def test_a_file_keeps_its_side_when_others_are_added(text_folder):
    arguments = ["--data.path", str(text_folder), "--data.val_fraction", "0.3", "--data.seq_len", "8"]
    _, before = corpora(*arguments)
    for index in range(20):
        (text_folder / f"new{index}.txt").write_text(f"another text {index} " * 9)
    train, after = corpora(*arguments)
    old = {text for text in bytes(before.arrays[0]).split(b"\0") if text}
    assert old <= set(bytes(after.arrays[0]).split(b"\0"))
    assert old.isdisjoint(bytes(train.arrays[0]).split(b"\0"))


def test_two_files_give_one_to_each_side_whatever_the_fraction(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    for fraction in ("0.0001", "0.9999"):
        train, val = corpora("--data.path", str(tmp_path), "--data.val_fraction", fraction, "--data.seq_len", "8")
        assert (train.tokens, val.tokens) == (51, 51)


def test_single_file_holds_out_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 101)))
    train, val = corpora("--data.path", str(path), "--data.val_fraction", "0.2", "--data.seq_len", "8")
    assert bytes(np.concatenate([train.arrays[0], val.arrays[0]])) == bytes(range(1, 101)) + b"\0"
    assert val.tokens == 20


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_are_mapped_and_no_sequence_crosses_files(tmp_path, dtype):
    (tmp_path / "train").mkdir()
    for index in range(3):  # file i holds tokens 100 i, 100 i + 1, …
        np.arange(100 * index, 100 * index + 20 + index, dtype=dtype).tofile(tmp_path / "train" / f"{index}.bin")
    (tmp_path / "train" / "empty.bin").touch()
    np.arange(40, dtype=dtype).tofile(tmp_path / "val.bin")
    arguments = ["--data.path", str(tmp_path / "train"), "--data.val_path", str(tmp_path / "val.bin")]
    train, val = corpora(*arguments, "--data.bin_dtype", dtype, "--data.seq_len", "8")
    assert (train.unit, train.tokens, val.tokens) == ("nats/token", 63, 40)
    rows = train.read(np.arange(train.ends[-1]), vocab_size=65536)
    assert rows.shape == (12 + 13 + 14, 9)
    assert (rows.diff(dim=1) == 1).all()
    assert rows[:, 0].tolist() == [*range(12), *range(100, 113), *range(200, 214)]
    assert isinstance(train.arrays[-1], np.memmap)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"a.bin": b"123"}, [], "a.bin' is no whole number of uint16 tokens; check data.bin_dtype"),
        ({"a.bin": b"12", "b.txt": b"x"}, [], "mixes .bin files with others such as 'b.txt'"),
        ({"a.txt": b"x"}, ["--data.pattern", "*.md"], "no file matches"),
        ({"a.txt": b"too short"}, [], "training data: .*17 tokens"),
        ({"a.txt": b"long enough for training only " * 2}, [], "validation data: .*17 tokens"),
    ],
)
def test_unusable_data_is_refused(tmp_path, content, arguments, message):
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        corpora("--data.path", str(tmp_path), "--data.seq_len", "16", *arguments)


def test_missing_path_is_refused():
    with pytest.raises(ValueError, match="'nowhere' does not exist"):
        corpora("--data.path", "nowhere")


def test_token_outside_the_vocabulary_is_refused():
    corpus = data.Corpus([np.arange(300, dtype=np.uint16)], 8, "training")
    with pytest.raises(ValueError, match=r"token 299, but the model's vocabulary has 256; raise model.vocab_size"):
        corpus.read(np.array([0, 291]), vocab_size=256)


def test_tokenizer_folder_is_used_and_ends_each_document(tmp_path, text_folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<end>", "?", "file", "the", "quick", "brown", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="?").save_pretrained(
        tmp_path / "tok"
    )
    train, val = corpora(
        "--data.path", str(text_folder), "--data.tokenizer", str(tmp_path / "tok"), "--data.seq_len", "8"
    )
    tokens = np.concatenate([train.arrays[0], val.arrays[0]])
    assert train.unit == "nats/token"
    assert tokens.max() == 6
    assert (tokens == words["<end>"]).sum() == 20
    assert (tokens == words["fox"]).sum() == sum(index % 7 for index in range(20))


def test_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.table.InMemoryTable.from_pydict({"body": [f"document {index} " * 5 for index in range(30)]})
    datasets.Dataset(table, fingerprint="given").save_to_disk(
        tmp_path / "d"
    )  # hashing fails with some pyarrow releases
    arguments = ["--data.dataset", str(tmp_path / "d"), "--data.seq_len", "8", "--data.val_fraction", "0.3"]
    with pytest.raises(ValueError, match=r"data\.text_field='text': the dataset has 'body'"):
        corpora(*arguments)
    train, val = corpora(*arguments, "--data.text_field", "body")
    assert sorted((bytes(train.arrays[0]) + bytes(val.arrays[0])).split(b"\0"))[1:] == sorted(
        f"document {index} ".encode() * 5 for index in range(30)
    )


def test_global_batch_depends_on_seed_and_step_but_not_on_the_number_of_ranks():
    corpus = data.Corpus([np.arange(5000, dtype=np.uint16)], 8, "training")

    def batch(step: int, ranks: int, micro: int, seed: int = 3) -> list[int]:
        parts = [
            data.training_starts(
                corpus, seed=seed, step=step, batch_size=24, ranks=ranks, rank=rank, micro_batch_size=micro
            )
            for rank in range(ranks)
        ]
        assert all(part.shape == (24 // ranks // micro, micro) for part in parts)
        return sorted(np.concatenate(parts, axis=None).tolist())

    assert batch(7, 1, 24) == batch(7, 1, 4) == batch(7, 2, 12) == batch(7, 4, 2) == batch(7, 3, 1)
    assert batch(7, 1, 24) != batch(8, 1, 24)
    assert batch(7, 1, 24) != batch(7, 1, 24, seed=4)


# Forward and backward passes


def passes(*arguments: str) -> pretrain.Passes:
    """One process on random tokens, fresh gradients, the same weights every time."""
    config = load(*TINY, *arguments)
    shape = model_building.model_config(config.model, config.data.seq_len)
    mesh = model_building.resolve_mesh(config.mesh, shape, 1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = model_building.parallelize(
        model_building.build_model(config.model, shape),
        mesh,
        device,
        bf16=config.train.precision == "bf16",
        activation_checkpointing=config.train.activation_checkpointing,
    )
    return pretrain.Passes(model, config, mesh, 0, device, shape.vocab_size)


def random_corpus(seq_len: int = 16) -> data.Corpus:
    return data.Corpus([np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8)], seq_len, "random")


def gradients(one: pretrain.Passes, micro_batch_size: int = 8) -> tuple[float, torch.Tensor]:
    loss = one.accumulate_gradients(random_corpus(), 5, micro_batch_size)
    return loss.item(), torch.cat([p.grad.flatten() for p in one.module.parameters()])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(micro_batch_size):
    loss, expected = gradients(passes())
    accumulated_loss, got = gradients(passes(), micro_batch_size)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(got, expected) < 1e-5  # fp32 sums in another order


def test_activation_checkpointing_changes_nothing():
    loss, expected = gradients(passes())
    recomputed_loss, got = gradients(passes("--train.activation_checkpointing", "true"))
    assert recomputed_loss == loss
    assert torch.equal(got, expected)


def test_bf16_is_close_to_fp32_and_not_the_same():
    loss, expected = gradients(passes())
    bf16_loss, got = gradients(passes("--train.precision", "bf16"))
    assert bf16_loss == pytest.approx(loss, rel=1e-2)
    assert 1e-5 < relative_error(got, expected) < 5e-2  # 8 bits of mantissa
    assert got.dtype == torch.float32


def test_z_loss_adds_the_mean_squared_log_partition_to_the_gradient_but_not_to_the_report():
    plain_loss, plain = gradients(passes())
    loss, got = gradients(passes("--train.z_loss", "0.1"))
    one = passes()
    starts = data.training_starts(random_corpus(), seed=0, step=5, batch_size=8, ranks=1, rank=0, micro_batch_size=8)[0]
    logits = one.module(input_ids=random_corpus().read(starts, 256)[:, :-1]).logits
    (0.1 * torch.logsumexp(logits, -1).square().mean()).backward()
    expected = plain + torch.cat([p.grad.flatten() for p in one.module.parameters()])
    assert loss == plain_loss
    assert relative_error(got, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-2


@pytest.mark.parametrize("batch_size", ["1", "4", "11", "64"])
def test_validation_counts_each_sequence_once_whatever_the_batch(batch_size):
    one, corpus = passes("--eval.batch_size", batch_size), random_corpus()
    rows = corpus.read(data.validation_starts(corpus, 11), 256)
    assert len(rows) == 11
    with torch.no_grad():
        logits = one.module(input_ids=rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten())
    assert one.evaluate(corpus) == pytest.approx(expected.item(), rel=1e-6)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def layout_run(arguments: list[str], world_size: int, folder: Path) -> tuple[float, torch.Tensor, float, torch.Tensor]:
    """Runs on every rank of a pool: training loss, gradient and validation loss; the weights after two steps, saved."""
    config = load(*TINY, *arguments)
    shape = model_building.model_config(config.model, config.data.seq_len)
    mesh = model_building.resolve_mesh(config.mesh, shape, world_size)
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    device, corpus = torch.device("cpu"), random_corpus()
    torch.manual_seed(0)
    raw = model_building.build_model(config.model, shape)
    wrapped = model_building.parallelize(
        raw,
        mesh,
        device,
        bf16=config.train.precision == "bf16",
        activation_checkpointing=config.train.activation_checkpointing,
    )
    optimizer = pretrain.build_optimizer(config.optimizer, raw, mesh)
    one = pretrain.Passes(wrapped, config, mesh, mesh.data_rank(rank), device, shape.vocab_size)
    loss = one.accumulate_gradients(corpus, 5, config.train.micro_batch_size or 8)
    (mean,) = pretrain.sum_over_ranks([loss.item() / world_size], device)
    gradient = torch.cat([whole(p.grad).flatten() for p in raw.parameters()])
    for step in (6, 7):
        assert pretrain.take_step(optimizer, config.optimizer) == 1
        one.accumulate_gradients(corpus, step, config.train.micro_batch_size or 8)
    optimizer.zero_grad()
    val_loss = one.evaluate(corpus)
    distopt.checkpoint.save(folder / mesh.layout, model=raw, optimizer=optimizer, extra={"layout": mesh.layout})
    return mean, gradient, val_loss, torch.cat([whole(p.detach()).flatten() for p in raw.parameters()])


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        (["--mesh.replicate", "4"], "DDP"),
        (["--mesh.replicate", "4", "--mesh.partition_states", "true"], "DDP"),
        ([], "FSDP2"),
        (["--train.activation_checkpointing", "true", "--model.tie_word_embeddings", "true"], "FSDP2"),
        (["--mesh.replicate", "2"], "HSDP"),
        (["--mesh.tp", "4"], "TP"),
        (["--mesh.tp", "2", "--train.activation_checkpointing", "true"], "FSDP2 x TP"),
        (["--mesh.tp", "2", "--mesh.replicate", "2"], "HSDP x TP"),
    ],
)
def test_every_layout_trains_as_one_process_and_its_checkpoint_loads_there(tmp_path, arguments, layout):
    pairs = list(zip(arguments[::2], arguments[1::2]))
    alone = [argument for pair in pairs if pair[0].startswith("--model") for argument in pair]
    loss, gradient, val_loss, weights = layout_run(alone, 1, tmp_path)
    results = pool(4).run("tests.test_pretrain:layout_run", [*arguments, "--train.micro_batch_size", "1"], 4, tmp_path)
    for rank_loss, rank_gradient, rank_val_loss, rank_weights in results:
        assert rank_loss == pytest.approx(loss, rel=1e-5)
        assert relative_error(rank_gradient, gradient) < 1e-5  # fp32 sums in another order,
        assert relative_error(rank_weights, weights) < 1e-4  # which Newton-Schulz and Adam's first steps amplify
        assert rank_val_loss == pytest.approx(val_loss, rel=1e-4)

    config = load(*TINY, *alone)
    model = model_building.build_model(config.model, model_building.model_config(config.model, config.data.seq_len))
    optimizer = pretrain.build_optimizer(config.optimizer, model, resolve(1))
    assert distopt.checkpoint.load(tmp_path / layout, model=model, optimizer=optimizer) == {"layout": layout}
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), results[0][-1])


@pytest.mark.parametrize(
    "arguments", [[], ["--mesh.replicate", "4"], ["--mesh.tp", "2"]], ids=["FSDP2", "DDP", "FSDP2xTP"]
)
def test_bf16_on_ranks_is_close_to_fp32_and_not_the_same(tmp_path, arguments):
    loss, gradient, *_ = layout_run([], 1, tmp_path)
    bf16 = [*arguments, "--train.precision", "bf16", "--train.micro_batch_size", "1"]
    for rank_loss, rank_gradient, _, weights in pool(4).run("tests.test_pretrain:layout_run", bf16, 4, tmp_path):
        assert rank_loss == pytest.approx(loss, rel=1e-2)
        assert 1e-4 < relative_error(rank_gradient, gradient) < 5e-2  # 8 bits of mantissa
        assert weights.dtype == rank_gradient.dtype == torch.float32


# Checkpoints


def test_random_numbers_continue_where_they_stood():
    torch.manual_seed(5)
    device = torch.device("cpu")
    torch.rand(3)
    states = json.loads(json.dumps(checkpoints.rng_states(device)))
    expected = torch.rand(4)
    torch.manual_seed(0)
    checkpoints.restore_rng(states, device, reseed=1)
    assert torch.equal(torch.rand(4), expected)


def test_random_numbers_of_other_ranks_are_reseeded_with_a_warning():
    device = torch.device("cpu")
    states = checkpoints.rng_states(device)
    states["cpu"] = states["cpu"] * 2
    with pytest.warns(UserWarning, match="of 2 process"):
        checkpoints.restore_rng(states, device, reseed=9)
    got = torch.rand(4)
    torch.manual_seed(9)
    assert torch.equal(got, torch.rand(4))


@pytest.mark.parametrize("absent", ["position", "schedule", "rng"])
def test_absent_piece_of_a_checkpoint_is_an_error(absent):
    extra = {name: {} for name in ("position", "schedule", "rng") if name != absent}
    with pytest.raises(ValueError, match=f"'some/step-1' holds no '{absent}'"):
        checkpoints.require(extra, Path("some/step-1"), "position", "schedule", "rng")


def test_position_in_other_data_is_an_error():
    with pytest.raises(ValueError, match="seed=1, now it is 2"):
        checkpoints.check_same_data({"data": "x", "seed": 1}, {"data": "x", "seed": 2}, Path("step-1"))
    with pytest.raises(ValueError, match="data=None, now it is 'x'"):
        checkpoints.check_same_data({}, {"data": "x"}, Path("step-1"))


def test_options_of_this_run_win_over_the_checkpoints_with_a_warning():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    mine = checkpoints.group_options(optimizer)
    optimizer.param_groups[0].update(lr=0.05, momentum=0.5)
    with pytest.warns(UserWarning, match=r"momentum=0\.5 in parameter group 0.*own setting, 0\.9") as caught:
        checkpoints.keep_options(optimizer, mine, Path("step-1"))
    assert len(caught) == 1
    assert checkpoints.group_options(optimizer) == mine


# Curvature


def test_a_difference_of_bf16_gradients_is_refused():
    with pytest.raises(ValueError, match="use fp32, or sophia_g"):
        load("--optimizer.name", "sophia_h", "--train.precision", "bf16")


def test_hutchinson_product_is_the_one_of_a_second_backward_pass():
    one = passes()
    batch = partial(one.accumulate_gradients, random_corpus(), 5, 8)
    before = [param.detach().clone() for param in one.module.parameters()]
    curvature.hutchinson_product(batch, one.module, seed=3)
    found = torch.cat([param.grad.flatten() for param in one.module.parameters()])
    assert all(map(torch.equal, before, one.module.parameters())), "weights come back bit for bit"

    starts = data.training_starts(random_corpus(), seed=0, step=5, batch_size=8, ranks=1, rank=0, micro_batch_size=8)
    params = list(one.module.parameters())
    signs = [curvature._signs(param, 3 + number) for number, param in enumerate(params)]
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second backward pass
        losses, _ = one.sequence_losses(random_corpus(), starts[0])
        first = torch.autograd.grad(losses.mean(), params, create_graph=True)
    product = torch.autograd.grad(sum((g * u).sum() for g, u in zip(first, signs)), params)
    exact = torch.cat([(u * h).flatten() for u, h in zip(signs, product)])
    assert relative_error(found, exact) < 2e-2  # a difference quotient of fp32 gradients


def test_sampled_labels_are_the_models_own():
    """Their mean gradient vanishes, and its size is the estimate; labels from the data have a mean."""
    one = passes()

    def mean_and_size(draws: int) -> tuple[float, float]:
        found = []
        for _ in range(draws):
            one.module.zero_grad()
            one.accumulate_gradients(random_corpus(), 5, 8, sampled=True)
            found.append(torch.cat([p.grad.flatten() for p in one.module.parameters()]))
        stack = torch.stack(found)
        return stack.mean(0).norm().item(), stack.norm(dim=1).mean().item()

    torch.manual_seed(0)
    mean, size = mean_and_size(draws=64)
    assert size > 0
    assert mean < 0.25 * size  # 1/8 expected of 64 independent draws


# Whole runs


def read_lines(run: Path) -> list[dict]:
    """The metrics that must repeat bit for bit: no times and no memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "loss", "lr", "grad_norm", "val_loss") if key in line} for line in lines
    ]


def saved_tensors(run: Path) -> dict[str, bytes]:
    """Every tensor of the run's exported model and of its checkpoints, as bytes."""
    return {
        f"{path.relative_to(run)}: {name}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for path in sorted(run.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def torchrun(folder: Path, processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(ROOT / "launch" / "pretrain.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_rank_leaves_whatever_its_threads_do():
    """A thread in torch while the interpreter ends aborts the process; `leave` gets past it, output and handlers too."""
    script = """
import atexit, threading, time
import torch
from distopt.comm.ending import leave

def add(x):
    started.set()
    while True:
        x + x

started = threading.Event()
threading.Thread(target=add, args=(torch.zeros(100_000),), daemon=True).start()
threading.Thread(target=lambda: (time.sleep(0.2), print("joined"))).start()
atexit.register(print, "handled")
started.wait()
leave()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    left = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (left.returncode, left.stdout, left.stderr) == (0, "joined\nhandled\n", "")


def interrupted_copy(run: Path, step: int, to: Path) -> None:
    """What is left of a run that was killed some time after its checkpoint of `step`."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if path.name > checkpoints.checkpoint_path(to, step).name:
            shutil.rmtree(path)
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


RUN = ["--train.steps", "6", "--checkpoint.every", "3", "--eval.every", "2", "--schedule.warmup_steps", "2"]


@pytest.mark.parametrize("rule", ["muon", "adamw", "sophia_g"])
def test_one_process_learns_and_resumes_bit_for_bit(tmp_path, text_folder, monkeypatch, capsys, rule):
    monkeypatch.chdir(tmp_path)
    arguments = [
        *TINY,
        *RUN,
        "--data.path",
        str(text_folder),
        "--optimizer.name",
        rule,
        "--train.micro_batch_size",
        "4",
    ]
    pretrain.main([*arguments, "--logging.dir", "whole"])
    out = capsys.readouterr().out
    lines = read_lines(tmp_path / "whole")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6]
    for row in ("state", "precision", "exchange", "loss"):
        assert f"\n{row} " in out
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 5000

    interrupted_copy(tmp_path / "whole", 3, tmp_path / "resumed")
    pretrain.main([*arguments, "--logging.dir", "resumed", "--checkpoint.resume", "must"])
    assert read_lines(tmp_path / "resumed") == lines
    assert saved_tensors(tmp_path / "resumed") == saved_tensors(tmp_path / "whole")
    assert any("momentum" in name or "exp_avg" in name for name in saved_tensors(tmp_path / "whole"))

    with pytest.raises(ValueError, match=r"train\.batch_size=8, now it is 16"):
        pretrain.main(
            [*arguments, "--logging.dir", "resumed", "--checkpoint.resume", "auto", "--train.batch_size", "16"]
        )


def test_two_ranks_resume_bit_for_bit_and_take_the_steps_of_one_process(tmp_path, text_folder, monkeypatch):
    arguments = [*TINY, *RUN, "--data.path", str(text_folder)]
    out = torchrun(tmp_path, 2, *arguments, "--logging.dir", "whole")
    assert "FSDP2: replicate 1 x dp 2 x tp 1" in out
    interrupted_copy(tmp_path / "whole", 3, tmp_path / "resumed")
    torchrun(tmp_path, 2, *arguments, "--logging.dir", "resumed", "--checkpoint.resume", "auto")
    assert read_lines(tmp_path / "resumed") == read_lines(tmp_path / "whole")
    assert saved_tensors(tmp_path / "resumed") == saved_tensors(tmp_path / "whole")
    assert any("momentum" in name or "exp_avg" in name for name in saved_tensors(tmp_path / "whole"))

    monkeypatch.chdir(tmp_path)
    pretrain.main([*arguments, "--logging.dir", "alone"])
    for one, two in zip(read_lines(tmp_path / "alone"), read_lines(tmp_path / "whole"), strict=True):
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-3)  # gradients summed in another order, six Muon steps


SOPHIA = ["--optimizer.estimate_every", "2", "--optimizer.lr", "1e-3", "--optimizer.name"]


def test_sophia_g_on_two_ranks_learns_and_resumes_bit_for_bit(tmp_path, text_folder):
    """Between its estimates, and with labels that every rank draws for its own sequences."""
    arguments = [*TINY, *RUN, "--data.path", str(text_folder), *SOPHIA, "sophia_g"]
    torchrun(tmp_path, 2, *arguments, "--logging.dir", "whole")
    losses = [line["loss"] for line in read_lines(tmp_path / "whole") if "loss" in line]
    assert losses[-1] < losses[0]
    interrupted_copy(tmp_path / "whole", 3, tmp_path / "resumed")
    torchrun(tmp_path, 2, *arguments, "--logging.dir", "resumed", "--checkpoint.resume", "must")
    saved = saved_tensors(tmp_path / "whole")
    assert saved_tensors(tmp_path / "resumed") == saved
    assert any("hessian" in name for name in saved)


def test_sophia_h_on_two_ranks_takes_the_steps_of_one_process(tmp_path, text_folder, monkeypatch):
    """Its random signs are those of whole parameters, so the estimate is that of one process up to the order of sums."""
    arguments = [*TINY, *RUN, "--data.path", str(text_folder), *SOPHIA, "sophia_h"]
    torchrun(tmp_path, 2, *arguments, "--logging.dir", "ranks")
    monkeypatch.chdir(tmp_path)
    pretrain.main([*arguments, "--logging.dir", "alone"])
    for one, two in zip(read_lines(tmp_path / "alone"), read_lines(tmp_path / "ranks"), strict=True):
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-3)


def test_a_fresh_run_never_writes_into_another_runs_folder(tmp_path, text_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "--train.steps", "1", "--data.path", str(text_folder), "--logging.dir", "runs/mine"]
    pretrain.main(arguments)
    first = (tmp_path / "runs/mine/metrics.jsonl").read_text()
    pretrain.main([*arguments, "--seed", "4"])
    assert (tmp_path / "runs/mine/metrics.jsonl").read_text() == first
    assert yaml.safe_load((tmp_path / "runs/mine-2/config.yaml").read_text())["seed"] == 4


def test_a_run_continues_from_an_exported_model_folder(tmp_path, text_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "--data.path", str(text_folder), "--train.steps", "3"]
    pretrain.main([*arguments, "--logging.dir", "first"])
    left = [argument for pair in zip(arguments[::2], arguments[1::2]) if "--model" not in pair[0] for argument in pair]
    pretrain.main([*left, "--model.from_dir", "first/model", "--logging.dir", "second", "--optimizer.lr", "0"])
    assert read_lines(tmp_path / "second")[-1]["val_loss"] == read_lines(tmp_path / "first")[-1]["val_loss"]


def test_resume_must_without_a_checkpoint_is_an_error(tmp_path, text_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="holds no valid checkpoint"):
        pretrain.main([*TINY, "--data.path", str(text_folder), "--checkpoint.resume", "must", "--logging.dir", "none"])
