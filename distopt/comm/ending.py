"""The end of a process that is one of several ranks."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave() -> NoReturn:
    """End this process, its work done, with status 0: threads joined, exit handlers run and output flushed, as
    multiprocessing ends its children, without the interpreter's own end.

    A thread of a process group that drops its last tensor late, on a busy machine, asks for the interpreter's lock; if it
    asks during the interpreter's end, that aborts the process, and torchrun reports a failure (pytorch issues 38228 and
    190489). Destroying the group does not always end its threads: FSDP2 keeps it, as does torch._dynamo if it was
    imported after the group was made.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
