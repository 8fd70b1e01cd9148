"""Compiles the Triton kernels for an H200, without one, and prints what they need of its memory."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mha2mla_vlm.model.kernels import triton_decode

SHAPES = ((28, 4, 32, 256), (28, 4, 32, 128), (32, 8, 32, 512), (32, 32, 32, 1024), (32, 32, 32, 2048))
POINTERS = (
    {"visual": "*i1", "mixed": "*fp32", "lse": "*fp32"}
    | dict.fromkeys(("q_rope", "q_latent", "constant", "latent", "k_rope"), "*bf16")
    | {"table": "*i32"}
)


def shared_memory(heads, groups, rope_dim, rank, page=0):
    """Bytes of shared memory that a program takes in bfloat16."""
    kernel = triton_decode._split_kernel
    rows, tile = triton_decode._tile(heads, rank)
    met = min(groups, (rows - 1) // (heads // groups) + 2)
    fixed = {
        "MASK": 0, "FILLED": False, "CONSTANT": True, "VISUAL": True, "KINDS": 2, "ROWS": rows, "TILE": tile,
        "SPLIT": 1024, "RANK": triton_decode._power(rank), "ROPE": triton_decode._power(met * rope_dim),
        "mask": None, "filled": None, "PAGE": page,
    }  # fmt: skip
    if page == 0:
        fixed["table"] = None
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else POINTERS.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, constants)
    options = triton_decode._launch(rank)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


print(json.dumps([shared_memory(*shape, page) for shape in SHAPES for page in (0, 16)]))
