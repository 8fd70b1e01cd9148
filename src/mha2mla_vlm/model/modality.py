"""Which tokens are visual, as a mask and as runs.

Shapes: B batch, T new tokens, S all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Self

import torch

MAX_RUNS = 32  # more runs than this cost more in launches than they save in arithmetic


class Kind(IntEnum):
    """Modality of a run of token positions over the rows of a batch."""

    TEXT = 0
    MIXED = 1  # text in some rows, visual in others
    VISION = 2


class Run(NamedTuple):
    """Token positions `start` to `stop` of one kind."""

    start: int
    stop: int
    kind: Kind


@dataclass(frozen=True)
class TokenModality:
    """Which tokens are visual: `mask [B, S]`, and the same as runs along S.

    Visual tokens come in few contiguous runs, so attention works run by run on views instead of
    gathering tokens; only where rows of a batch differ (padding, other images) it needs the mask.
    """

    mask: torch.Tensor
    runs: tuple[Run, ...]
    new: "TokenModality | None" = None  # the last of these tokens, where others were cached before

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Self:
        """Find the runs of a mask; waits for the device once.

        Under `torch.compile` and `torch.export`, which cannot wait, all is one run of kind MIXED.
        """
        if torch.compiler.is_compiling():
            return cls(mask, (Run(0, mask.shape[1], Kind.MIXED),))
        code = (mask.any(0).long() + mask.all(0).long()).cpu()
        kinds, lengths = torch.unique_consecutive(code, return_counts=True)
        runs, start = [], 0
        for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            runs.append(Run(start, start + length, Kind(kind)))
            start += length
        return cls(mask, _few(runs))

    @classmethod
    def of_text(cls, rows: int, length: int, device: torch.device) -> Self:
        """Only text."""
        mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        return cls(mask, (Run(0, length, Kind.TEXT),))

    def part(self, start: int, stop: int) -> "TokenModality":
        """The tokens from `start` to `stop`."""
        return TokenModality(self.mask[:, start:stop], runs_between(self.runs, start, stop))

    def rows(self, indices: torch.Tensor) -> "TokenModality":
        """The rows `indices`, in this order; what was one kind in all rows stays so."""
        return TokenModality(self.mask[indices.to(self.mask.device)], self.runs)

    def extend(self, new: "TokenModality") -> "TokenModality":
        """These tokens followed by `new`."""
        length = self.mask.shape[1]
        runs = list(self.runs)
        for start, stop, kind in new.runs:
            if runs and runs[-1].kind == kind and kind != Kind.MIXED:
                runs[-1] = Run(runs[-1].start, stop + length, kind)
            else:
                runs.append(Run(start + length, stop + length, kind))
        return TokenModality(torch.cat([self.mask, new.mask.to(self.mask.device)], dim=1), _few(runs), new)


def runs_between(runs: Sequence[Run], start: int, stop: int) -> tuple[Run, ...]:
    """The runs of the tokens from `start` to `stop`, counted from there."""
    return tuple(
        Run(max(a, start) - start, min(b, stop) - start, k) for a, b, k in runs if a < stop and b > start
    )


def _few(runs: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(runs) if len(runs) <= MAX_RUNS else (Run(0, runs[-1].stop, Kind.MIXED),)
