"""Compiled kernels on CPU: `step.cpp`, built by the system's C++ compiler for one rule, its codecs and the storage of weights
when they first step; `many.cpp` for what is asked of many tensors.

A build takes seconds, and is kept in the user's cache directory under a name that has the source, the compiler's command
and the processor in it, with its own sum behind it: one that is torn or damaged is built again. Where there is no compiler
the rule's text runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distopt.kernels.jobs import Table

SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("step.cpp", "threads.h"))
# No -ffast-math: every operation is rounded as torch rounds it. Without errno and traps loops of roots become vectors.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
CODECS = {
    ("FP32", True): "Fp32", ("FP32", False): "Fp32", ("BF16", True): "Bf16", ("BF16", False): "Bf16",
    ("BF16Stochastic", True): "Bf16Stochastic", ("BF16Stochastic", False): "Bf16Stochastic",
    ("Int8", True): "Int8", ("Int8", False): "UInt8", ("Fp8", True): "Fp8", ("Fp8", False): "UFp8",
}  # fmt: skip
"""(class of the codec, signed) → struct in the source. int4 runs as text."""
FORMATS = {torch.float32: "Fp32", torch.bfloat16: "Bf16", torch.float16: "Fp16"}
RESTS = {
    None: "Alone<{}>", torch.float32: "Copied<{}>",
    torch.int8: "ErrorBits<{},int8_t>", torch.int16: "ErrorBits<{},int16_t>",
}  # fmt: skip
"""dtype of what is kept of fp32 weights beside the parameter → struct, of the parameter's format."""
SUM = hashlib.sha256().digest_size
TYPES = {torch.float32: 2 << 8 | 32, torch.float16: 2 << 8 | 16, torch.bfloat16: 4 << 8 | 16}
DEVICES = {"cpu": 1, "cuda": 2}
"""dtype and device → what DLPack calls them: code and bits, type."""
FACTOR = 7
"""Where the source looks for the factor of gradients, after the scalars of a rule."""


class Kernel:
    """A build: steps jobs as every `CodedKernel` does."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._step = library.step
        address, number = ctypes.c_void_p, ctypes.c_int
        self._step.argtypes = [address, ctypes.c_int64, address, number, number, number, ctypes.c_float]
        self._step.restype = None

    def __call__(
        self, table: Table, scalars: tuple[float, ...], look: bool, factor: float = 1.0, scale: float = 1.0
    ) -> None:
        """Step with gradients times `factor`, after they were multiplied by `scale` in place (fp32, of jobs without `starts`)."""
        assert table.ok is None and table.factor is None, "the host knows whether it takes a step"
        numbers = np.zeros(FACTOR + 1, np.float32)
        numbers[: len(scalars)] = scalars
        numbers[FACTOR] = factor
        how = torch.get_num_threads(), int(look), int(table.wide), scale
        self._step(table.rows.ctypes.data, len(table.rows), numbers.ctypes.data, *how)


class Many:
    """What is asked of many tensors at once."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        capsule = torch.Tensor.__dlpack_c_exchange_api__
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._exchange = pointer(capsule, b"dlpack_exchange_api")
        self._look, self._squares = library.look, library.squares
        address, number = ctypes.c_void_p, ctypes.c_int64
        self._look.argtypes = [address, ctypes.py_object, number, address, address, number, address]
        self._look.restype = number
        self._squares.argtypes, self._squares.restype = [address, address, number, ctypes.c_int, address], None

    def look(
        self, tensors: list[Any], device: torch.device, numels: np.ndarray, types: np.ndarray, addresses: np.ndarray
    ) -> int:
        """Write where each tensor lies; 0 for what is not a contiguous tensor on the device (CPU or CUDA) with so many elements
        of this one of `TYPES`, or has no memory. How many are not. All arrays (tensors,) int64."""
        place = DEVICES[device.type] << 8 | (device.index or 0)
        at = (array.ctypes.data for array in (numels, types))
        return int(self._look(self._exchange, tensors, place, *at, len(addresses), addresses.ctypes.data))

    def squares(self, addresses: np.ndarray, numels: np.ndarray) -> np.ndarray:
        """Sums of squares (tensors,), in fp64, of the fp32 tensors there; not finite where one of them is not."""
        found = np.empty(len(addresses))
        at = (array.ctypes.data for array in (addresses, numels))
        self._squares(*at, len(addresses), torch.get_num_threads(), found.ctypes.data)
        return found


@functools.cache
def build_many() -> Many | None:
    """None where it cannot be built."""
    library = load(Path(__file__).with_name("many.cpp"), kind=ctypes.PyDLL)
    return None if library is None else Many(library)


def stored_weights(weight: torch.dtype, rest: torch.dtype | None) -> str:
    """The struct of weights that are stored so."""
    return RESTS[rest].format(FORMATS[weight])


@functools.cache
def build(rule: str, codecs: tuple[str, ...], weights: str = "Alone<Fp32>") -> Kernel | None:
    """The kernel of a rule for states and weights stored so; None where it cannot be built."""
    first, second = (*codecs, "Fp32")[:2]
    structs = {"RULE": rule, "WEIGHTS": weights, "CODEC_A": first, "CODEC_B": second}
    library = load(SOURCE, *(f"-D{name}={struct}" for name, struct in structs.items()))
    return None if library is None else Kernel(library)


def load(source: Path, *defines: str, kind: type[ctypes.CDLL] = ctypes.CDLL) -> Any:
    """The library that a source makes, as a `kind` of ctypes library; None where it cannot be built."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    command = [compiler, *FLAGS, *defines]
    words = [*command, source.read_text(), HEADER.read_text(), _processor()]
    name = f"{source.stem}-{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:24]}.so"
    try:
        cache = _cache()
        if cache is not None and _is_whole(cache / name):
            return kind(str(cache / name))
        with tempfile.TemporaryDirectory(prefix="distopt-", dir=cache) as folder:
            made = Path(folder) / name
            options = ["-shared", "-fPIC", "-pthread", str(source), "-o", str(made)]
            subprocess.run([*command, *options], check=True, capture_output=True, timeout=300)
            library = kind(str(made))
            if cache is not None:
                with made.open("r+b") as file:  # half a library would end whoever loads it
                    file.write(hashlib.sha256(file.read()).digest())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(made, cache / name)  # ranks may build at the same time
            return library
    except (OSError, subprocess.SubprocessError):
        return None


def _is_whole(library: Path) -> bool:
    """Whether a build that was kept is what was written then."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-SUM]).digest() == content[-SUM:]


def _cache() -> Path | None:
    """Where builds are kept: a directory that is this user's alone; None where there is none that can be written."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) / "distopt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
