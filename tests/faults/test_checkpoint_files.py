"""Checkpoints damaged, mixed or malicious are never read."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distopt.state import files
from distopt.state.files import Piece, write
from distopt.state.manifest import MAX_BYTES, CheckpointError
from distopt.state.reader import Reader, latest

SHARD = "rank-00000-0000.safetensors"
OTHER_SHARD = "rank-00000-0001.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards: `x` (4, 6) in the first, `y` (2, 3) in the second."""
    monkeypatch.setattr(files, "SHARD_BYTES", 64)
    x, y = torch.randn(4, 6), torch.randn(2, 3)
    write(
        tmp_path / "step-1", [Piece("x", (4, 6), (0, 4, 0, 6), x), Piece("y", (2, 3), (0, 2, 0, 3), y)], {"lr": 0.125}
    )
    assert sorted(os.listdir(tmp_path / "step-1")) == ["manifest.json", SHARD, OTHER_SHARD]
    return tmp_path / "step-1"


def open_and_verify(path: Path) -> None:
    with Reader(path) as reader:
        reader.verify()


# ---- damaged files


@pytest.mark.parametrize("name", ["manifest.json", SHARD, OTHER_SHARD])
def test_a_flipped_bit_is_an_error_that_names_the_file(name: str, checkpoint: Path) -> None:
    file = checkpoint / name
    data = file.read_bytes()
    chance = random.Random(0)
    for _ in range(100):
        position = chance.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=name):
            open_and_verify(checkpoint)
    file.write_bytes(data)
    open_and_verify(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", SHARD, OTHER_SHARD])
def test_a_truncated_file_is_an_error_that_names_it_and_is_not_offered(name: str, checkpoint: Path) -> None:
    size = (checkpoint / name).stat().st_size
    assert latest(checkpoint.parent) == checkpoint
    for length in (size - 2, size // 2, 9, 1, 0):
        os.truncate(checkpoint / name, length)
        with pytest.raises(CheckpointError, match=name):
            Reader(checkpoint)
        assert latest(checkpoint.parent) is None


@pytest.mark.parametrize("name", ["manifest.json", SHARD, OTHER_SHARD])
def test_a_missing_file_is_an_error_that_names_it_and_is_not_offered(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        Reader(checkpoint)
    assert latest(checkpoint.parent) is None


def test_no_checkpoint_at_all_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*no checkpoint directory"):
        Reader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        Reader(tmp_path)


def test_shards_of_two_saves_are_an_error_also_without_verify(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint.with_name("step-2")
    with Reader(checkpoint) as reader:
        pieces = [
            Piece(name, reader.shape(name), (0, *(r := reader.read(name)).shape[:1], 0, r.shape[1]), r) for name in "xy"
        ]
    write(other, pieces, {"lr": 0.125})
    shutil.copy(other / SHARD, checkpoint / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD}.*two checkpoints are mixed"):
        open_and_verify(checkpoint)
    with Reader(checkpoint) as reader:
        assert reader.read("y").shape == (2, 3)
        with pytest.raises(CheckpointError, match=f"{SHARD}.*two checkpoints are mixed"):
            reader.read("x")


def test_a_tensor_or_rectangle_that_is_not_there_is_an_error(checkpoint: Path) -> None:
    with Reader(checkpoint) as reader:
        with pytest.raises(CheckpointError, match="no tensor 'xx'; did you mean 'x'"):
            reader.read("xx", (0, 1, 0, 1))
        for rect in [(0, 5, 0, 6), (0, 4, 0, 7), (-1, 4, 0, 6), (3, 2, 0, 6)]:
            with pytest.raises(CheckpointError, match="'x': rectangle"):
                reader.read("x", rect)


# ---- manifests made by somebody else


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest's body as an attacker would, with the right checksum."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest["body"])
    body = json.dumps(manifest["body"], separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "parent directory": (lambda b: b["files"][0].__setitem__(0, f"../step-1/{SHARD}"), "not the name of a shard"),
    "absolute path": (lambda b: b["files"][0].__setitem__(0, "/etc/passwd"), "not the name of a shard"),
    "subdirectory": (lambda b: b["files"][0].__setitem__(0, f"a/{SHARD}"), "not the name of a shard"),
    "device": (lambda b: b["files"][0].__setitem__(0, "/dev/zero"), "not the name of a shard"),
    "newline in name": (lambda b: b["files"][0].__setitem__(0, SHARD + "\n"), "not the name of a shard"),
    "name is no text": (lambda b: b["files"][0].__setitem__(0, 3), "a file's name is a int"),
    "file twice": (lambda b: b["files"].append(b["files"][0]), "listed twice"),
    "file too short": (lambda b: b["files"][0].pop(), "2 fields"),
    "negative size": (lambda b: b["files"][0].__setitem__(1, -1), "-1 is not a size"),
    "size is a flag": (lambda b: b["files"][0].__setitem__(1, True), "True is not a size"),
    "bad digest": (lambda b: b["files"][0].__setitem__(2, "0" * 63), "is not a sha256"),
    "files no list": (lambda b: b.__setitem__("files", {}), "files is a dict"),
    "unknown key": (lambda b: b.__setitem__("extra", 1), "extra"),
    "missing key": (lambda b: b.pop("document"), "instead of"),
    "unknown key of a tensor": (lambda b: b["tensors"]["x"].__setitem__("stride", 1), "stride"),
    "bad save": (lambda b: b.__setitem__("save", "../../somewhere"), "not the id of a save"),
    "document no object": (lambda b: b.__setitem__("document", [1]), "document is a list"),
    "deep document": (lambda b: b["document"].__setitem__("a", nested(70)), "nested deeper"),
    "very deep document": (lambda b: b["document"].__setitem__("a", nested(900)), "nested deeper|not valid JSON"),
    "unknown dtype": (lambda b: b["tensors"]["x"].__setitem__("dtype", "object"), "unknown dtype 'object'"),
    "dtype is no text": (lambda b: b["tensors"]["x"].__setitem__("dtype", []), "dtype is a list"),
    "negative dim": (lambda b: b["tensors"]["x"].__setitem__("shape", [-4, -6]), "is not a shape"),
    "fractional dim": (lambda b: b["tensors"]["x"].__setitem__("shape", [4.0, 6]), "is not a shape"),
    "huge shape": (lambda b: b["tensors"]["x"].__setitem__("shape", [2**40, 2**40]), "elements"),
    "many dims": (lambda b: b["tensors"]["x"].__setitem__("shape", [1] * 99), "is not a shape"),
    "long name": (lambda b: b["tensors"].__setitem__("n" * 2000, b["tensors"].pop("x")), "is not a name"),
    "empty name": (lambda b: b["tensors"].__setitem__("", b["tensors"].pop("x")), "is not a name"),
    "half a character": (lambda b: b["tensors"].__setitem__("\ud800", b["tensors"].pop("x")), "is not a name"),
    "out of bounds": (lambda b: b["tensors"]["x"]["pieces"][0].__setitem__(2, 5), "outside"),
    "reversed": (lambda b: b["tensors"]["x"]["pieces"][0].__setitem__(1, 5), "outside"),
    "negative offset": (lambda b: b["tensors"]["x"]["pieces"][0].__setitem__(3, -1), "outside"),
    "piece of another file": (lambda b: b["tensors"]["x"]["pieces"][0].__setitem__(0, 2), "file 2 of 2"),
    "negative file": (lambda b: b["tensors"]["x"]["pieces"][0].__setitem__(0, -1), "file -1 of 2"),
    "piece too short": (lambda b: b["tensors"]["x"]["pieces"][0].pop(), "is not a piece"),
    "fractional piece": (lambda b: b["tensors"]["x"]["pieces"][0].__setitem__(1, 0.5), "is not a piece"),
    "same piece twice": (lambda b: b["tensors"]["y"]["pieces"].append([1, 0, 2, 0, 3]), "too short|overlaps"),
    "overlap": (lambda b: b["tensors"]["y"].__setitem__("pieces", [[1, 0, 1, 0, 3], [1, 0, 2, 1, 2]]), "overlaps"),
    "hole": (lambda b: b["tensors"]["x"]["pieces"].clear(), "hold 0 of the 24"),
    "empty piece": (lambda b: b["tensors"]["x"]["pieces"].append([0, 1, 1, 0, 6]), "is empty"),
    "tensor too large for its file": (
        lambda b: b["tensors"].__setitem__("x", {"dtype": "int8", "shape": [9**9], "pieces": [[0, 0, 1, 0, 9**9]]}),
        "too short for the pieces",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_manifest_that_write_would_not_make_is_refused(attack: str, checkpoint: Path) -> None:
    change, message = ATTACKS[attack]
    reseal(checkpoint, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Reader(checkpoint)
    assert "manifest.json" in str(caught.value)
    assert latest(checkpoint.parent) is None


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "dtype": lambda body: body["tensors"]["x"].__setitem__("dtype", "int32"),
    "shape": lambda body: body["tensors"].__setitem__(
        "x", {**body["tensors"]["x"], "shape": [2, 12], "pieces": [[0, 0, 2, 0, 12]]}
    ),
    "name": lambda body: body["tensors"].__setitem__("z", body["tensors"].pop("x")),
    "file": lambda body: body["files"].reverse(),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_does_not_fit_its_shards_is_refused_before_anything_is_read(lie: str, checkpoint: Path) -> None:
    reseal(checkpoint, LIES[lie])
    name = "z" if lie == "name" else "x"
    with pytest.raises(CheckpointError, match=r"rank-00000-000.\.safetensors|manifest\.json"):
        open_and_verify(checkpoint)
    with pytest.raises(CheckpointError, match=r"rank-00000-000.\.safetensors|manifest\.json"):
        Reader(checkpoint).read(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "format is not"),
        ('"distopt checkpoint"', "format is not"),
        ('{"format":"distopt checkpoint","format":"x"}', "key twice"),
        ('{"format":"distopt checkpoint","version":1,"sha256":"","body":{"a":NaN}}', "contains NaN"),
        ('{"format":"distopt checkpoint","version":1,"sha256":"","body":{"a":1e999}}', "not valid JSON"),
        ('{"format":"distopt checkpoint","version":1,"sha256":"","body":' + "9" * 5000 + "}", "not valid JSON"),
        ('{"format":"distopt checkpoint","version":1,"sha256":"","body":' + "[" * 100_000, "not valid JSON"),
        ('{"format":"distopt checkpoint","version":1,"sha256":""}', "instead of"),
        ("\udcff\udcfe", "not valid JSON"),
    ],
)
def test_a_manifest_that_is_not_strict_json_is_refused(text: str, message: str, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{message}"):
        Reader(checkpoint)


def test_a_manifest_of_absurd_size_is_refused_unread(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", MAX_BYTES + 1)  # a hole: it takes no disk
    with pytest.raises(CheckpointError, match="larger than"):
        Reader(checkpoint)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_version_of_the_format_is_an_error_that_names_both(version: object, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["version"] = version
    manifest["what a later version adds"] = 1
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json.*version {version} of the format.*reads version 1"):
        Reader(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_links_pipes_and_directories_are_refused_and_not_waited_for(kind: str, name: str, checkpoint: Path) -> None:
    file = checkpoint / name
    moved = checkpoint.parent / "elsewhere"
    file.rename(moved)
    if kind == "link":
        file.symlink_to(moved)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match=f"{name}' is not a regular file"):
        Reader(checkpoint)
    assert latest(checkpoint.parent) is None
