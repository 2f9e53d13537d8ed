"""The files of a native checkpoint: what is written comes back, on any cut, any number of ranks, in any dtype."""

import base64
import json
import math
import os
import random
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distopt.state import files
from distopt.state.files import Piece, check_writable, committed, write
from distopt.state.manifest import DTYPES, CheckpointError, Rect, view_2d
from distopt.state.reader import Reader, latest, prune
from tests.distributed.pool import pool


def whole(name: str, tensor: torch.Tensor) -> Piece:
    """All of a tensor as one piece."""
    rows, cols = view_2d(tensor.shape)
    return Piece(name, tuple(tensor.shape), (0, rows, 0, cols), tensor.reshape(rows, cols))


def tiles(rows: int, cols: int, chance: random.Random) -> list[Rect]:
    """A random cut of a matrix into disjoint rectangles, by splitting one at a time."""
    cut = [(0, rows, 0, cols)]
    for _ in range(chance.randrange(8)):
        r0, r1, c0, c1 = cut.pop(chance.randrange(len(cut)))
        if chance.random() < 0.5:
            middle = chance.randint(r0, r1)
            cut += [(r0, middle, c0, c1), (middle, r1, c0, c1)]
        else:
            middle = chance.randint(c0, c1)
            cut += [(r0, r1, c0, middle), (r0, r1, middle, c1)]
    return cut


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (6, 16 * dtype.itemsize), dtype=torch.uint8)
    tensor = values.view(dtype)
    write(tmp_path / "c", [whole("x", tensor)], {})
    with Reader(tmp_path / "c") as reader:
        assert reader.dtype("x") == dtype
        assert torch.equal(bits(reader.read("x")), values)
        assert torch.equal(bits(reader.read("x", (1, 5, 3, 12))), bits(tensor[1:5, 3:12]))


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (0,), (0, 4), (4, 0), (1, 7), (7, 1), (2, 3, 4), (2, 0, 4), (3, 1, 1)]
)
def test_every_shape_comes_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape)
    write(tmp_path / "c", [whole("x", tensor)], {})
    with Reader(tmp_path / "c") as reader:
        reader.verify()
        assert reader.names() == ["x"]
        assert reader.shape("x") == shape
        assert torch.equal(reader.read("x").reshape(shape), tensor)


