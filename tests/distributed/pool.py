"""Warm pools of gloo ranks: `pool(4).run("module:function", …)` runs a function on four ranks and returns its results.

Starting four processes and a process group costs seconds; a call on a pool that is already there costs milliseconds.
A pool is started by its first call and lives until `close_all`, which `conftest.py` calls at the end of the session.
A call that outlives its deadline, a rank that dies and a rank that raises all end in an exception here, and in the end
of that pool: the next call starts a fresh one, so that a hang is one failing test and never a stuck run.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # where it is typed

DEADLINE = 120.0  # seconds a call may take
GRACE = 2.0  # seconds the other ranks have to answer once one has failed
# A process group of gloo holds threads and sockets until its process ends, and meshes built by tests add groups.
MAX_GROUPS = 200
# Imported once by the fork server, instead of once in every rank.
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint"]


class RankError(Exception):
    """A call on a pool failed.

    Attributes:
        errors: What each failed rank has to say: its traceback, its exit code, or its stack when the deadline passed.
        timed_out: Whether the deadline passed.
    """

    def __init__(self, call: str, errors: dict[int, str], timed_out: bool = False) -> None:
        self.errors = errors
        self.timed_out = timed_out
        report = "\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(errors.items()))
        super().__init__(f"{call} failed on rank {', '.join(map(str, sorted(errors)))}\n{report}")


class Pool:
    """`world_size` processes in one gloo process group on 127.0.0.1, one thread each."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._stacks: tempfile.TemporaryDirectory[str] | None = None

    def run(self, target: str, *args: Any, deadline: float = DEADLINE, **kwargs: Any) -> list[Any]:
        """Call a function on every rank.

        Args:
            target: `"package.module:function"`, importable with the repository root on the path.
            *args: Arguments, the same on every rank; anything that pickles.
            deadline: Seconds after which the call fails and the pool is killed.
            **kwargs: Keyword arguments, the same on every rank.

        Returns:
            The results in the order of ranks. Results are pickled: return plain tensors and numbers, no DTensors.

        Raises:
            RankError: A rank raised, died, or did not answer before the deadline. All ranks are named.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((target, args, kwargs))
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a rank that died between two calls is reported by _collect
                pipe.send_bytes(message)
        answers = self._collect(target, deadline)
        if max(groups for _, groups in answers) > MAX_GROUPS:
            self.close()
        return [result for result, _ in answers]

    def close(self) -> None:
        """Kill the ranks; a later call starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._stacks is not None:
            self._stacks.cleanup()
        self._processes, self._pipes, self._stacks = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._stacks = tempfile.TemporaryDirectory(prefix="distopt-ranks-")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, there, self._stack_file(rank)), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        # Rank 0 lets the system choose a free port and the others hear of it: no port is guessed, none is raced for.
        [port] = self._collect("start of rank 0", DEADLINE, ranks=[0])
        for pipe in self._pipes[1:]:
            pipe.send_bytes(pickle.dumps(port))
        self._collect("start of the process group", DEADLINE)

    def _collect(self, call: str, deadline: float, ranks: list[int] | None = None) -> list[Any]:
        """One answer of each rank; raises, and closes the pool, unless all of them are good."""
        ranks = list(range(self.world_size)) if ranks is None else ranks
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        end = time.monotonic() + deadline
        while pending := [rank for rank in ranks if rank not in answers and rank not in errors]:
            ready = wait([self._pipes[rank] for rank in pending], timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for rank in pending:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    good, answer = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(GRACE)
                    good, answer = False, f"died with exit code {self._processes[rank].exitcode}"
                if good:
                    answers[rank] = answer
                else:
                    errors[rank] = answer
                    end = min(end, time.monotonic() + GRACE)
        timed_out = bool(pending) and not errors
        if errors or pending:
            if timed_out:
                errors = {rank: f"no answer within {deadline:g} s\n{self._stack(rank)}" for rank in pending}
            self.close()
            raise RankError(call, errors, timed_out)
        return [answers[rank] for rank in ranks]

    def _stack_file(self, rank: int) -> Path:
        assert self._stacks is not None
        return Path(self._stacks.name) / f"rank{rank}.txt"

    def _stack(self, rank: int) -> str:
        """Where a rank hangs: it writes its Python stacks on SIGUSR1, also while it waits in a collective."""
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self._stack_file(rank).read_text()


_POOLS: dict[tuple[int, str], Pool] = {}


def pool(world_size: int, purpose: str = "") -> Pool:
    """The pool of this session with `world_size` ranks; of its own for what leaves marks in a process."""
    return _POOLS.setdefault((world_size, purpose), Pool(world_size))


def close_all() -> None:
    """End every pool."""
    for warm in _POOLS.values():
        warm.close()
    _POOLS.clear()


def _serve(rank: int, world_size: int, pipe: Connection, stack_file: Path) -> None:
    """The life of a rank: join the process group, then answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the pools
    with stack_file.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world_size))
        torch.set_num_threads(1)
        if rank == 0:
            store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
            pipe.send_bytes(pickle.dumps((True, store.port)))
        else:
            store = TCPStore("127.0.0.1", pickle.loads(pipe.recv_bytes()), world_size, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        pipe.send_bytes(pickle.dumps((True, None)))
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, ConnectionError):
                return
            _reset()
            try:
                answer = pickle.dumps((True, (_call(message), len(dist.distributed_c10d._world.pg_map))))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)


def _call(message: bytes) -> Any:
    target, args, kwargs = pickle.loads(message)
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


def _reset() -> None:
    """Undo what a call may have left in the process; the process group stays."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
