"""Kill -9 in the middle of saving checkpoints, many times, and read what is left.

    python -m tests.faults.kill9 --rounds 2000            # one process, killed at random moments
    python -m tests.faults.kill9 --rounds 200 --ranks 2   # one rank killed, the others have to stop with an error
    python -m tests.faults.kill9 --steps                  # killed before each single system call of a save
    python -m tests.faults.kill9 --pairs                  # the same, and then again in the save that follows

Every save is of the next generation: all tensors hold its number. Whatever was killed, `latest` must find a checkpoint
that verifies, whole, of the generation before or of this one, and of this one if the save had returned. Saves either
overwrite one checkpoint or make a new one and prune the old. In the end nothing that a killed save left may remain.

POSIX only: a save is forked from this process, which has torch imported and no threads, so that a round takes
milliseconds. It prints one line of JSON: how many rounds ended with which generation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from distopt.state import files
from distopt.state.files import Piece, split_name, write
from distopt.state.manifest import CheckpointError
from distopt.state.reader import Reader, latest, prune

SHAPES = {"weight": (250, 1000), "weight/exp_avg": (250, 1000), "bias": (7,), "step": ()}
KEEP = 2
REFUSED = 3  # exit code of a rank that stopped with a CheckpointError
DEADLINE = 30.0  # seconds for the ranks that survive
SYSTEM_CALLS = ["mkdir", "open", "chmod", "fsync", "rename", "unlink", "rmdir"]


def pieces(generation: int, rank: int, ranks: int) -> Iterator[Piece]:
    """Rows of the tensors, as equal as torch.chunk makes them; vectors and scalars on rank 0."""
    for name, shape in SHAPES.items():
        rows, cols = shape if len(shape) == 2 else (1, shape[0] if shape else 1)
        size = -(-rows // ranks)
        r0, r1 = min(rows, rank * size), min(rows, (rank + 1) * size)
        yield Piece(name, shape, (r0, r1, 0, cols), torch.full((r1 - r0, cols), float(generation)))


def save(directory: Path, generation: int, overwrite: bool, rank: int = 0, ranks: int = 1) -> None:
    """What training does every so often."""
    step = 0 if overwrite else generation
    write(directory / f"step-{step}", pieces(generation, rank, ranks), {"generation": generation})
    if rank == 0:
        prune(directory, KEEP)


def read_generation(directory: Path) -> int:
    """The generation of the checkpoint that would be resumed from, after reading all of it."""
    path = latest(directory)
    assert path is not None, f"no checkpoint among {sorted(os.listdir(directory))}"
    with Reader(path) as reader:
        reader.verify()
        generation = reader.document["generation"]
        assert set(reader.names()) == set(SHAPES)
        for name in SHAPES:
            assert torch.all(reader.read(name) == generation), f"'{name}' is not of generation {generation}"
    assert isinstance(generation, int)
    return generation


def fork(target: Callable[[], None]) -> int:
    """Run a function in a child process; its exit code is 0, `REFUSED`, or 1 with a traceback."""
    child = os.fork()
    if child == 0:
        _end(target)
    return child


def _end(target: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        target()
        code = 0
    except CheckpointError:
        code = REFUSED
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def wait(child: int, deadline: float = DEADLINE) -> int:
    """The exit code of a child, negative for a signal."""
    end = time.monotonic() + deadline
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a rank was still waiting {deadline:g} s after another one had been killed")
        time.sleep(0.0005)


def check(directory: Path, before: int, returned: bool, outcome: Counter[str]) -> int:
    """The generation after a killed save; counts which it was."""
    after = read_generation(directory)
    assert after in (before, before + 1), f"generation {after} after {before}"
    assert not returned or after == before + 1, "a save that had returned was lost"
    found = latest(directory)
    assert found is not None
    assert split_name(found.name)[1] in ("", "old"), f"{found.name} was offered"
    aside = " set aside" if split_name(found.name)[1] else ""
    outcome["returned" if returned else ("new" if after > before else "previous") + aside] += 1
    return after


def check_clean(directory: Path, before: int, overwrite: bool) -> None:
    """One undisturbed save leaves nothing of the killed ones."""
    assert wait(fork(lambda: save(directory, before + 1, overwrite))) == 0
    left = sorted(os.listdir(directory))
    assert all(split_name(name)[1] == "" for name in left), f"left over: {left}"
    assert len(left) == (1 if overwrite else KEEP), f"left over: {left}"


def run_random(directory: Path, rounds: int, ranks: int, overwrite: bool, seed: int) -> Counter[str]:
    """Kill one rank at a random moment of each save."""
    chance = random.Random(seed)
    outcome: Counter[str] = Counter()
    generation = 0
    duration = _timed(directory, generation, ranks, overwrite)
    for number in range(rounds):
        ready, children = _start(directory, generation + 1, ranks, overwrite, f"{directory}.store-{number}")
        _await(ready, ranks)
        victim = chance.randrange(ranks)
        time.sleep(chance.uniform(0, 1.2 * duration))
        os.kill(children[victim], signal.SIGKILL)
        codes = [wait(child) for child in children]
        survivors = [code for rank, code in enumerate(codes) if rank != victim]
        assert all(code in (0, REFUSED) for code in survivors), f"exit codes {codes}, rank {victim} killed"
        generation = check(directory, generation, 0 in codes, outcome)
    check_clean(directory, generation, overwrite)
    return outcome


def _timed(directory: Path, generation: int, ranks: int, overwrite: bool) -> float:
    ready, children = _start(directory, generation, ranks, overwrite, f"{directory}.store")
    _await(ready, ranks)
    start = time.monotonic()
    codes = [wait(child) for child in children]
    assert codes == [0] * ranks, f"exit codes {codes} of an undisturbed save"
    return time.monotonic() - start


def _start(directory: Path, generation: int, ranks: int, overwrite: bool, store: str) -> tuple[int, list[int]]:
    ready, tell = os.pipe()

    def rank_main(rank: int) -> None:
        if ranks > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        os.write(tell, b".")
        save(directory, generation, overwrite, rank, ranks)

    children = [fork(lambda rank=rank: rank_main(rank)) for rank in range(ranks)]  # type: ignore[misc]
    os.close(tell)
    return ready, children


def _await(ready: int, ranks: int) -> None:
    """Return when all ranks are about to save."""
    with open(ready, "rb") as pipe:
        assert len(pipe.read(ranks)) == ranks, "a rank ended before it could save"


def run_steps(directory: Path, overwrite: bool, pairs: bool) -> Counter[str]:
    """Kill a save before each of its system calls; with `pairs`, also the save after it, before each of its."""
    outcome: Counter[str] = Counter()
    generation = 0
    save(directory, generation, overwrite)
    save(directory, generation := generation + 1, overwrite)
    first = 0
    returned = False
    while not returned:
        second = 0
        again = True
        while again:
            returned = _killed_before(first, directory, generation + 1, overwrite)
            generation = check(directory, generation, returned, outcome)
            again = pairs and not returned
            if again:
                again = not _killed_before(second, directory, generation + 1, overwrite)
                generation = check(directory, generation, not again, outcome)
                second += 1
        first += 1
    check_clean(directory, generation, overwrite)
    outcome["system calls"] = first - 1
    return outcome


def _killed_before(number: int, directory: Path, generation: int, overwrite: bool) -> bool:
    """Save in a process that kills itself before its system call `number`. False if it did, True if there was none."""

    def main() -> None:
        left = number

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)

            return wrapper

        for name in SYSTEM_CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        files.save_file = deadly(files.save_file)
        save(directory, generation, overwrite)

    code = wait(fork(main))
    assert code in (0, -signal.SIGKILL), f"exit code {code}"
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0, help="saves killed at random moments, half of each kind")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="distopt-kill9-") as base:
        for kind in ("overwrite", "prune"):
            overwrite = kind == "overwrite"
            if options.steps or options.pairs:
                report[f"{kind}, steps"] = run_steps(Path(base) / f"{kind}-steps", overwrite, options.pairs)
            if options.rounds:
                rounds = (options.rounds + 1) // 2
                report[kind] = run_random(Path(base) / kind, rounds, options.ranks, overwrite, options.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