@pytest.mark.parametrize("seed", range(20))
def test_any_rectangle_is_read_from_any_cut(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    shape = (chance.randint(1, 4), chance.randint(1, 9), chance.randint(1, 12))
    tensor = torch.randn(shape)
    matrix = tensor.reshape(view_2d(shape))
    rows, cols = matrix.shape
    cut = tiles(rows, cols, chance)
    pieces = {rect: Piece("x", shape, rect, matrix[rect[0] : rect[1], rect[2] : rect[3]]) for rect in cut}
    write(tmp_path / "c", pieces.values(), {})
    with Reader(tmp_path / "c") as reader:
        for r0, r1, c0, c1 in [*cut, *tiles(rows, cols, chance), (0, rows, 0, cols)]:
            assert torch.equal(reader.read("x", (r0, r1, c0, c1)), matrix[r0:r1, c0:c1])


def test_strides_shared_memory_and_gradients_do_not_matter(tmp_path: Path) -> None:
    slab = torch.randn(6, 8)
    weight = torch.nn.Parameter(torch.randn(3, 5))
    cases = {
        "transposed": slab.t(),
        "column": slab[:, 3:4],
        "first rows": slab[:3],
        "last rows": slab[3:],
        "again": slab[:3],
        "expanded": torch.randn(4, 1).expand(4, 5),
        "parameter": weight,
        "conjugated": torch.randn(2, 3, dtype=torch.complex64).conj(),
    }
    write(tmp_path / "c", [whole(name, tensor) for name, tensor in cases.items()], {})
    with Reader(tmp_path / "c") as reader:
        for name, tensor in cases.items():
            assert torch.equal(reader.read(name), tensor.detach()), name


def test_what_is_read_is_memory_of_its_own(tmp_path: Path) -> None:
    tensor = torch.randn(4, 5)
    write(tmp_path / "c", [whole("x", tensor)], {})
    with Reader(tmp_path / "c") as reader:
        read = reader.read("x")
        read.zero_()
        assert torch.equal(reader.read("x"), tensor)
        assert reader.read("x", (0, 1, 0, 2)).untyped_storage().nbytes() == 8


def test_a_row_is_read_without_the_rest_of_its_file(tmp_path: Path) -> None:
    tensor = torch.randn(2048, 4096)  # 32 MiB, 8,192 pages
    write(tmp_path / "c", [whole("x", tensor)], {})
    with Reader(tmp_path / "c") as reader:
        reader.read("x", (0, 1, 0, 1))
        before = resource.getrusage(resource.RUSAGE_SELF)
        row = reader.read("x", (1000, 1001, 0, 4096))
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert torch.equal(row, tensor[1000:1001])
        assert after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt < 200


def test_the_document_comes_back(tmp_path: Path) -> None:
    document = {
        "step": 7,
        "lr": 1e-3,
        "tiny": 5e-324,
        "big": 2**70,
        "negative zero": -0.0,
        "text": 'größer\u2028 "than" \\ life 🙂',
        "nothing": None,
        "flag": True,
        "nested": [{"deep": [[], {}]}],
    }
    write(tmp_path / "c", [], document)
    with Reader(tmp_path / "c") as reader:
        assert reader.document == document
        assert math.copysign(1, reader.document["negative zero"]) == -1
        assert reader.names() == []
    write(tmp_path / "c", [], {"betas": (0.9, 0.95)})
    assert Reader(tmp_path / "c").document == {"betas": [0.9, 0.95]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"lr": float("nan")}, r"document\['lr'\] is nan"),
        ({"a": [1, {"b": float("-inf")}]}, r"document\['a'\]\[1\]\['b'\] is -inf"),
        ({"a": {3: 4}}, r"document\['a'\]: the key 3 is a int"),
        ({"a": torch.zeros(1)}, r"document\['a'\] is a Tensor"),
        ({"a": {1, 2}}, r"document\['a'\] is a set"),
        ({"a": b"bytes"}, r"document\['a'\] is a bytes"),
    ],
)
def test_a_document_that_json_would_change_is_refused(document: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "c", [], document)
    assert os.listdir(tmp_path) == []


def test_a_document_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    document: Any = 0
    for _ in range(70):
        document = [document]
    with pytest.raises(CheckpointError, match="nested deeper than 64"):
        write(tmp_path / "c", [], {"a": document})


def test_a_second_save_replaces_the_first_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "c", [whole("x", torch.zeros(3, 3)), whole("gone", torch.zeros(2))], {"generation": 1})
    write(tmp_path / "c", [whole("x", torch.ones(3, 3))], {"generation": 2})
    with Reader(tmp_path / "c") as reader:
        assert reader.document == {"generation": 2}
        assert reader.names() == ["x"]
        assert torch.equal(reader.read("x"), torch.ones(3, 3))
    assert os.listdir(tmp_path) == ["c"]


def test_files_and_directories_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "runs" / "a" / "c", [whole("x", torch.zeros(3))], {})
    finally:
        os.umask(before)
    for path in (tmp_path / "runs").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_large_save_is_written_in_several_shards_while_pieces_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 1000)
    tensors = {f"x{index}": torch.randn(10, 10) for index in range(7)}
    on_disk = []

    def pieces() -> Iterator[Piece]:
        for name, tensor in tensors.items():
            on_disk.append(len(list(tmp_path.glob("c.tmp-*/*.safetensors"))))
            yield whole(name, tensor)

    write(tmp_path / "c", pieces(), {})
    assert on_disk == [0, 0, 0, 1, 1, 1, 2]
    with Reader(tmp_path / "c") as reader:
        reader.verify()
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3


