"""Every Triton kernel compiled for sm_80 and sm_90, without a GPU; run by test_kernels.py.

python -m tests.ahead_of_time
"""

from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distopt.kernels import triton_states, triton_step
from distopt.kernels import triton_stretches as stretches
from distopt.kernels.triton_codecs import CODECS, WEIGHTS
from distopt.matrix.symmetric import SIZES, product_kernel

ARCHITECTURES = (80, 90)
STRETCHES = (
    (stretches.muon_prepare, 2, 2, "bf16"),
    (stretches.muon_prepare_nesterov, 2, 2, "bf16"),
    (stretches.muon_prepare_nesterov, 2, 2, "fp16"),
    (stretches.muon_apply, 2, 1, "bf16"),
    (stretches.adafactor_precondition, 4, 2, "fp32"),
    (stretches.adafactor_average, 2, 3, "fp32"),
    (stretches.adafactor_apply, 3, 1, "fp32"),
)
"""Stretches of rules, how many tensors they read and write, and the dtype that travels."""


def compile_for(architecture: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> None:
    """Compile a kernel; there must be machine code."""
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


def steps() -> list[dict[str, Any]]:
    """What the driver is compiled with: every rule, codec and storage of weights, not every combination."""
    flags = {"RAGGED": False, "AGREED": False, "LOOK": False}
    plain = [(rule, "Int8", ("float32", None)) for rule in triton_step.RULES]
    coded = [("AdamW", codec, ("float32", None)) for codec in sorted({name for name, _ in CODECS} - {"Int8"})]
    stored = [("AdamW", "Int8", weight) for weight in WEIGHTS if weight[0] != "float32"]
    found = []
    for rule, codec, (weight, rest) in plain + coded + stored:
        states = ((codec, True), (codec, False)) if rule == "AdamW" else ((codec, True),)
        options = triton_step.options(rule, states, weight, rest, weight)
        assert options is not None
        found.append(options | flags)
    [packed] = [options for options, (_, codec, _) in zip(found, plain + coded) if codec == "Int4"]
    cut = [
        packed | {"RAGGED": True},
        found[0] | {"RAGGED": True, "AGREED": True},
        found[0] | {"RAGGED": True, "LOOK": True},
    ]
    return found + cut


def main() -> None:
    """Compile everything."""
    scalars = {f"s{i}": "fp32" for i in range(7)}
    signature = {"rows": "*i64", "programs": "*i32", "coefficient": "*fp32", "taken": "*u8", **scalars}
    variants = steps()
    for architecture, constants in product(ARCHITECTURES, variants):
        compile_for(architecture, triton_step.step_kernel, signature, constants)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for architecture, (short, dtype), adds in product(ARCHITECTURES, dtypes.items(), (False, True)):
        side, depth = SIZES[dtype]
        numbers = dict.fromkeys(product_kernel.arg_names, "i32") | {"alpha": "fp32", "beta": "fp32"}
        numbers |= dict.fromkeys(("x", "y", "add", "out"), f"*{short}")
        constants = {"ADDS": adds, "SIDE": side, "DEPTH": depth, "WIDEN": False}
        compile_for(architecture, product_kernel, numbers, constants)
    for architecture, (stretch, inputs, outputs, dtype) in product(ARCHITECTURES, STRETCHES):
        numbers = dict.fromkeys(stretches.stretch_kernel.arg_names, "i32") | {"s0": "fp32", "s1": "fp32"}
        numbers |= dict.fromkeys(("x0", "x2", "x3", "y0", "y2"), "*fp32")
        numbers |= {"x1": f"*{dtype if outputs == 1 else 'fp32'}", "y1": f"*{dtype if outputs == 2 else 'fp32'}"}
        constants = {"STRETCH": stretch, "INPUTS": inputs, "OUTPUTS": outputs, "HIGH": 8, "WIDE": 128}
        compile_for(architecture, stretches.stretch_kernel, numbers, constants)
    given = {"rows": "*i64", "programs": "*i32", "taken": "*u8"}
    different = [codec for codec, written in CODECS.items() if codec[1] or written.scaled]
    for architecture, codec in product(ARCHITECTURES, different):
        flags = {"RAGGED": codec[1], "AGREED": codec[1], "LOOK": False}
        for kernel, write in ((triton_states.read_kernel, False), (triton_states.write_kernel, True)):
            chosen = triton_states.options(codec[0], signed=codec[1], write=write)
            constants = chosen | {name: flag for name, flag in flags.items() if name in kernel.arg_names}
            compile_for(architecture, kernel, given, constants)
    for architecture, (low, rest) in product(ARCHITECTURES, WEIGHTS):
        if rest is not None:
            written = WEIGHTS[low, rest]
            names = {"float32": "fp32", "float16": "fp16", "bfloat16": "i16", "int8": "i8", "int16": "i16"}
            weights = {
                "x": "*fp32",
                "param": f"*{names[low]}",
                "rest": f"*{names[rest]}",
                "taken": "*u8",
                "numel": "i32",
            }
            compile_for(architecture, triton_states.join_kernel, weights, {"JOIN": written.join, "COUNT": 1024})
            compile_for(architecture, triton_states.split_kernel, weights, {"SPLIT": written.split, "COUNT": 1024})
    print(f"{len(variants)} steps compiled for {ARCHITECTURES}")


if __name__ == "__main__":
    main()
