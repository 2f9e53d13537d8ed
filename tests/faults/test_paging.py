"""States in pages when something goes wrong: killed runs, damaged files, full disks, other processes, bad options."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distopt.plan import pages as planned
from distopt.state.pages import pool as pools
from distopt.state.pages.file import PageError, PageFile
from tests.faults import paging
from tests.paging import MIXED, SMALL, Params, build, differing, train

pytestmark = pytest.mark.usefixtures("short_pages")


def test_killed_in_a_step_and_resumed_beside_the_pages_it_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", paging.__name__, str(tmp_path / "a")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = (tmp_path / "a" / "pages").iterdir()
    assert json.loads(left.read_bytes()[: planned.SECTOR].rstrip(b"\0"))["run"]
    resumed, straight = (paging.run(tmp_path / directory, 5) for directory in ("a", "b"))
    assert all(map(torch.equal, resumed, straight))
    assert list((tmp_path / "a" / "pages").iterdir()) == [], "pages end with their run"


@pytest.fixture
def paged(tmp_path: Path) -> tuple[Params, Any, Path]:
    """An optimizer after two steps, and its page file."""
    params, built = build("AdamW", MIXED, lr=1e-2, state_codec="int8", offload=f"disk:{tmp_path / 'pages'}")
    train(params, built, range(2), gaps=False)
    built._bind().pager.settle()
    [path] = (tmp_path / "pages").iterdir()
    return params, built, path


def damage(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_page_is_found_and_nothing_behind_it_changes(paged: Any, which: int) -> None:
    params, built, path = paged
    pages = [page for found in built._bind().plans[0].pages.values() for page in found]
    damage(path, pages[which].offset + 100)
    before = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(PageError, match=r"rank00000-0\.pages.*is not what run .* wrote there"):
        train(params, built, range(2, 3), gaps=False)
    changed = [name for name, param in params.items() if name != "few" and not torch.equal(param, before[name])]
    assert bool(changed) == (which == -1)
    # The last page has the end of the small tensors that lie together.
    first = pages[which].elements.start - params["odd"].numel() - params["vector"].numel() if which else 0
    assert 0 <= first < params["narrow"].numel()
    assert torch.equal(params["narrow"].flatten()[first:], before["narrow"].flatten()[first:])
    after = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(ValueError, match=r"pages of states are lost.*load the last checkpoint"):
        built.step()
    assert all(torch.equal(param, after[name]) for name, param in params.items())
    with pytest.raises(PageError, match="is not what run"):
        built.state_dict()


def test_a_stale_page_is_as_bad_as_a_damaged_one(paged: Any) -> None:
    params, built, path = paged
    page = next(iter(built._bind().plans[0].pages.values()))[0]
    old = path.read_bytes()[page.offset : page.offset + page.nbytes]
    train(params, built, range(2, 3), gaps=False)
    built._bind().pager.settle()
    with path.open("r+b") as file:
        file.seek(page.offset)
        file.write(old)
        file.flush()
        os.fsync(file.fileno())
    with pytest.raises(PageError, match="stale"):
        train(params, built, range(3, 4), gaps=False)


@pytest.mark.parametrize("how", ["cut", "deleted"])
def test_a_file_that_was_cut_or_deleted_is_noticed_before_anything_changes(paged: Any, how: str) -> None:
    params, built, path = paged
    if how == "cut":
        os.truncate(path, planned.SECTOR)
    else:
        path.unlink()
    before = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(ValueError, match=f"pages of states are lost: .*was {how}"):
        train(params, built, range(2, 3))
    assert all(torch.equal(param, before[name]) for name, param in params.items())


def test_pages_made_anew_outlive_those_that_were_deleted(paged: Any) -> None:
    _, built, path = paged
    path.unlink()
    other, anew = build("AdamW", MIXED, lr=1e-2, offload=f"disk:{path.parent}")
    train(other, anew, range(1), gaps=False)
    built._bind().pager._finalizer()
    assert path.exists()
    train(other, anew, range(1, 2), gaps=False)


def test_a_file_that_is_deleted_while_it_is_claimed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, []

    def delete_and_lock(handle: int, how: int) -> None:
        if not taken:
            taken.append(1)
            (tmp_path / "rank00000-0.pages").unlink()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", delete_and_lock)
    train(*build("AdamW", SMALL, lr=1e-2, offload=f"disk:{tmp_path}"), range(2))


def test_what_a_dead_run_left_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "rank00000-0.pages").write_bytes(b'{"run": "dead", "pid": 1}'.ljust(4096, b"\0") + b"\xff" * (1 << 22))
    other, resident = (build("AdamW", MIXED, lr=1e-2, offload=o) for o in (f"disk:{tmp_path}", None))
    for ran in (other, resident):
        train(*ran, range(2))
    assert differing(other, resident) == []
    assert (tmp_path / "rank00000-0.pages").stat().st_mode & 0o777 == 0o600 or os.getuid() == 0


def test_a_directory_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    script = """
        import fcntl, json, os, sys
        file = open(sys.argv[1], "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"pid": os.getpid()}))
        file.flush()
        print("ready", flush=True)
        sys.stdin.readline()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "rank00000-0.pages")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=f"is in use by process {process.pid}, another run"):
            build("AdamW", SMALL, lr=1e-2, offload=f"disk:{tmp_path}")[1].plan  # noqa: B018 - binds
        process.communicate("\n", timeout=60)
    params, built = build("AdamW", SMALL, lr=1e-2, offload=f"disk:{tmp_path}")
    train(params, built, range(1))