def test_shards_are_plain_safetensors_and_the_manifest_plain_json(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4, dtype=torch.bfloat16)
    write(tmp_path / "c", [whole("model/w", tensor)], {"a": 1})
    assert sorted(os.listdir(tmp_path / "c")) == ["manifest.json", "rank-00000-0000.safetensors"]
    assert torch.equal(load_file(tmp_path / "c" / "rank-00000-0000.safetensors")["model/w[0:3,0:4]"], tensor)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["body"]["tensors"]["model/w"] == {
        "dtype": "bfloat16",
        "shape": [3, 4],
        "pieces": [[0, 0, 3, 0, 4]],
    }


def test_data_reaches_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"fsync {target.name.split('.tmp-')[0] if target.is_dir() else target.name}")
        fsync(descriptor)

    def record_rename(source: Any, target: Any) -> None:
        events.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    write(tmp_path / "c", [whole("x", torch.zeros(3))], {})
    assert events == [
        "fsync rank-00000-0000.safetensors",
        "fsync manifest.json",
        "fsync c",
        "rename c",
        f"fsync {tmp_path.name}",
    ]


def test_version_1_stays_readable(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(GOLDEN_MANIFEST)
    (tmp_path / "rank-00000-0000.safetensors").write_bytes(base64.b64decode(GOLDEN_SHARD))
    with Reader(tmp_path) as reader:
        reader.verify()
        assert reader.document == {"step": 3, "betas": [0.9, 0.95]}
        assert reader.names() == ["bias", "empty", "step", "weight"]
        assert (reader.dtype("weight"), reader.shape("weight")) == (torch.bfloat16, (2, 2, 2))
        assert torch.equal(reader.read("weight"), torch.arange(8.0).reshape(4, 2).bfloat16())
        assert torch.equal(reader.read("bias"), torch.tensor([[1, -1, 3]], dtype=torch.int8))
        assert (reader.shape("step"), reader.read("step").item()) == ((), 2.5)
        assert reader.read("empty").shape == (0, 4)


# ---- the directory of checkpoints


def save_step(directory: Path, step: int) -> Path:
    write(directory / f"step-{step}", [whole("x", torch.full((2, 2), float(step)))], {"step": step})
    return directory / f"step-{step}"


def test_latest_is_the_highest_step_and_not_the_last_written_or_the_last_in_the_alphabet(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None
    for step in (9, 100, 20):
        save_step(tmp_path, step)
    assert latest(tmp_path) == tmp_path / "step-100"


def test_latest_passes_over_what_is_no_valid_checkpoint(tmp_path: Path) -> None:
    good = save_step(tmp_path, 1)
    torn = save_step(tmp_path, 2)
    os.truncate(torn / "rank-00000-0000.safetensors", 5)
    damaged = save_step(tmp_path, 3)
    (damaged / "manifest.json").write_text("{")
    (save_step(tmp_path, 4) / "manifest.json").unlink()
    save_step(tmp_path, 5).rename(tmp_path / "step-5.tmp-0123456789abcdef")
    save_step(tmp_path, 6).rename(tmp_path / "step-six")
    save_step(tmp_path, 7).rename(tmp_path / "elsewhere")
    (tmp_path / "step-7").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step-8").write_text("a file")
    (tmp_path / "step-9").mkdir()
    assert latest(tmp_path) == good


def test_a_checkpoint_set_aside_by_a_killed_overwrite_is_found_and_replaced_later(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    aside = tmp_path / "step-2.old-0123456789abcdef"
    save_step(tmp_path, 2).rename(aside)
    assert latest(tmp_path) == aside
    assert committed(tmp_path / "step-2") == aside
    assert Reader(tmp_path / "step-2").document == {"step": 2}
    prune(tmp_path, 1)
    assert os.listdir(tmp_path) == [aside.name]
    save_step(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-2"]


def test_prune_keeps_the_newest_valid_ones(tmp_path: Path) -> None:
    for step in (1, 5, 10, 2):
        save_step(tmp_path, step)
    prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-5"]
    prune(tmp_path, 2)
    prune(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-10"]
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0)


def test_prune_counts_only_valid_checkpoints_and_leaves_the_others_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    os.truncate(tmp_path / "step-3" / "rank-00000-0000.safetensors", 5)
    prune(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3"]


def test_prune_clears_what_killed_saves_left_but_not_a_save_under_way(tmp_path: Path) -> None:
    for step in (2, 3):
        save_step(tmp_path, step)
    for name in ("step-1.tmp-0123456789abcdef", "step-4.tmp-0123456789abcdef", "step-3.old-0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpXyZ").write_text("half a shard")
    prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3", "step-4.tmp-0123456789abcdef"]


def test_prune_deletes_nothing_that_it_does_not_recognise(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    (tmp_path / "step-1" / "notes.txt").write_text("the best run so far")
    (tmp_path / "step-0").mkdir()
    (tmp_path / "step-00x").mkdir()
    (tmp_path / "data.bin").write_text("data")
    prune(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "step-0", "step-00x", "step-1", "step-3"]
    assert len(os.listdir(tmp_path / "step-1")) == 3


def test_check_writable_makes_the_directory_and_leaves_it_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    check_writable(tmp_path / "a" / "b")


# ---- several ranks

MATRIX = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)


def save_rows(path: Path, num_rows: list[int]) -> None:
    """Rank r holds num_rows[r] rows of MATRIX; a replicated vector comes from all ranks; a scalar from the last."""
    rank = dist.get_rank()
    r0 = sum(num_rows[:rank])
    r1 = r0 + num_rows[rank]
    pieces = [Piece("matrix", (7, 6), (r0, r1, 0, 6), MATRIX[r0:r1]), whole("vector", torch.arange(5))]
    if rank == dist.get_world_size() - 1:
        pieces.append(whole("scalar", torch.tensor(2.5)))
    write(path, pieces, {"written by": rank})


def read_columns(path: Path) -> torch.Tensor:
    """Rank r's share of the columns, after a verification that is shared out over the ranks."""
    with Reader(path) as reader:
        reader.verify(dist.group.WORLD)
        cut = [6 * rank // dist.get_world_size() for rank in range(dist.get_world_size() + 1)]
        rank = dist.get_rank()
        return reader.read("matrix", (0, 7, cut[rank], cut[rank + 1]))


@pytest.mark.parametrize("num_rows", [[4, 3], [2, 2, 2, 1], [7, 0, 0, 0], [0, 0, 3, 4]], ids=str)
def test_what_some_ranks_wrote_is_read_on_other_layouts(num_rows: list[int], tmp_path: Path) -> None:
    pool(len(num_rows)).run(f"{__name__}:save_rows", tmp_path / "c", num_rows)
    assert os.listdir(tmp_path) == ["c"]
    with Reader(tmp_path / "c") as reader:
        reader.verify()
        assert reader.document == {"written by": 0}
        assert torch.equal(reader.read("matrix"), MATRIX)
        assert torch.equal(reader.read("vector"), torch.arange(5)[None])
        assert reader.read("scalar").item() == 2.5
    for world_size in (2, 4):
        columns = pool(world_size).run(f"{__name__}:read_columns", tmp_path / "c")
        assert torch.equal(torch.cat(columns, dim=1), MATRIX)


def test_what_several_ranks_hold_is_kept_once(tmp_path: Path) -> None:
    pool(4).run(f"{__name__}:save_rows", tmp_path / "c", [4, 3, 0, 0])
    # Rank 2 wrote nothing but its copy of the vector, which rank 0 had written; rank 3 has the scalar too.
    names = ["rank-00000-0000.safetensors", "rank-00001-0000.safetensors", "rank-00003-0000.safetensors"]
    assert sorted(os.listdir(tmp_path / "c")) == ["manifest.json", *names]
    body = json.loads((tmp_path / "c" / "manifest.json").read_text())["body"]
    [[file, *_]] = body["tensors"]["vector"]["pieces"]
    assert body["files"][file][0] == names[0]


def save_on_two_of_four(path: Path) -> str:
    group = dist.new_group([1, 3])
    half, member = divmod(dist.get_rank(), 2)
    piece = Piece("matrix", (7, 6), (0, 7, 3 * half, 3 * half + 3), MATRIX[:, 3 * half : 3 * half + 3])
    try:
        write(path, [piece], {"global rank": dist.get_rank()}, group=group)
        Reader(path).verify(group)
    except ValueError as error:
        return str(error)
    return "saved" if member else "saved what it should not"


def test_a_group_of_some_ranks_saves_by_itself(tmp_path: Path) -> None:
    answers = pool(4).run(f"{__name__}:save_on_two_of_four", tmp_path / "c")
    assert answers[1] == answers[3] == "saved"
    assert "rank 0 is not in it" in answers[0]
    assert "rank 2 is not in it" in answers[2]
    with Reader(tmp_path / "c") as reader:
        assert reader.document == {"global rank": 1}
        assert torch.equal(reader.read("matrix"), MATRIX)


# ---- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [None, "nccl", "cpu:gloo,cuda:nccl"])
def test_tensors_on_a_gpu_are_saved(backend: str | None, tmp_path: Path) -> None:
    tensor = torch.randn(5, 6, device="cuda", dtype=torch.bfloat16)
    if backend is not None:
        dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        write(tmp_path / "c", [whole("x", tensor), whole("columns", tensor[:, 2:4])], {})
        with Reader(tmp_path / "c") as reader:
            reader.verify(None if backend is None else dist.group.WORLD)
            assert torch.equal(reader.read("x"), tensor.cpu())
            assert torch.equal(reader.read("columns"), tensor[:, 2:4].cpu())
    finally:
        if backend is not None:
            dist.destroy_process_group()


# Written by the first release; a later one has to read it.
GOLDEN_MANIFEST = (
    rb'{"format":"distopt checkpoint","version":1,"sha256":"ee77c34c9adcb03ba31273bef4e9cf9de7639aebd2ada48f24ccf57'
    rb'2d1c184c2","body":{"save":"0123456789abcdef","document":{"step":3,"betas":[0.9,0.95]},"files":[["rank-00000-'
    rb'0000.safetensors",383,"385ce2f297f5f550388cc4ff35edcac3d1bcb8336ea021606682aee78f022124"]],"tensors":{"bias"'
    rb':{"dtype":"int8","shape":[3],"pieces":[[0,0,1,0,3]]},"empty":{"dtype":"float32","shape":[0,4],"pieces":[]},"'
    rb'step":{"dtype":"float32","shape":[],"pieces":[[0,0,1,0,1]]},"weight":{"dtype":"bfloat16","shape":[2,2,2],"pi'
    rb'eces":[[0,0,3,0,2],[0,3,4,0,2]]}}}}'
    b"\n"
)
GOLDEN_SHARD = (
    "YAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJkaXN0b3B0IGNoZWNrcG9pbnQiLCJzYXZlIjoiMDEyMzQ1Njc4OWFiY2RlZiJ9"
    "LCJzdGVwWzA6MSwwOjFdIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsxLDFdLCJkYXRhX29mZnNldHMiOlswLDRdfSwid2VpZ2h0WzA6Myww"
    "OjJdIjp7ImR0eXBlIjoiQkYxNiIsInNoYXBlIjpbMywyXSwiZGF0YV9vZmZzZXRzIjpbNCwxNl19LCJ3ZWlnaHRbMzo0LDA6Ml0iOnsiZHR5"
    "cGUiOiJCRjE2Iiwic2hhcGUiOlsxLDJdLCJkYXRhX29mZnNldHMiOlsxNiwyMF19LCJiaWFzWzA6MSwwOjNdIjp7ImR0eXBlIjoiSTgiLCJz"
    "aGFwZSI6WzEsM10sImRhdGFfb2Zmc2V0cyI6WzIwLDIzXX19AAAgQAAAgD8AQEBAgECgQMBA4EAB/wM="
)
