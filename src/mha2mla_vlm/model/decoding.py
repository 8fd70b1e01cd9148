"""Decoding over latents, by the kernel that takes given tensors or in PyTorch.

Shapes: B batch, T new tokens, S stored tokens, H heads, D head dim, R rope dims, N = D - R.
"""

from collections.abc import Sequence

import torch

from mha2mla_vlm.model.absorbed import Piece, Up, absorb, attend, attend_pieces, expand
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.interpolated import attend_rotated
from mha2mla_vlm.model.kernels import DecodeBackend, find_kernel
from mha2mla_vlm.model.modality import Run
from mha2mla_vlm.model.rebuilt import Rebuilt


def attend_latents(
    backend: DecodeBackend,
    q_rope: torch.Tensor,
    q_nope: torch.Tensor,
    ups: Sequence[Up],
    scaling: float,
    stored: Piece | Pieces,
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `q_rope [B, H, T, R]` and `q_nope [B, H, T, N]` over latents, `[B, T, H, D]`.

    `runs` and `visual [B, S]` are the modalities of the `stored` tokens, `mask` is a `dense_mask`, `filled`
    the number of tokens in use, if a mask hides the others.
    """
    kernel = find_kernel(backend, q_rope, q_nope, ups, stored, mask)
    if kernel is not None:
        return kernel(q_rope, q_nope, ups, scaling, stored, visual, mask, filled)
    queries = absorb(q_rope, q_nope, ups, scaling)
    if isinstance(stored, Rebuilt):
        sums = attend_rotated(queries, stored, visual, mask)
    elif isinstance(stored, Pieces):
        sums = attend_pieces(queries, stored, runs, visual, mask)
    else:
        sums = attend(queries, stored, runs, visual, mask)
    return expand(sums, ups, q_rope.shape[2])
