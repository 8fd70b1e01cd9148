"""Keys that are rotated when they are read: made of latents, block by block, for absorbed attention.

With `c_j` the latent of a token at position j, its key is `Rot_j (U_k c_j + b_k)`, U_k the up projection of
its modality. Pure functions over tensors.

Shapes: B batch, S all tokens, n tokens of a block, G KV heads, R rope dims, D head dim, r latent dims.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla_vlm.model.absorbed import Piece, Up
from mha2mla_vlm.model.cache.latent import Pieces
from mha2mla_vlm.model.cache.pages import Paged
from mha2mla_vlm.model.modality import Kind, Run, runs_between
from mha2mla_vlm.model.positions import Rotation
from mha2mla_vlm.model.rope import rotate

BLOCK = 512  # tokens whose keys are there at a time


@dataclass(frozen=True)
class Angles:
    """Rotary tables `cos, sin [B, S, D]` of all tokens, and the `pairs [G, R/2]` of each KV head.

    `rotation` is what these are the tables of, where there is a cache; elsewhere layers keep in `shared`,
    if it is given, what others need as well.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    pairs: torch.Tensor
    rotation: Rotation | None = None
    shared: dict[Hashable, Any] | None = None

    @classmethod
    def of(cls, rotation: Rotation, pairs: torch.Tensor) -> "Angles":
        """Those of all tokens of a step, whose tables are made if they are asked for."""
        if torch.compiler.is_compiling():  # Dynamo of torch 2.9 takes every dataclass for one of its fields
            return Angles(rotation.cos, rotation.sin, pairs, rotation)
        return _AnglesOfStep(rotation, pairs)

    @property
    def dims(self) -> int:
        """D."""
        return self.cos.shape[-1]

    @property
    def plans(self) -> dict[Hashable, Any]:
        """What layers have made of these, by what that depends on."""
        known = self.shared if self.rotation is None else self.rotation.plans
        return {} if known is None else known

    def columns(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the kept pairs `[B, G, n, R/2]`, of some tokens."""
        cos, sin = (table[:, start:stop, self.pairs].transpose(1, 2) for table in (self.cos, self.sin))
        return cos, sin

    def first(self, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the first `count` kept pairs `[B, G, n, count]`, of `tokens [n]`."""
        some = self.pairs[:, :count]
        cos, sin = (table[:, tokens][..., some].transpose(1, 2) for table in (self.cos, self.sin))
        return cos, sin


class _AnglesOfStep(Angles):
    def __init__(self, rotation: Rotation, pairs: torch.Tensor) -> None:
        self.__dict__.update(pairs=pairs, rotation=rotation)

    @property
    def cos(self) -> torch.Tensor:
        return self._known.cos

    @property
    def sin(self) -> torch.Tensor:
        return self._known.sin

    @property
    def dims(self) -> int:
        return 2 * len(self._known.frequencies[0])

    @property
    def _known(self) -> Rotation:
        assert self.rotation is not None, "given"
        return self.rotation


def rebuilt_keys(
    latent: torch.Tensor,
    ups: Sequence[Up],
    runs: Sequence[Run],
    visual: torch.Tensor | None,
    columns: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Rotated keys `[B, G, n, R]` of `latent [B, n, r]`; `visual [B, n]` where `runs` are mixed."""
    parts = []
    for start, stop, kind in runs:
        piece = latent[:, None, start:stop]
        if kind == Kind.MIXED:
            assert visual is not None, "a run of mixed modality without a mask of it"
            which = visual[:, None, start:stop, None]
            parts.append(torch.where(which, _keys(piece, ups[-1]), _keys(piece, ups[0])))
        else:
            parts.append(_keys(piece, ups[-1] if kind == Kind.VISION else ups[0]))
    return rotate(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2), *columns)


def _keys(latent: torch.Tensor, up: Up) -> torch.Tensor:
    keys = latent @ up.rope.transpose(-1, -2)
    return keys if up.rope_bias is None else keys + up.rope_bias


class Rebuilt(Pieces):
    """The tokens of a layer whose rotated keys are made of their latents: pieces of a block each."""

    def __init__(
        self,
        stored: Piece | Pieces | Paged,
        ups: Sequence[Up],
        runs: Sequence[Run],
        visual: torch.Tensor | None,
        angles: Angles,
    ) -> None:
        self.stored, self.ups, self.runs, self.visual, self.angles = stored, ups, runs, visual, angles
        if isinstance(stored, Paged):  # for kernels only
            self.length = stored.room
        else:
            self.length = stored.length if isinstance(stored, Pieces) else stored[0].shape[1]

    @property
    def rank(self) -> int:
        """r."""
        return self.ups[0].weight.shape[-1]

    def latents(self) -> torch.Tensor:
        """Those of all tokens, `[B, S, r]`."""
        assert not isinstance(self.stored, Paged), "a kernel reads pages"
        return (self.stored.whole() if isinstance(self.stored, Pieces) else self.stored)[0]

    def __iter__(self) -> Iterator[Piece]:
        assert not isinstance(self.stored, Paged), "a kernel reads pages"
        start = 0
        for latents, _ in self.stored if isinstance(self.stored, Pieces) else (self.stored,):
            for latent in latents.split(BLOCK, dim=1):
                stop = start + latent.shape[1]
                visual = None if self.visual is None else self.visual[:, start:stop]
                inside = runs_between(self.runs, start, stop)
                yield latent, rebuilt_keys(latent, self.ups, inside, visual, self.angles.columns(start, stop))
                start = stop
