"""States in pages, one process: the same bits as on the device, the bytes that the plan says, and what goes wrong."""

import copy
import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.plan import pages as planned
from distopt.rules import RULES, rule_class
from distopt.state.codecs import CODECS
from distopt.state.pages import pool as pools
from distopt.state.pages.file import PageError
from tests.cases import Case, collect, observation
from tests.faults import paging

SMALL = {"matrix": (36, 40), "vector": (1500,), "few": (10,)}
# Several pages, rows that are no whole tiles, small ones that share a page, less than what is paged.
MIXED = {"large": (200, 700), "wide": (64, 256), "odd": (37, 100), "vector": (5000,), "narrow": (600, 3), "few": (10,)}
Params = dict[str, nn.Parameter]


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As short as can be, so that there are many."""
    monkeypatch.setattr(planned, "PAGE_BYTES", planned.SECTOR)


def build(
    optimizer: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Params, Any]:
    generator = torch.Generator().manual_seed(0)
    params = {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
    return params, getattr(distopt, optimizer)(params.items(), **options)


def train(params: Params, built: Any, steps: range, case: Case | None = None, *, gaps: bool = True) -> None:
    """Some steps; now and then a gradient is missing, unless there are to be no `gaps`."""
    for step in steps:
        if case is not None and case.observes and step % 3 == 0:
            show(case, params, built, step)
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(params.values()):
            noise, spread = (torch.randn(param.shape, generator=generator) for _ in range(2))
            param.grad = (noise * spread.exp()).to(param.dtype) if not gaps or (number + step) % 7 != 3 else None
        built.step()


def show(case: Case, params: Params, built: Any, step: int) -> None:
    kind = rule_class(next(name for name, cls in RULES.items() if cls == case.optimizer)).observes[case.observes]  # type: ignore[index]
    found = {name: observation(kind, tuple(param.shape), step) for name, param in params.items()}
    if kind == "row":
        built.observe(case.observes, found)
        return
    for name, param in params.items():
        param.grad = found[name]
    built.observe(case.observes)


def differing(one: tuple[Params, Any], other: tuple[Params, Any]) -> list[Any]:
    """Weights and states that are not the same, bit for bit."""
    wrong: list[Any] = [name for name, param in one[0].items() if not torch.equal(param, other[0][name])]
    mine, theirs = one[1].state_dict()["state"], other[1].state_dict()["state"]
    assert [set(entry) for entry in mine.values()] == [set(entry) for entry in theirs.values()]
    return wrong + [(i, k) for i in mine for k in mine[i] if not torch.equal(mine[i][k], theirs[i][k])]


@pytest.mark.parametrize("name", sorted(collect()))
def test_paged_equals_resident_for_every_rule_and_codec(name: str, tmp_path: Path) -> None:
    case = collect()[name]
    shapes = {key: shape for key, shape in SMALL.items() if len(shape) in case.ndims}
    options = {"lr": 0.01, **next(iter(case.variants.values()))}
    everywhere = {"cpu": 0.3, f"disk:{tmp_path}": 0.4}
    for codec in CODECS:
        ran = []
        for offload in (None, everywhere):
            params, built = build(case.optimizer, shapes, state_codec=codec, offload=offload, **options)
            train(params, built, range(4), case)
            ran.append((params, built))
        assert differing(*ran) == [], codec


@pytest.mark.parametrize("rule", ["AdamW", "Lion", "SGD", "Muon", "Adafactor", "SOAP"])
@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "bits8"), (torch.float16, "fp32")],
)
def test_pages_of_large_and_of_small_tensors(rule: str, dtype: torch.dtype, master: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "master_codec": master}
    options |= {"SGD": {"momentum": 0.9}, "SOAP": {"max_precond_dim": 40, "packed": True}}.get(rule, {})
    shapes = {key: shape for key, shape in MIXED.items() if rule != "Muon" or len(shape) == 2}
    for codec in ("fp32", "int8") if rule != "SOAP" else ("int8",):
        ran = []
        for offload in (None, f"disk:{tmp_path}"):
            params, built = build(rule, shapes, dtype, state_codec=codec, offload=offload, **options)
            train(params, built, range(3))
            ran.append((params, built))
        assert differing(*ran) == [], codec
        assert master == "none" or torch.equal(
            *(each._bind().groups[0].units.read(0, None, "master") for _, each in ran)
        )


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"state_codec": "int8"}),
        ("Muon", {"state_codec": "int8"}),
        ("SOAP", {"precondition_frequency": 50, "synchronous": True, "max_precond_dim": 300}),
        ("Shampoo", {"precondition_frequency": 50, "synchronous": True, "max_precond_dim": 300}),
        ("Shampoo", {"precondition_frequency": 50, "synchronous": True, "max_precond_dim": 300, "packed": True}),
    ],
)
def test_what_moves_is_what_the_plan_says(tier: str, rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    where = "cpu" if tier == "cpu" else f"disk:{tmp_path}"
    shapes = {key: shape for key, shape in MIXED.items() if rule == "AdamW" or len(shape) == 2}
    params, built = build(rule, shapes, lr=1e-3, offload=where, **options)
    train(params, built, range(2), gaps=False)
    built.reset_traffic()
    train(params, built, range(2, 3), gaps=False)
    plan, moved = built.plan.summary(), built.traffic()
    assert moved["page_bytes_read"] == plan["page_bytes_read_per_step"] > 0
    assert moved["page_bytes_written"] == plan["page_bytes_written_per_step"] > 0
    assert set(plan["paged_bytes"]) == {where}
    assert where in built.plan.explain()
    if "state_codec" in options:
        fp32 = build(rule, shapes, lr=1e-3, offload="cpu")[1].plan.summary()
        assert plan["page_bytes_read_per_step"] < 0.3 * fp32["page_bytes_read_per_step"]


def test_shares_and_budgets_are_kept(tmp_path: Path) -> None:
    shapes = {**MIXED, "large": (900, 700)}
    _, built = build("AdamW", shapes, lr=1e-3, offload={"cpu": 0.25, f"disk:{tmp_path}": 0.5})
    tiers = built.plan.summary()["paged_bytes"]
    total, largest = sum(tiers.values()), planned.slot_bytes(built._bind().plans)
    for tier, share in (("cpu", 0.25), (f"disk:{tmp_path}", 0.5), ("device", 0.25)):
        assert abs(tiers[tier] - share * total) <= largest
    whole = build("AdamW", shapes, lr=1e-3)[1].plan.summary()["state_bytes"]
    for budget in (whole - 1, "3MiB", 2 * whole):
        params, built = build("AdamW", shapes, lr=1e-3, offload="cpu", device_budget=budget)
        plan = built.plan.summary()
        assert plan["state_bytes"] == whole
        limit = planned.parse_bytes(budget)
        assert plan["device_state_bytes"] <= limit
        assert measured(built) <= limit + planned.SECTOR * len(MIXED)
        assert ("cpu" in plan["paged_bytes"]) == (limit < whole)
        resident = build("AdamW", shapes, lr=1e-3)
        train(params, built, range(2))
        train(*resident, range(2))
        assert differing((params, built), resident) == []


def measured(built: Any) -> int:
    """Bytes of the tensors that states lie in on the device."""
    bound = built._bind()
    kept = sum(t.nbytes for group in bound.groups for window in group.windows for t in window.state.values())
    slots = [*bound.pager._free, *bound.pager._going]
    return int(kept + sum(t.nbytes for t in bound.pager._here.values()) + sum(s.buffer.nbytes for s in slots))


@pytest.mark.parametrize("rule", ["AdamW", "Muon", "SOAP"])
def test_state_dicts_checkpoints_and_copies_go_anywhere(rule: str, tmp_path: Path) -> None:
    shapes = {"a": (40, 60), "b": (60, 40)}
    options: dict[str, Any] = {"lr": 1e-2, "state_codec": "int8"}
    resident, paged = (build(rule, shapes, offload=o, **options) for o in (None, f"disk:{tmp_path / 'p'}"))
    for params, built in (resident, paged):
        train(params, built, range(3))
    for source, offload in ((resident, "cpu"), (paged, None), (paged, f"disk:{tmp_path / 'p'}")):
        other = build(rule, shapes, offload=offload, **options)
        for name, param in other[0].items():
            param.data.copy_(source[0][name])
        other[1].load_state_dict(source[1].state_dict())
        assert other[1].param_groups[0]["offload"] == offload
        train(*other, range(3, 5))
        clone: tuple[Params, Any] = pickle.loads(pickle.dumps(source))
        train(*clone, range(3, 5))
        assert differing(other, clone) == []
    twin = copy.deepcopy(paged)
    train(*twin, range(3, 5))
    assert differing(twin, clone) == []
    assert differing(paged, resident) == [], "copies have pages of their own"


def test_native_checkpoint_continues_elsewhere(tmp_path: Path) -> None:
    def made(offload: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 30))
        return model, distopt.SOAP(model.named_parameters(), lr=1e-2, state_codec="int8", offload=offload)

    model, built = made(f"disk:{tmp_path / 'pages'}")
    train(dict(model.named_parameters()), built, range(3))
    distopt.checkpoint.save(tmp_path / "a", model=model, optimizer=built)
    train(dict(model.named_parameters()), built, range(3, 5))
    for offload in (None, "cpu", f"disk:{tmp_path / 'pages'}"):
        other, again = made(offload)
        distopt.checkpoint.load(tmp_path / "a", model=other, optimizer=again)
        assert again.param_groups[0]["offload"] == offload
        train(dict(other.named_parameters()), again, range(3, 5))
        ran = [(dict(m.named_parameters()), o) for m, o in ((model, built), (other, again))]
        assert differing(*ran) == []


def test_clipping_skipping_and_added_groups(tmp_path: Path) -> None:
    ran = []
    for offload in (None, f"disk:{tmp_path}"):
        params, built = build("AdamW", MIXED, lr=1e-2, max_grad_norm=0.5, nonfinite="skip", offload=offload)
        train(params, built, range(2))
        params["wide"].grad = torch.full_like(params["wide"], torch.inf)
        built.step()
        assert built.skipped_steps == 1
        torch.manual_seed(3)
        params["more"] = nn.Parameter(torch.randn(50, 50))
        built.add_param_group({"params": [("more", params["more"])], "rule": "muon"})
        assert built.param_groups[1]["offload"] == offload
        schedule = torch.optim.lr_scheduler.StepLR(built, 1, 0.5)
        for step in range(2, 5):
            train(params, built, range(step, step + 1))
            schedule.step()
        ran.append((params, built))
    assert differing(*ran) == []


def test_stepping_in_backward(tmp_path: Path) -> None:
    ran = []
    for offload in (None, f"disk:{tmp_path}"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30))
        built = distopt.AdamW(model.named_parameters(), lr=1e-2, nonfinite=None, state_codec="int8", offload=offload)
        distopt.step_in_backward(model, built)
        for _ in range(3):
            model(torch.randn(8, 50)).square().mean().backward()
        ran.append((dict(model.named_parameters()), built))
    assert differing(*ran) == []


def test_killed_in_a_step_and_resumed_beside_the_pages_it_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", paging.__name__, str(tmp_path / "a")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[1])
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


def test_state_is_shown_by_state_dicts_alone() -> None:
    params, built = build("AdamW", SMALL, lr=1e-2, offload="cpu")
    train(params, built, range(1))
    shown: Tensor = built.state[params["matrix"]]["exp_avg"]
    assert shown.is_meta
    assert built.state_dict()["state"][0]["exp_avg"].any()


@pytest.mark.parametrize("options", [{"offload": "cpu"}, {"offload": "cpu", "device_budget": "3MiB"}, {}])
def test_state_bytes_are_those_on_the_device(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 30))
    built = distopt.create_optimizer("adamw", model, lr=1e-3, **options)
    assert distopt.state_bytes("adamw", model, **options) == built.plan.summary()["device_state_bytes"]
