"""One step of decoding as the original does it: the ways that PyTorch offers, of which the best counts.

Shapes: B batch, H query heads, G KV heads, M = H / G, S tokens, D head dim.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn.functional import scaled_dot_product_attention

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def grouped_matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """Two batched products, heads of a group as rows."""
    grouped = q.view(*k.shape[:2], -1, q.shape[-1]) * scaling
    weights = (grouped @ k.transpose(-1, -2)).softmax(-1)
    return (weights @ v).view(q.shape)


def sdpa_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """SDPA that knows of groups."""
    return scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)


def sdpa_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """SDPA with the heads of a group as rows of one head: keys are read once."""
    grouped = q.view(*k.shape[:2], -1, q.shape[-1])
    return scaled_dot_product_attention(grouped, k, v, scale=scaling).view(q.shape)


def sdpa_repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """SDPA after keys and values are repeated for each head."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(q, k, v, scale=scaling)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """The package flash-attn, as made for one new token over a cache."""
    from flash_attn import flash_attn_with_kvcache

    rows = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_with_kvcache(*rows, softmax_scale=scaling).transpose(1, 2)


def dense_ways(device: torch.device) -> dict[str, Dense]:
    """The ways to run on a device, by name: `[B, H, 1, D]` of `q [B, H, 1, D]` and `k, v [B, G, S, D]`."""
    ways: dict[str, Dense] = {
        "grouped matmul": grouped_matmul,
        "sdpa grouped": sdpa_grouped,
        "sdpa rows": sdpa_rows,
        "sdpa repeated": sdpa_repeated,
    }
    if device.type == "cuda" and find_spec("flash_attn"):
        ways["flash-attn"] = flash_attention
    return ways
