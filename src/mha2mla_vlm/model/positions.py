"""Where tokens are, for keys that are rotated when they are read.

Shapes: A axes of a position (three numbers with multimodal RoPE, else one), B batch, T new tokens, S all
tokens, D head dim, P = D / 2 pairs.
"""

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import Cache

from mha2mla_vlm.model.cache.latent import track_positions
from mha2mla_vlm.utils.compat import of_full_attention, one_table, takes_layer_type

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin
STEP = 128  # places


class RecordingRotary(nn.Module):
    """A language model's rotary embedding that remembers the positions it was last asked for."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: torch.Tensor | None = None
        self.by_type = takes_layer_type(rotary)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Tables:
        """Tables of `position_ids [B, T]` or `[A, B, T]`."""
        self.positions = position_ids if position_ids.ndim == 3 else position_ids[None]
        tables: Tables = self.rotary(x, position_ids, *args, **kwargs)
        return tables

    @property
    def of_full_attention(self) -> Callable[..., Tables]:
        """The embedding that it wraps, as layers of full attention get it."""
        found: Callable[..., Tables] = of_full_attention(self.rotary) if self.by_type else self.rotary
        return found


class Rotation:
    """Rotary tables `cos, sin [B, S, D]` of tokens at `positions [A, B, S]`, and of places between them."""

    def __init__(
        self, rotary: Callable[..., Tables], positions: torch.Tensor, like: torch.Tensor, config: Any
    ) -> None:
        self.rotary, self.positions, self.config, self._like = rotary, positions, config, like
        self.plans: dict[Hashable, Any] = {}  # of blocks, for all layers that need the same
        self._known: Tables | None = None

    @property
    def cos(self) -> torch.Tensor:
        """Cosines of all tokens, `[B, S, D]`."""
        return self._whole()[0]

    @property
    def sin(self) -> torch.Tensor:
        """Sines of all tokens, `[B, S, D]`."""
        return self._whole()[1]

    def _whole(self) -> Tables:
        if self._known is None:  # a cached_property has a lock in Python 3.11, which Dynamo cannot enter
            self._known = self._tables(self._like, self.positions.long())
        return self._known

    def at(self, places: torch.Tensor) -> Tables:
        """Tables `[B, n, D]`, in float32, of `places [A, B, n]` up to the last token, whole or between."""
        like = places.new_empty(0, dtype=torch.float32)
        # variants of RoPE that depend on the length see that of all tokens
        last = self.positions.amax(-1, keepdim=True).to(places.dtype)
        cos, sin = self._tables(like, torch.cat([places, last], dim=-1))
        return cos[:, :-1], sin[:, :-1]

    def of_pairs(self, tokens: torch.Tensor, pairs: torch.Tensor) -> Tables:
        """Tables `[B, n, c]`, in float32, of some `tokens [n]` and `pairs [c]`.

        Those of multiples of `STEP` are turned by what is left, which takes fewer cosines than all places do.
        """
        places, like = self.positions[..., tokens], torch.empty(0, device=self.positions.device)
        lowest, highest = (int(x) for x in places.aminmax())
        if lowest < 0:
            cos, sin = self.at(places.float())
            return cos[..., pairs], sin[..., pairs]
        ends = like.new_tensor([*range(0, highest + 1, STEP), *range(STEP)])
        cos, sin = (table[0][:, pairs] for table in self.at(ends.expand(*places.shape[:2], -1)))
        far, near = cos[:-STEP], cos[-STEP:]
        whole = torch.complex(far, sin[:-STEP])
        rest = torch.complex(near, sin[-STEP:]) / near[:1]  # a table may be scaled
        axis, made = self.frequencies[1][pairs], whole.new_empty(*places.shape[1:], len(pairs))
        for number, own in enumerate(places):
            which = (axis == number).nonzero()[:, 0]
            made[..., which] = whole[:, which][own // STEP] * rest[:, which][own % STEP]
        return made.real, made.imag

    @cached_property
    def frequencies(self) -> Tables:
        """Angle `[P]` that each pair turns by at one step along its axis, and that axis `[P]`."""
        axes, batch, _ = self.positions.shape
        steps = torch.eye(axes, device=self.positions.device)[:, None].expand(-1, batch, -1)
        cos, sin = (table[0].chunk(2, dim=-1)[0] for table in self.at(steps))
        angles, axis = torch.atan2(sin, cos).max(0)
        return angles, axis

    def _tables(self, like: torch.Tensor, places: torch.Tensor) -> Tables:
        cos, sin = self.rotary(like, places if len(places) > 1 else places[0])
        return one_table(cos, self.config), one_table(sin, self.config)


class TokenPositions:
    """The positions of one step's tokens; all layers share the tables of all tokens, made once."""

    def __init__(self, rotary: RecordingRotary) -> None:
        self.rotary = rotary
        self._rotation: Rotation | None = None

    def rotation(self, cache: Cache, layer_idx: int, new: torch.Tensor, total: int, config: Any) -> Rotation:
        """That of all `total` tokens that a layer has just added `new [B, T, ..]` to."""
        if self._rotation is None:
            positions = self.rotary.positions
            assert positions is not None, "set as the language model begins"
            rows = positions.expand(-1, len(new), -1).int()
            known = track_positions(cache, layer_idx, rows, total)
            self._rotation = Rotation(self.rotary.of_full_attention, known, new, config)
        return self._rotation
