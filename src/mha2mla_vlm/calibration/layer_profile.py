"""What calibration chats show about one layer: enough to convert it to any size.

Shapes: G KV heads, D head dim, P = D / 2 pairs, R rope dims kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from mha2mla_vlm.algorithms.factorization.base import Factorization
from mha2mla_vlm.algorithms.folding import fold_coefficients, pair_covariance
from mha2mla_vlm.algorithms.pair_selection.base import Attended, PairSelection, RopeSelection
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.calibration.activations import Chat, States, Tables, advance
from mha2mla_vlm.calibration.statistics import Heads, LayerStats, layer_usage
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.normed import latent_inputs
from mha2mla_vlm.utils.distributed import SharedSums


@dataclass(frozen=True, kw_only=True)
class Methods:
    """What a conversion does to a layer: which pairs stay rotated, whether the others are folded, how keys
    and values are factorised, and whether keys are then rotated when they are read.
    """

    pairs: PairSelection
    fold: bool
    factorization: Factorization
    at_read: bool = False


@dataclass
class LayerProfile:
    """Of one original layer: scores of pairs `[G, P]` and `folding.pair_covariance` `[G, 3 P, 3 P]`
    averaged over chats, where the methods need them, and statistics of what goes in.
    """

    scores: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    stats: LayerStats = field(default_factory=LayerStats)

    def selection(self, rope_dim: int, sizes: AttentionSizes, methods: Methods) -> RopeSelection:
        """The pairs that stay rotated, and what the others fold to."""
        given = {"rope_dim": rope_dim, "kv_heads": sizes.kv_heads, "rotary_dim": sizes.rotary_dim}
        pairs = methods.pairs.pairs(self.scores, **given)
        if not methods.fold:
            return RopeSelection(pairs=pairs)
        assert self.covariance is not None, "measured for folding"
        return RopeSelection(pairs=pairs, fold=fold_coefficients(self.covariance, pairs))

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

    def check(self, layer: int) -> None:
        """Raise `InputError` if something measured is not finite."""
        tokens = [x for part in self.stats.tokens.values() for x in (part.moment, part.metric)]
        for found in (self.scores, self.covariance, *tokens):
            if found is not None and not bool(found.isfinite().all()):
                raise InputError(
                    f"layer {layer}: calibration gives numbers that are not finite; check its weights, or "
                    "give --dtype float32"
                )


def measure_layer(
    layer: nn.Module,
    index: int,
    chats: Sequence[Chat],
    states: States,
    stream: str,
    methods: Methods,
    *,
    total: int,
    moments: bool,
) -> LayerProfile:
    """Take a stream of an original model through a layer, and look on; with `moments` also where the
    method takes them from the model after partial RoPE. `total` is the number of chats in all processes.
    Raises `InputError` naming the layer for numbers that are not finite.
    """
    sums, share, pairs = SharedSums(total), 1 / total, methods.pairs

    def observe(
        chat: Chat, module: Any, hidden: torch.Tensor, tables: Tables, mask: torch.Tensor | None
    ) -> None:
        """Add one chat."""
        one = LayerProfile()
        heads = Heads.of(module, hidden, tables, mask)
        sharing = len(heads.queries) // len(heads.keys)
        if pairs.chat_scores is not None:
            attended = Attended(heads.queries, heads.keys, *heads.rotated(), module.scaling, heads.unseen)
            one.scores = share * heads.of_turned(pairs.chat_scores(attended))
        if methods.fold or pairs.covariance_scores is not None:
            parts = (heads.queries, heads.keys, heads.cos, heads.sin, chat.queries(sharing), module.scaling)
            covariance = pair_covariance(*parts, heads.unseen)
            one.covariance = share * heads.among_turned(covariance)
        if methods.factorization.statistics == "usage":
            given = (module, heads, latent_inputs(module, hidden), chat.visual.long(), chat.weights)
            looked_at = chat.some_queries(sharing) if methods.at_read else None
            one.stats = LayerStats(layer_usage(*given, turned=looked_at))
        elif moments:
            one.stats = chat_moments(chat, latent_inputs(module, hidden))
        sums.add(chat.number, one.tensors())

    advance(layer, index, chats, states, stream, observe)
    found = LayerProfile.from_tensors(sums.over_processes())
    found.check(index)
    if pairs.covariance_scores is not None and found.covariance is not None:
        found.scores = pairs.covariance_scores(found.covariance, methods.fold)
    return found


def measure_moments(
    layer: nn.Module, index: int, chats: Sequence[Chat], states: States, stream: str, *, total: int
) -> LayerStats:
    """Take a stream through a layer; moments of what latents of it are made of, by modality. `total` is the
    number of chats in all processes.
    """
    sums = SharedSums(total)

    def observe(chat: Chat, module: Any, hidden: torch.Tensor, *_: Any) -> None:
        """Add one chat."""
        one = LayerProfile(stats=chat_moments(chat, latent_inputs(module, hidden)))
        sums.add(chat.number, one.tensors())

    advance(layer, index, chats, states, stream, observe)
    return LayerProfile.from_tensors(sums.over_processes()).stats


def chat_moments(chat: Chat, inputs: torch.Tensor) -> LayerStats:
    """Moments of a chat's tokens `[1, T, C]`, apart for text and vision."""
    masks = {"text": ~chat.visual, "vision": chat.visual}
    return LayerStats({modality: TokenStats.of(inputs[0][mask]) for modality, mask in masks.items()})