def test_a_child_that_is_forked_leaves_pages_alone(paged: Any) -> None:
    params, built, path = paged
    child = os.fork()
    if child == 0:
        for use in (built.step, built.state_dict):
            with pytest.raises(ValueError, match="which this one was forked from"):
                use()
        built._bind().pager._finalizer()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert path.exists()
    train(params, built, range(2, 3))


def test_a_full_disk_says_so_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, built = build("AdamW", SMALL, lr=1e-2, offload=f"disk:{tmp_path}")

    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(ValueError, match=r"pages take [0-9]+ bytes, .* has [0-9]+ free: No space left on device"):
        train(params, built, range(1))
    assert all(torch.equal(param, before[name]) for name, param in params.items())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    train(params, built, range(1))


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (f"{tmp_path}/file/pages", "/proc/pages"):
        _, built = build("AdamW", SMALL, lr=1e-2, offload=f"disk:{place}")
        with pytest.raises(ValueError, match=f"offload: '{place}' cannot be written.*name a directory"):
            built.plan  # noqa: B018 - binds


def test_a_write_that_fails_in_a_step_is_an_error_and_stays_one(paged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, built, _ = paged

    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(PageError, match=r"cannot be written.*Input/output error"):
        train(params, built, range(2, 4))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="pages of states are lost"):
        train(params, built, range(3, 4))


def test_a_page_that_is_written_twice_has_what_was_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, begun = PageFile.save, set()

    def slow_at_first(file: PageFile, page: planned.Page, source: Tensor) -> None:
        if page not in begun:
            begun.add(page)
            time.sleep(0.1)
        save(file, page, source)

    monkeypatch.setattr(PageFile, "save", slow_at_first)
    ran = [build("ScheduleFreeProdigy", SMALL, lr=1.0, offload=offload) for offload in (None, f"disk:{tmp_path}")]
    for each in ran:  # z begins as the weights: written as zeros, then as these
        train(*each, range(2))
    assert differing(*ran) == []


def test_a_budget_that_cannot_fit_says_what_would() -> None:
    shapes = {"large": (900, 700), "few": (10,)}
    _, built = build("AdamW", shapes, lr=1e-2, offload="cpu", device_budget="64KiB")
    with pytest.raises(ValueError, match=r"device_budget='64KiB' cannot hold .*4 slots of") as error:
        built.plan  # noqa: B018 - binds
    least = int(str(error.value).split("Pass at least ")[1].split()[0])
    assert build("AdamW", shapes, lr=1e-2, offload="cpu", device_budget=least)[1].plan.summary()
    with pytest.raises(ValueError, match="cannot hold"):
        build("AdamW", shapes, lr=1e-2, offload="cpu", device_budget=least - 1)[1].plan  # noqa: B018 - binds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "cpus"}, "did you mean 'cpu'"),
        ({"offload": "disk:"}, "'disk:/path'"),
        ({"offload": {"cpu": 1.5}}, r"must lie in \(0, 1\]"),
        ({"offload": {"cpu": 0.7, "disk:/x": 0.7}}, "more than 1"),
        ({"offload": {}}, "no tier"),
        ({"offload": 3}, "offload: 'cpu'"),
        ({"device_budget": "1GiB"}, "pass offload="),
        ({"offload": "cpu", "device_budget": "much"}, "device_budget: bytes"),
        ({"offload": {"cpu": 0.5}, "device_budget": "1MiB"}, "give one of them"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("AdamW", MIXED, lr=1e-2, **options)[1].plan  # noqa: B018 - binds


def test_offload_cannot_change_after_bind() -> None:
    params, built = build("AdamW", SMALL, lr=1e-2)
    train(params, built, range(1))
    built.param_groups[0]["offload"] = "cpu"
    with pytest.raises(ValueError, match="changed after bind"):
        train(params, built, range(1, 2))


def test_memory_that_cannot_be_pinned_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def cudaHostRegister(self, *args: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(ValueError, match=r"4096 bytes of host memory cannot be pinned.*ulimit -l"):
        pools.Pool(4096, pinned=True)
