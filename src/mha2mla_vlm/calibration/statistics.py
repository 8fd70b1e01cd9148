"""What a calibration chat shows about one layer's attention.

Shapes: T tokens, H query heads, G KV heads, D head dim,
P = D / 2 pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import BatchFeature

from mha2mla_vlm.algorithms.error_metric import attention_usage, key_metric
from mha2mla_vlm.algorithms.looked_at import Chosen
from mha2mla_vlm.algorithms.pair_selection.base import split_dims
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.config import DECOUPLED, AttentionSizes
from mha2mla_vlm.data.records import IGNORE_INDEX
from mha2mla_vlm.model.normed import keys_and_values, normed_queries
from mha2mla_vlm.model.rope import rotate
from mha2mla_vlm.utils.compat import one_table

ANSWER_WEIGHT = 8.0  # of a query whose output is an answer's token, against other text
VISION_WEIGHT = 0.1
MAX_QUERIES = 128  # of a chat, on whose attention pairs and keys are measured, for each KV head
OF_A_HEAD = 64  # of these, at most, for one query head


@dataclass
class LayerStats:
    """What latents of one layer are made of (`normed.latent_inputs`), by modality."""

    tokens: dict[str, TokenStats] = field(default_factory=dict)

    def pooled(self) -> TokenStats:
        """Of all modalities."""
        first, *others = self.tokens.values()
        return sum(others, start=first)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """One chat in an original layer: queries `[H, T, D]`, keys and values `[G, T, D]`, in float32, normed
    where the module norms them, and what multiplies outputs, `[H, T, D]`, where it is gated.

    `cos, sin [T, P]` are the rotary table's first half; the other half is the same. Dims that RoPE does not
    turn are pairs that turn by nothing, behind the `turned` ones that do: queries and keys have their dims in
    the `order [D]` in which each pair is `(i, i + P)`. `unseen [T, T]` are the tokens that a query does not
    see, None for those after it.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    gate: torch.Tensor | None
    order: torch.Tensor
    turned: int
    unseen: torch.Tensor | None

    @classmethod
    def of(
        cls,
        module: Any,
        hidden: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
    ) -> Self:
        """From the input `[1, T, hidden]` of an attention module of transformers, and its mask."""
        queries, gate = normed_queries(module, hidden)
        all_heads = (queries, *keys_and_values(module, hidden))
        q, k, v = (x[0].float().transpose(0, 1) for x in all_heads)
        cos, sin = (one_table(table, module.config)[0].float().chunk(2, dim=-1)[0] for table in tables)
        turned, half = cos.shape[-1], module.head_dim // 2
        order = torch.arange(module.head_dim, device=q.device)
        if turned < half:
            never = (0, half - turned)
            cos, sin = torch.nn.functional.pad(cos, never, value=1.0), torch.nn.functional.pad(sin, never)
            pairs, stride = order[None, :turned], AttentionSizes.of_text(module.config).pair_stride
            rope, others = (dims[0].chunk(2) for dims in split_dims(pairs, module.head_dim, stride))
            order = torch.cat([rope[0], others[0], rope[1], others[1]])
            q, k = q[..., order], k[..., order]
        gate = None if gate is None else gate[0].float().transpose(0, 1)
        given = {"queries": q, "keys": k, "values": v, "cos": cos, "sin": sin, "gate": gate, "order": order}
        return cls(**given, turned=turned, unseen=unseen_tokens(mask))

    def of_turned(self, scores: torch.Tensor) -> torch.Tensor:
        """Of scores `[G, P]`, those of pairs that RoPE turns."""
        return scores[:, : self.turned]

    def among_turned(self, covariance: torch.Tensor) -> torch.Tensor:
        """The same of `[G, 3 P, 3 P]`, where each of three features is one of pairs."""
        places = torch.arange(covariance.shape[-1], device=covariance.device).view(3, -1)[:, : self.turned]
        return covariance[:, places.reshape(-1, 1), places.flatten()]

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as attention compares them."""
        return rotate(self.queries, self.cos, self.sin), rotate(self.keys, self.cos, self.sin)


def unseen_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens each query of one chat does not see, `[T, T]`, by a mask that transformers gives; None
    where that is none or only of padding, so that it is those after it.
    """
    if mask is None or mask.ndim != 4:
        return None
    own = mask[0, 0]
    return ~own if own.dtype == torch.bool else own < 0


def visual_mask(batch: BatchFeature, visual_token_ids: Sequence[int]) -> torch.Tensor:
    """Which tokens of a batch of one chat are visual, `[T]`."""
    ids = batch["input_ids"][0]
    return torch.isin(ids, torch.tensor(list(visual_token_ids), device=ids.device))


def query_weights(batch: BatchFeature, visual: torch.Tensor) -> torch.Tensor:
    """How much the attention of each token as a query counts, `[T]`: most where answers are given."""
    weights = torch.where(visual.bool(), VISION_WEIGHT, 1.0)
    if "labels" in batch:
        answers = batch["labels"][0, 1:] != IGNORE_INDEX
        weights[:-1][answers] = ANSWER_WEIGHT
    return weights


def layer_usage(
    module: Any,
    heads: Heads,
    inputs: torch.Tensor,
    modality: torch.Tensor,
    weights: torch.Tensor,
    *,
    turned: Chosen | None = None,
) -> dict[str, TokenStats]:
    """Tokens of one chat in an original layer, weighted by the squared attention that they receive, and
    metrics of the errors of their keys and values (`error_metric.attention_usage`).

    `inputs [1, T, C]` are what latents are made of (`normed.latent_inputs`), `modality [T]` numbers
    `DECOUPLED`, `weights [T]` are `query_weights`. Where keys are rotated at read, `turned` are the queries
    to look at for a third metric, of keys before RoPE (`error_metric.key_metric`).
    """
    output = module.o_proj.weight.unflatten(1, (-1, module.head_dim))
    options = {"modalities": len(DECOUPLED), "scaling": module.scaling}
    options |= {"gate": heads.gate, "unseen": heads.unseen}
    given = (*heads.rotated(), heads.values, heads.queries)
    received, metric = attention_usage(*given, output, modality, weights, **options)
    if turned is not None:
        in_frame = key_metric(*given, (heads.cos, heads.sin), output, modality, turned, **options)
        metric = torch.cat([metric, in_frame[:, None]], dim=1)
    if heads.turned < module.head_dim // 2:  # back to the order of the module
        back = heads.order.argsort()
        in_place = [part[..., back[:, None], back] for part in (metric[:, 0], *metric[:, 2:].unbind(1))]
        metric = torch.stack([in_place[0], metric[:, 1], *in_place[1:]], dim=1)
    masks = [modality == number for number in range(len(DECOUPLED))]
    return {
        name: TokenStats.of(inputs[0][mask], received[mask], metric[number])
        for number, (name, mask) in enumerate(zip(DECOUPLED, masks, strict=True))
    }
