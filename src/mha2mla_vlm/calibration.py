"""What calibration chats tell about each layer's attention: hooks in a context, nothing left behind.

Shapes: B batch (1 here, so nothing is padded), T tokens, H query heads, G KV heads, D head dim,
P = D / 2 pairs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.config import DECOUPLED
from mha2mla_vlm.data import IGNORE_INDEX
from mha2mla_vlm.folding import pair_covariance
from mha2mla_vlm.modeling import decoder_layers
from mha2mla_vlm.progress import track
from mha2mla_vlm.rope import one_table, pair_kl_scores, rotate, two_norm_scores
from mha2mla_vlm.weighting import attention_usage

ANSWER_WEIGHT = 8.0  # of a query whose output is an answer's token, against other text
VISION_WEIGHT = 0.1
MAX_QUERIES = 64  # of a chat, whose attention pairs are measured on

# observer(layer index, attention module, hidden states [B, T, hidden], (cos, sin))
Observer = Callable[[int, nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]


@dataclass
class TokenStats:
    """Sums over the tokens x of one modality that go into a layer's attention, each of weight w.

    `moment [hidden, hidden]` is the sum of w x x^T, `total [hidden]` of w x, `mass` of w, all in
    float64; `metric [2, G, D, D]`, if there is one, that of `weighting.attention_usage`.
    """

    count: int
    mass: float
    moment: torch.Tensor
    total: torch.Tensor
    metric: torch.Tensor | None = None

    @classmethod
    def of(
        cls, inputs: torch.Tensor, weights: torch.Tensor | None = None, metric: torch.Tensor | None = None
    ) -> Self:
        """Of inputs `[tokens, hidden]` with `weights [tokens]`, by default 1; accumulated in float32."""
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights[:, None]
        mass = float(len(inputs) if weights is None else weights.sum())
        return cls(
            len(inputs), mass, (weighted.T @ inputs).double(), weighted.sum(0, dtype=torch.float64), metric
        )

    def __add__(self, other: "TokenStats") -> "TokenStats":
        """Of the tokens of both."""
        metric = None if self.metric is None or other.metric is None else self.metric + other.metric
        return TokenStats(
            self.count + other.count,
            self.mass + other.mass,
            self.moment + other.moment,
            self.total + other.total,
            metric,
        )

    def centered(self) -> "TokenStats":
        """With the moment about the mean."""
        mean = self.total / max(self.mass, torch.finfo(torch.float32).tiny)
        return replace(self, moment=self.moment - self.mass * mean[:, None] * mean)


@dataclass
class LayerStats:
    """What goes into one layer's attention, by modality."""

    tokens: dict[str, TokenStats] = field(default_factory=dict)

    def add(self, modality: str, new: TokenStats) -> None:
        """Add tokens of a modality."""
        self.tokens[modality] = self.tokens[modality] + new if modality in self.tokens else new

    def pooled(self) -> TokenStats:
        """Of all modalities."""
        first, *others = self.tokens.values()
        return sum(others, start=first)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """One chat in an original layer: queries `[H, T, D]`, keys and values `[G, T, D]`, in float32.

    `cos, sin [T, P]` are the rotary table's first half; the other half is the same.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, module: Any, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> Self:
        """From the input `[1, T, hidden]` of an attention module of transformers."""
        q, k, v = (
            projection(hidden)[0].float().unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        half = module.head_dim // 2
        cos, sin = (one_table(table, module.config)[0, :, :half].float() for table in tables)
        return cls(queries=q, keys=k, values=v, cos=cos, sin=sin)

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as attention compares them."""
        return rotate(self.queries, self.cos, self.sin), rotate(self.keys, self.cos, self.sin)


@contextlib.contextmanager
def observed_attention(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within the context, `observer` sees what goes into every layer's attention."""
    handles = []
    for index, layer in enumerate(decoder_layers(model)):

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index
        ) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            observer(index, module, hidden, kwargs["position_embeddings"])

        handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(
    model: PreTrainedModel, batches: Sequence[BatchFeature], observer: Observer, title: str
) -> Iterator[BatchFeature]:
    for batch in track(batches, title):
        yield batch
        with observed_attention(model, observer):
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False, logits_to_keep=1)


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


