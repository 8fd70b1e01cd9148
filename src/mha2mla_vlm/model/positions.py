"""Where tokens are, for keys that are rotated when they are read.

Shapes: A numbers in a position (three with multimodal RoPE, else one), B batch, T new tokens, S all tokens,
D head dim.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache

from mha2mla_vlm.model.cache.latent import track_positions
from mha2mla_vlm.utils.compat import one_table

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin


class RecordingRotary(nn.Module):
    """A language model's rotary embedding that remembers the positions it was last asked for."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Tables:
        """Tables of `position_ids [B, T]` or `[A, B, T]`."""
        self.positions = position_ids if position_ids.ndim == 3 else position_ids[None]
        tables: Tables = self.rotary(x, position_ids, **kwargs)
        return tables


class TokenPositions:
    """The positions of one step's tokens; all layers share the tables of all tokens, made once."""

    def __init__(self, rotary: RecordingRotary) -> None:
        self.rotary = rotary
        self._tables: Tables | None = None

    def tables(self, cache: Cache, layer_idx: int, new: torch.Tensor, total: int, config: Any) -> Tables:
        """cos and sin `[B, S, D]` of all `total` tokens that a layer has just added `new [B, T, ..]` to."""
        if self._tables is None:
            positions = self.rotary.positions
            assert positions is not None, "set as the language model begins"
            rows = positions.expand(-1, len(new), -1).int()
            known = track_positions(cache, layer_idx, rows, total)
            asked = known.long() if len(known) > 1 else known[0].long()
            cos, sin = self.rotary.rotary(new, asked)
            self._tables = one_table(cos, config), one_table(sin, config)
        return self._tables
