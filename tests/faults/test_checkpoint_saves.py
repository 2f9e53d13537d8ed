"""Saves that fail or are interrupted, on one process or on one rank of several, never cost the checkpoint before."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distopt.state import files
from distopt.state.files import Piece, check_writable, write
from distopt.state.manifest import CheckpointError
from distopt.state.reader import Reader, latest
from tests.distributed.pool import RankError, pool

SHARD = "rank-00000-0000.safetensors"
ROOT = Path(__file__).parents[2]


# ---- saves that fail


def good_piece(value: float = 0.0) -> Piece:
    return Piece("x", (4, 3), (0, 4, 0, 3), torch.full((4, 3), value))


BAD_PIECES: dict[str, tuple[list[Piece], str]] = {
    "not covered": (
        [Piece("x", (4, 3), (0, 3, 0, 3), torch.zeros(3, 3))],
        r"'x': the pieces hold 9 of the 12 elements",
    ),
    "nothing but empty": ([Piece("x", (4, 3), (4, 4, 0, 3), torch.zeros(0, 3))], r"'x': the pieces hold 0 of the 12"),
    "overlap": ([good_piece(), Piece("x", (4, 3), (3, 4, 2, 3), torch.zeros(1, 1))], r"'x': .* overlaps"),
    "same twice": ([good_piece(), good_piece()], r"'x': the rectangle \(0, 4, 0, 3\) comes twice"),
    "out of bounds": (
        [Piece("x", (4, 3), (1, 5, 0, 3), torch.zeros(4, 3))],
        r"'x': rectangle \(1, 5, 0, 3\) is outside",
    ),
    "wrong shape": ([Piece("x", (4, 3), (0, 4, 0, 3), torch.zeros(3, 4))], r"'x': a tensor of shape \(3, 4\)"),
    "two shapes": ([good_piece(), Piece("x", (5, 3), (4, 5, 0, 3), torch.zeros(1, 3))], r"'x' is .* in another"),
    "two dtypes": ([good_piece(), Piece("x", (4, 3), (4, 4, 0, 3), torch.zeros(0, 3).int())], r"'x' is .* in another"),
    "dtype": ([Piece("x", (1,), (0, 1, 0, 1), torch.zeros(1, 1, dtype=torch.complex128))], r"'x': .*complex128"),
    "sparse": ([Piece("x", (4, 3), (0, 4, 0, 3), torch.zeros(4, 3).to_sparse())], r"'x': .*sparse"),
    "meta": ([Piece("x", (4, 3), (0, 4, 0, 3), torch.zeros(4, 3, device="meta"))], r"'x': .*meta"),
    "name": ([Piece("", (4, 3), (0, 4, 0, 3), torch.zeros(4, 3))], r"'' is not a name"),
    "shape": ([Piece("x", (-4, -3), (0, 4, 0, 3), torch.zeros(4, 3))], r"'x': \[-4, -3\] is not a shape"),
}


@pytest.mark.parametrize("case", BAD_PIECES)
def test_a_bad_piece_names_the_tensor_and_leaves_the_old_checkpoint(case: str, tmp_path: Path) -> None:
    write(tmp_path / "c", [good_piece(1.0)], {})
    pieces, message = BAD_PIECES[case]
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "c", pieces, {})
    assert os.listdir(tmp_path) == ["c"]
    assert torch.equal(Reader(tmp_path / "c").read("x"), torch.ones(4, 3))


def test_pieces_that_raise_leave_the_old_checkpoint(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        yield good_piece(2.0)
        raise KeyError("a parameter was freed")

    write(tmp_path / "c", [good_piece(1.0)], {})
    with pytest.raises(CheckpointError, match="KeyError: 'a parameter was freed'") as caught:
        write(tmp_path / "c", pieces(), {})
    assert isinstance(caught.value.__cause__, KeyError)
    assert os.listdir(tmp_path) == ["c"]
    assert torch.equal(Reader(tmp_path / "c").read("x"), torch.ones(4, 3))


@pytest.mark.filterwarnings("ignore:.*could not be removed")
def test_every_failing_system_call_of_a_save_leaves_the_old_or_the_new_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = 0

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return wrapper

    write(tmp_path / "c", [good_piece(1.0)], {})
    for name in ("mkdir", "open", "chmod", "fsync", "rename"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(files, "save_file", failing(files.save_file))
    kept = 1.0
    finished = False
    for number in range(1, 100):
        countdown = number
        with contextlib.suppress(CheckpointError):
            write(tmp_path / "c", [good_piece(kept + 1)], {})
        finished = countdown > 0
        countdown = 0
        value = Reader(tmp_path / "c").read("x")
        assert torch.equal(value, torch.full((4, 3), kept)) or torch.equal(value, torch.full((4, 3), kept + 1))
        kept = value[0, 0].item()
        assert not list(tmp_path.glob("*.tmp-*"))
        assert (tmp_path / "c").exists()
        if finished:
            break
    assert finished
    assert number > 10
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this system does not let its root user mount a file system")
    try:
        write(tmp_path / "c", [Piece("x", (100, 1000), (0, 100, 0, 1000), torch.ones(100, 1000))], {})
        with pytest.raises(CheckpointError, match="No space left on device"):
            write(tmp_path / "c", [Piece("x", (200, 1000), (0, 200, 0, 1000), torch.zeros(200, 1000))], {})
        assert os.listdir(tmp_path) == ["c"]
        with Reader(tmp_path / "c") as reader:
            reader.verify()
            assert torch.equal(reader.read("x"), torch.ones(100, 1000))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@contextlib.contextmanager
def read_only_directory() -> Iterator[Path]:
    """A directory that this process may not write; root gives up its rights for the while."""
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        directory = Path(base) / "read-only"
        directory.mkdir(mode=0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield directory
        finally:
            if user == 0:
                os.seteuid(0)


def test_a_read_only_directory_is_found_out_at_start_up() -> None:
    with read_only_directory() as directory:
        for target in (directory, directory / "a" / "b"):
            with pytest.raises(CheckpointError, match=r"cannot be written to .*read-only.*Permission denied"):
                check_writable(target)
        with pytest.raises(CheckpointError, match="Permission denied"):
            write(directory / "c", [good_piece()], {})


def test_links_and_files_are_refused_as_targets(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"link' is a symbolic link.*real"):
        check_writable(tmp_path / "link")
    with pytest.raises(CheckpointError, match="file"):
        check_writable(tmp_path / "file")
    with pytest.raises(CheckpointError, match="link' is a symbolic link"):
        write(tmp_path / "link", [good_piece()], {})
    with pytest.raises(CheckpointError, match="file' is a file"):
        write(tmp_path / "file", [good_piece()], {})
    with pytest.raises(CheckpointError, match="temporary directory"):
        write(tmp_path / "c.tmp-0123456789abcdef", [good_piece()], {})
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "real"]


def test_a_directory_with_files_of_the_user_is_never_replaced(tmp_path: Path) -> None:
    write(tmp_path / "c", [good_piece(1.0)], {})
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"contains 'thesis\.tex'"):
        write(tmp_path / "c", [good_piece(2.0)], {})
    assert (tmp_path / "c" / "thesis.tex").read_text() == "years of work"
    assert torch.equal(Reader(tmp_path / "c").read("x"), torch.ones(4, 3))


# ---- one rank of several fails


def row_pieces(rank: int, value: float) -> list[Piece]:
    return [Piece("x", (4, 3), (rank, rank + 1, 0, 3), torch.full((1, 3), value))]


def save_with_fault(path: Path, fault: str) -> str:
    """Four ranks save a row each; one of them has the fault. Returns what `write` raised."""
    rank = dist.get_rank()
    pieces, document = row_pieces(rank, 2.0), {}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "full disk" and rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    elif fault == "collective pieces" and rank == 1:
        pieces = [Piece("bad", (4,), (0, 4, 0, 9), torch.zeros(4, 9)), *pieces]
    elif fault == "two shapes" and rank == 3:
        pieces = [Piece("x", (5, 3), (3, 5, 0, 3), torch.zeros(2, 3))]
    elif fault == "two dtypes" and rank == 3:
        pieces = [Piece("x", (4, 3), (3, 4, 0, 3), torch.zeros(1, 3, dtype=torch.bfloat16))]
    elif fault == "hole" and rank == 3:
        pieces = []
    elif fault == "overlap" and rank == 3:
        pieces = [Piece("x", (4, 3), (2, 4, 0, 3), torch.zeros(2, 3))]
    elif fault == "document" and rank == 0:
        document = {"lr": float("nan")}
    elif fault == "all ranks":
        pieces = [Piece("x", (4, 3), (rank, rank + 1, 0, 3), torch.zeros(2, 2))]

    def collectively() -> Iterator[Piece]:
        for number in range(3):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == 4
            yield from pieces if number == 0 else []

    try:
        write(path, collectively() if fault == "collective pieces" else pieces, document)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return "no error"


RANK_FAULTS = {
    "full disk": r"rank 2: .*rank-00002-0000\.safetensors.*File too large",
    "collective pieces": r"rank 1: 'bad': rectangle \(0, 4, 0, 9\) is outside",
    "two shapes": r"rank 0: 'x' is torch.float32 \(4, 3\) on rank 0, but torch.float32 \(5, 3\) on rank 3",
    "two dtypes": r"rank 0: 'x' is torch.float32 .* on rank 0, but torch.bfloat16 .* on rank 3",
    "hole": r"rank 0: 'x': the pieces hold 9 of the 12 elements",
    "overlap": r"'x': \(2, 3, 0, 3\) in rank-00002-0000\S* overlaps \(2, 4, 0, 3\) in rank-00003-0000|"
    r"'x': \(2, 4, 0, 3\) in rank-00003-0000\S* overlaps \(2, 3, 0, 3\) in rank-00002-0000",
    "document": r"rank 0: document\['lr'\] is nan",
    "all ranks": r"rank 0: 'x': a tensor of shape .*\(4 of 4 ranks failed\)",
}


@pytest.fixture
def four_rows(tmp_path: Path) -> Path:
    write(tmp_path / "step-1", [piece for rank in range(4) for piece in row_pieces(rank, 1.0)], {})
    return tmp_path / "step-1"


def assert_still_ones(checkpoint: Path) -> None:
    assert os.listdir(checkpoint.parent) == [checkpoint.name]
    with Reader(checkpoint) as reader:
        reader.verify()
        assert torch.equal(reader.read("x"), torch.ones(4, 3))


@pytest.mark.parametrize("fault", RANK_FAULTS)
def test_what_fails_on_one_rank_is_the_same_error_on_all_and_leaves_the_old_checkpoint(
    fault: str, four_rows: Path
) -> None:
    errors = pool(4).run(f"{__name__}:save_with_fault", four_rows, fault, deadline=30)
    assert len(set(errors)) == 1
    with pytest.raises(CheckpointError, match=RANK_FAULTS[fault]):
        raise CheckpointError(errors[0])
    assert_still_ones(four_rows)


def verify_with_damage(path: Path) -> str:
    with Reader(path) as reader:
        try:
            reader.verify(dist.group.WORLD)
        except CheckpointError as error:
            return str(error)
    return "no error"


def test_damage_that_one_rank_finds_is_the_same_error_on_all(tmp_path: Path) -> None:
    assert pool(4).run(f"{__name__}:save_with_fault", tmp_path / "step-1", "none") == ["no error"] * 4
    shard = tmp_path / "step-1" / "rank-00003-0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    errors = pool(4).run(f"{__name__}:verify_with_damage", tmp_path / "step-1")
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"rank 3: '{shard}' is damaged")


def save_and_die(path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        if dist.get_rank() == 1:
            os._exit(7)
        yield from row_pieces(dist.get_rank(), 2.0)

    write(path, pieces(), {})


def test_a_rank_that_dies_is_an_error_on_the_others_and_leaves_the_old_checkpoint(four_rows: Path) -> None:
    with pytest.raises(RankError) as caught:
        pool(4).run(f"{__name__}:save_and_die", four_rows, deadline=30)
    assert "exit code 7" in caught.value.errors[1]
    assert "CheckpointError: a rank died or stopped answering" in caught.value.errors[0]
    assert_still_ones(four_rows)


# ---- signals


def save_until_told(path: Path, handled: bool) -> None:
    """Overwrite a checkpoint with one whose second piece never comes."""
    if handled:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))

    def pieces() -> Iterator[Piece]:
        yield good_piece(2.0)
        (path.parent / "writing").touch()
        time.sleep(60)

    files.SHARD_BYTES = 1
    write(path, pieces(), {})


@pytest.mark.parametrize("handled", [True, False])
def test_sigterm_in_a_save_leaves_the_old_checkpoint(handled: bool, four_rows: Path) -> None:
    process = get_context("forkserver").Process(target=save_until_told, args=(four_rows, handled))
    process.start()
    while not (four_rows.parent / "writing").exists():
        assert process.is_alive()
        time.sleep(0.01)
    [temporary] = four_rows.parent.glob("*.tmp-*")
    assert (temporary / SHARD).exists()
    process.terminate()
    process.join(30)
    (four_rows.parent / "writing").unlink()
    assert process.exitcode == (5 if handled else -signal.SIGTERM)
    assert latest(four_rows.parent) == four_rows
    if not handled:  # nobody was left to remove it; the next save does
        assert temporary.exists()
        write(four_rows, [good_piece(1.0)], {})
    assert_still_ones(four_rows)


@pytest.mark.parametrize("mode", [["--steps", "--rounds", "20"], ["--ranks", "2", "--rounds", "6"]], ids=" ".join)
def test_kill_9_at_any_moment_leaves_the_old_or_the_new_checkpoint(mode: list[str]) -> None:
    command = [sys.executable, "-m", "tests.faults.kill9", *mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if "--steps" in mode:
        assert report["overwrite, steps"]["previous set aside"] > 0
        assert report["overwrite, steps"]["new"] > 0
        assert report["overwrite, steps"]["system calls"] > 10
