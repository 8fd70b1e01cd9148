"""What kernels ask of stored tokens, in whatever form they are. Pure functions over tensors."""

import torch

from mha2mla_vlm.model.absorbed import Piece
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.packed import PackedTokens
from mha2mla_vlm.model.cache.pages import Paged


def numbers(stored: Piece | Pieces | Paged) -> tuple[torch.Tensor, ...]:
    """Tensors of the dtype that stored tokens are of; an empty one where they are rows of bytes."""
    if isinstance(stored, Paged):
        return (stored.pages,)
    if isinstance(stored, PackedTokens):
        return (stored.rows.new_empty(0, dtype=stored.dtype),)
    assert not isinstance(stored, Pieces), "kernels refuse other pieces"
    return tuple(x for x in stored if x is not None)
