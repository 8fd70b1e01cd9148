"""Compiles the Triton kernels without a GPU, and prints what a program of each takes of one.

    python tests/processes/compile_triton.py [80|90|100]

One JSON list: kernel, shape, bytes of shared memory, registers of a thread, and bytes that spill from them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mha2mla_vlm.model.kernels import triton_decode, triton_packed, triton_rotated

SHAPES = ((28, 4, 32, 256), (28, 4, 8, 96), (32, 8, 32, 512), (32, 32, 8, 768), (32, 32, 32, 2048))
AT_READ = ((28, 4, 128, 120), (28, 4, 32, 120), (32, 8, 128, 256), (32, 32, 128, 1024), (32, 32, 32, 2048))
NUMBERS = ("q_rope", "q_latent", "latent", "k_rope", "cos", "sin", "mixed")
UPS = ("text_up", "last_up", "text_bias", "last_bias")
POINTERS = {"visual": "*i1", "lse": "*fp32", "table": "*i32", "pairs": "*i64", "constant": "*fp32"}
POINTERS |= {"scale": "fp32", "packed": "*u8"} | dict.fromkeys(NUMBERS + UPS, "*bf16")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def needed(name, shape, kernel, fixed, options, target):
    """What a kernel takes in bfloat16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else POINTERS.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", target, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return {
        "kernel": name,
        "shape": shape,
        "shared": made.metadata.shared,
        "registers": registers,
        "spilled": stack,
    }


def at_write(heads, groups, rope_dim, rank, page, target):
    """Of the kernel for keys rotated at write."""
    size, launch = triton_decode._sizes(heads // groups, groups, 2, rank, rope_dim, 2)
    fixed = {
        "MASK": 0, "FILLED": False, "CONSTANT": True, "VISUAL": True, "KINDS": 2, "ALIGN": 8, "ROPE_ALIGN": 8,
        "mask": None, "filled": None, "PAGE": page, **size,
    }  # fmt: skip
    if page == 0:
        fixed["table"] = None
    shape = (heads, groups, rope_dim, rank)
    return needed("at write", shape, triton_decode._split_kernel, fixed, launch, target)


def at_read(heads, groups, rope_dim, rank, target):
    """Of the kernel for keys rotated at read."""
    size, launch = triton_rotated._sizes(heads // groups, rank, rope_dim // 2, 2)
    fixed = {
        "MASK": 0, "FILLED": False, "BIAS": True, "VISUAL": True, "KINDS": 2, "ALIGN": 8, "HALF_ALIGN": 8,
        "SPAN": 1024, "mask": None, "filled": None, **size,
    }  # fmt: skip
    fixed |= dict.fromkeys(("CONSTANT", "NOPE", "PAIRS"), rope_dim < 128)
    if rope_dim == 128:
        fixed |= {"pairs": None, "q_latent": None, "constant": None}
    shape = (heads, groups, rope_dim, rank)
    return needed("at read", shape, triton_rotated._split_kernel, fixed, launch, target)


def of_bytes(rank, target):
    """Of the kernel that makes numbers of rows of bytes."""
    return needed("unpack", (rank,), triton_packed._unpack_kernel, triton_packed._sizes(rank), {}, target)


target = int(sys.argv[1]) if len(sys.argv) > 1 else 90
found = [at_write(*shape, 0, target) for shape in SHAPES] + [at_write(*SHAPES[0], 16, target)]
print(json.dumps([*found, *(at_read(*shape, target) for shape in AT_READ), of_bytes(200, target)]))
