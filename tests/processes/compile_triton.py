"""Compiles the Triton kernels for an H200, without one, and prints what they need of its memory."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mha2mla_vlm.model.kernels import triton_decode, triton_rotated

SHAPES = ((28, 4, 32, 256), (28, 4, 32, 128), (32, 8, 32, 512), (32, 32, 32, 1024), (32, 32, 32, 2048))
AT_READ = ((28, 4, 128, 124), (28, 4, 128, 256), (32, 8, 128, 256), (32, 32, 128, 1024), (32, 32, 32, 2048))
NUMBERS = ("q_rope", "q_latent", "constant", "latent", "k_rope", "cos", "sin")
UPS = ("text_up", "last_up", "text_bias", "last_bias")
POINTERS = {"visual": "*i1", "mixed": "*fp32", "lse": "*fp32", "table": "*i32", "pairs": "*i64"}
POINTERS |= dict.fromkeys(NUMBERS + UPS, "*bf16")


def needed(kernel, fixed, options):
    """Bytes of shared memory that a program of a kernel takes in bfloat16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else POINTERS.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def at_write(heads, groups, rope_dim, rank, page=0):
    """Of the kernel for keys rotated at write."""
    rows, tile = triton_decode._tile(heads, rank)
    met = min(groups, (rows - 1) // (heads // groups) + 2)
    fixed = {
        "MASK": 0, "FILLED": False, "CONSTANT": True, "VISUAL": True, "KINDS": 2, "ROWS": rows, "TILE": tile,
        "SPLIT": 1024, "RANK": triton_decode._power(rank), "ROPE": triton_decode._power(met * rope_dim),
        "mask": None, "filled": None, "PAGE": page,
    }  # fmt: skip
    if page == 0:
        fixed["table"] = None
    return needed(triton_decode._split_kernel, fixed, triton_decode._launch(rank))


def at_read(heads, groups, rope_dim, rank):
    """Of the kernel for keys rotated at read."""
    fixed = {
        "MASK": 0, "FILLED": False, "CONSTANT": True, "NOPE": True, "BIAS": True, "VISUAL": True, "KINDS": 2,
        "SPLIT": 1024, "mask": None, "filled": None,
    } | triton_rotated._sizes(heads // groups, rank, rope_dim // 2)  # fmt: skip
    return needed(triton_rotated._split_kernel, fixed, triton_rotated._launch(rank))


found = [at_write(*shape, page) for shape in SHAPES for page in (0, 16)]
print(json.dumps(found + [at_read(*shape) for shape in AT_READ]))
