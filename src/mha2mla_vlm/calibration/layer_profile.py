"""What calibration chats tell about one layer: enough to convert it to any size.

Shapes: G KV heads, D head dim, P = D / 2 pairs, R rope dims kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from mha2mla_vlm.algorithms.folding import drop_order, fold_coefficients, pair_covariance
from mha2mla_vlm.algorithms.pair_selection import (
    RopeSelection,
    fixed_pairs,
    pair_kl_scores,
    top_pairs,
    two_norm_scores,
)
from mha2mla_vlm.calibration.activations import Chat, States, Tables, advance
from mha2mla_vlm.calibration.statistics import Heads, LayerStats, TokenStats, layer_usage
from mha2mla_vlm.config import OUTPUT_WEIGHTED, AttentionSizes, ConversionConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.utils.distributed import sum_over_processes

SCORED = ("2-norm", "mkl", "rotation-kl")


@dataclass
class LayerProfile:
    """Of one original layer: scores of pairs `[G, P]` and `folding.pair_covariance` `[G, 3 P, 3 P]`,
    both averaged over chats, where the method needs them, and statistics of what goes in.
    """

    scores: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    stats: LayerStats = field(default_factory=LayerStats)

    def selection(self, rope_dim: int, sizes: AttentionSizes, config: ConversionConfig) -> RopeSelection:
        """The pairs that stay rotated, and what the others fold to."""
        kind: Any = config.rope_selection
        if kind == "residual":
            pairs = self.order(config.fold)[:, sizes.head_dim // 2 - rope_dim // 2 :].sort(dim=-1).values
        elif self.scores is not None:
            pairs = top_pairs(self.scores, rope_dim)
        else:
            pairs = fixed_pairs(kind, rope_dim=rope_dim, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim)
        if not config.fold:
            return RopeSelection(pairs=pairs)
        assert self.covariance is not None, "measured for folding"
        return RopeSelection(pairs=pairs, fold=fold_coefficients(self.covariance, pairs))

    def order(self, fold: bool) -> torch.Tensor:
        """`folding.drop_order`, found once."""
        if self._order is None:
            assert self.covariance is not None, "measured for `residual`"
            self._order = drop_order(self.covariance, fold=fold)
        return self._order

    _order: torch.Tensor | None = field(default=None, repr=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, by name."""
        found = {"scores": self.scores, "covariance": self.covariance}
        for name, part in self.stats.tokens.items():
            found |= {f"{name}.{key}": value for key, value in part.tensors().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """From `tensors`."""
        parts = sorted({name.partition(".")[0] for name in tensors if "." in name})
        tokens = {
            part: TokenStats.from_tensors(
                {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{part}.")}
            )
            for part in parts
        }
        return cls(tensors.get("scores"), tensors.get("covariance"), LayerStats(tokens))

    def check(self, layer: int) -> Self:
        """Raise `InputError` if something measured is not finite."""
        tokens = [x for part in self.stats.tokens.values() for x in (part.moment, part.metric)]
        for found in (self.scores, self.covariance, *tokens):
            if found is not None and not bool(found.isfinite().all()):
                raise InputError(
                    f"layer {layer}: calibration gives numbers that are not finite; check its weights, or "
                    "give --dtype float32"
                )
        return self


def measure_layer(
    layer: nn.Module,
    index: int,
    chats: Sequence[Chat],
    states: States,
    stream: str,
    config: ConversionConfig,
    *,
    total: int,
    moments: bool,
) -> LayerProfile:
    """Take a stream of an original model through a layer, and look on; with `moments` also where the
    method takes them from the model after partial RoPE. `total` is the number of chats in all processes.
    """
    found, share, method = LayerProfile(), 1 / total, config.rope_selection

    def observe(chat: Chat, module: Any, hidden: torch.Tensor, tables: Tables) -> None:
        """Add one chat."""
        heads = Heads.of(module, hidden, tables)
        if method in SCORED:
            score = share * _scores(heads, method, module.scaling)
            found.scores = score if found.scores is None else found.scores + score
        if config.fold or method == "residual":
            parts = (heads.queries, heads.keys, heads.cos, heads.sin)
            covariance = share * pair_covariance(*parts, *chat.queries(), module.scaling)
            found.covariance = covariance if found.covariance is None else found.covariance + covariance
        if config.factorization in OUTPUT_WEIGHTED:
            for name, tokens in layer_usage(module, heads, hidden, chat.visual.long(), chat.weights).items():
                found.stats.add(name, tokens)
        elif moments:
            add_moments(found.stats, chat, hidden)

    advance(layer, index, chats, states, stream, observe)
    sum_over_processes(x for x in (found.scores, found.covariance) if x is not None)
    found.stats.sum_over_processes()
    return found


def _scores(heads: Heads, method: str, scaling: float) -> torch.Tensor:
    if method == "2-norm":
        return two_norm_scores(heads.queries, heads.keys)
    plain = (heads.queries, heads.keys) if method == "rotation-kl" else None
    return pair_kl_scores(*heads.rotated(), scaling, unrotated=plain)


def measure_moments(
    layer: nn.Module, index: int, chats: Sequence[Chat], states: States, stream: str
) -> LayerStats:
    """Take a stream through a layer; moments of what goes into its attention, by modality."""
    stats = LayerStats()

    def observe(chat: Chat, _: Any, hidden: torch.Tensor, __: Tables) -> None:
        """Add one chat."""
        add_moments(stats, chat, hidden)

    advance(layer, index, chats, states, stream, observe)
    stats.sum_over_processes()
    return stats


def add_moments(stats: LayerStats, chat: Chat, hidden: torch.Tensor) -> None:
    """Add a chat's tokens, apart for text and vision."""
    for modality, mask in (("text", ~chat.visual), ("vision", chat.visual)):
        stats.add(modality, TokenStats.of(hidden[0][mask]))