def collect_moments(
    model: PreTrainedModel, batches: Sequence[BatchFeature], visual_token_ids: Sequence[int]
) -> list[LayerStats]:
    """Moments of every layer's attention input over single chats, apart for text and vision."""
    stats = [LayerStats() for _ in decoder_layers(model)]
    masks: dict[str, torch.Tensor] = {}

    def observe(index: int, module: nn.Module, hidden: torch.Tensor, _: Any) -> None:
        for modality, mask in masks.items():
            stats[index].add(modality, TokenStats.of(hidden[0][mask.to(hidden.device)]))

    for batch in _run(model, batches, observe, "collecting moments"):
        visual = visual_mask(batch, visual_token_ids)
        masks.update(text=~visual, vision=visual)
    return stats


def collect_usage(
    model: PreTrainedModel, batches: Sequence[BatchFeature], visual_token_ids: Sequence[int]
) -> list[LayerStats]:
    """As `collect_moments` of an original model, tokens weighted by the squared attention that they
    receive, and with metrics of the errors of keys and values (`weighting.attention_usage`).
    """
    stats = [LayerStats() for _ in decoder_layers(model)]
    modality = weights = torch.empty(0)

    def observe(
        index: int, module: Any, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Add one chat's tokens of a layer."""
        for name, tokens in layer_usage(module, hidden, tables, modality, weights).items():
            stats[index].add(name, tokens)

    for batch in _run(model, batches, observe, "weighting errors"):
        modality = visual_mask(batch, visual_token_ids).long()
        weights = query_weights(batch, modality)
    return stats


def layer_usage(
    module: Any,
    hidden: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    modality: torch.Tensor,
    weights: torch.Tensor,
) -> dict[str, TokenStats]:
    """What one chat tells of one original layer; `modality [T]` numbers `DECOUPLED`, `weights [T]` are
    `query_weights`.
    """
    heads, modality = Heads.of(module, hidden, tables), modality.to(hidden.device)
    received, metric = attention_usage(
        *heads.rotated(),
        heads.values,
        heads.queries,
        module.o_proj.weight.unflatten(1, (-1, module.head_dim)),
        modality,
        weights.to(hidden.device),
        modalities=len(DECOUPLED),
        scaling=module.scaling,
    )
    masks = [modality == number for number in range(len(DECOUPLED))]
    return {
        name: TokenStats.of(hidden[0][mask], received[mask], metric[number])
        for number, (name, mask) in enumerate(zip(DECOUPLED, masks, strict=True))
    }


def collect_pair_covariance(
    model: PreTrainedModel, batches: Sequence[BatchFeature], visual_token_ids: Sequence[int]
) -> list[torch.Tensor]:
    """`folding.pair_covariance` of every layer, `[G, 3 P, 3 P]`, averaged over single chats.

    Looked at are the `MAX_QUERIES` queries that count most, the last of equals.
    """
    covariances: list[Any] = [0.0] * len(decoder_layers(model))
    rows = weights = torch.empty(0)

    def observe(
        index: int, module: Any, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Add one chat's covariance of a layer."""
        heads = Heads.of(module, hidden, tables)
        looked = (rows.to(hidden.device), weights.to(hidden.device))
        covariance = pair_covariance(heads.queries, heads.keys, heads.cos, heads.sin, *looked, module.scaling)
        covariances[index] = covariances[index] + covariance / len(batches)

    for batch in _run(model, batches, observe, "measuring what rotation does"):
        every = query_weights(batch, visual_mask(batch, visual_token_ids))
        rows = every.flip(0).argsort(descending=True, stable=True)[:MAX_QUERIES]
        rows = (len(every) - 1 - rows).sort().values
        weights = every[rows] / every[rows].sum()
    return covariances


def collect_pair_scores(
    model: PreTrainedModel, batches: Sequence[BatchFeature], method: str
) -> list[torch.Tensor]:
    """Scores `[G, P]` of each layer's pairs by `2-norm`, `mkl` or `rotation-kl`, averaged over chats."""
    scores: list[Any] = [0.0] * len(decoder_layers(model))

    def observe(
        index: int, module: Any, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Add one chat's scores of a layer."""
        heads = Heads.of(module, hidden, tables)
        if method == "2-norm":
            score = two_norm_scores(heads.queries, heads.keys)
        else:
            plain = (heads.queries, heads.keys) if method == "rotation-kl" else None
            score = pair_kl_scores(*heads.rotated(), module.scaling, unrotated=plain)
        scores[index] = scores[index] + score / len(batches)

    for _ in _run(model, batches, observe, f"scoring pairs ({method})"):
        pass
    return scores
