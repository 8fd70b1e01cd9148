"""The original's cache made small, to compare with: quantised, or with tokens evicted.

Written from the formulas of KIVI (arXiv 2402.02750), SnapKV (arXiv 2404.14469) and ExpectedAttention (arXiv
2510.00636), for kvpress (0.5.5) takes no transformers from 5.3 on and no multimodal RoPE. hqq and quanto are
transformers' quantised caches.

Shapes: G KV heads, H query heads, T tokens in the cache, D head dim, n tokens kept, F future positions, A
tokens of an answer, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from measured import Answer, HeldOut, by_answer, scored
from torch import nn
from transformers import Cache, DynamicCache, QuantizedCache

from mha2mla_vlm.evaluation.answers import predicted
from mha2mla_vlm.model.cache.latent import cache_bytes
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.utils.compat import cache_argument

GROUP = 32  # numbers with one range, as in KIVI
RESIDUAL = 32  # last tokens that KIVI keeps in 16 bits
WINDOW, POOL = 16, 5  # of SnapKV: last queries whose attention counts, neighbours that share it
SINKS, FUTURE = 4, 32  # of ExpectedAttention: first tokens that stay, positions that queries will come from


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer knows of T tokens: `keys` and `values [G, T, D]`, `attention [H, T, T]`, `queries
    [T, H, D]` before RoPE, and `cos` and `sin [F, D]` of positions to come.
    """

    keys: torch.Tensor
    values: torch.Tensor
    attention: torch.Tensor
    queries: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


Made = tuple[Cache, int]  # a cache, and its bytes with numbers of 16 bits where they are not quantised
Make = Callable[[Sequence[Layer], Any], Made]  # of the layers and the config of the language model


def in_groups(x: torch.Tensor, dim: int, bits: int, group: int = GROUP) -> torch.Tensor:
    """`x` rounded to `bits` between the least and the largest number of each group along `dim`, the last of
    which may be short; these ranges have 16 bits.
    """
    return torch.cat([rounded(part, dim, bits) for part in x.split(group, dim)], dim)


def rounded(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The same for one group."""
    low = x.amin(dim, keepdim=True).half().to(x.dtype)
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().to(x.dtype)
    codes = ((x - low) / step.clamp_min(torch.finfo(x.dtype).tiny)).round().clamp(0, 2**bits - 1)
    return low + codes * step


def quantised_tokens(tokens: int, residual: int | None) -> int:
    """How many tokens have few bits: the whole groups before the last `residual` tokens, or all."""
    return tokens if residual is None else max(0, tokens - residual) // GROUP * GROUP


def kivi(x: torch.Tensor, dim: int, bits: int, residual: int | None) -> torch.Tensor:
    """Keys (`dim` 1: ranges per channel) or values (2: per token) `[G, T, D]`; the last tokens stay."""
    count = quantised_tokens(x.shape[1], residual)
    return torch.cat([in_groups(x[:, :count], dim, bits), x[:, count:]], dim=1) if count else x


def kivi_bytes(tokens: int, *, kv_heads: int, head_dim: int, bits: int, residual: int | None) -> int:
    """Bytes of a layer's keys and values: their bits, a range of two numbers of 16 bits for each group, and
    16 bits for each number of the last tokens.
    """
    count = quantised_tokens(tokens, residual)
    groups = head_dim * math.ceil(count / GROUP) + count * math.ceil(head_dim / GROUP)
    codes = 2 * (count * head_dim * bits // 8)
    return kv_heads * (codes + 4 * groups + 2 * 2 * head_dim * (tokens - count))


def filled(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], cache: Cache | None = None) -> Cache:
    """A cache that holds these keys and values `[G, T, D]` of each layer."""
    cache = DynamicCache() if cache is None else cache
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys[None], values[None], index)
    return cache


def kivi_cache(bits: int, residual: int | None) -> Make:
    """Quantised as KIVI does."""

    def make(layers: Sequence[Layer], config: Any) -> Made:
        """Of all layers."""
        pairs = [(kivi(x.keys, 1, bits, residual), kivi(x.values, 2, bits, residual)) for x in layers]
        kv_heads, tokens, head_dim = layers[0].keys.shape
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "bits": bits, "residual": residual}
        return filled(pairs), len(layers) * kivi_bytes(tokens, **sizes)

    return make


def library_cache(backend: str, bits: int) -> Make:
    """transformers' quantised cache, ranges per token; its bytes are those of one of float16 numbers."""
    axis = {"hqq": 1, "quanto": 0}[backend]
    how = {"nbits": bits, "q_group_size": GROUP, "axis_key": axis, "axis_value": axis}

    def make(layers: Sequence[Layer], config: Any) -> Made:
        """Of all layers."""
        caches = [QuantizedCache(backend, config, **how) for _ in range(2)]
        filled([(x.keys, x.values) for x in layers], caches[0])
        filled([(x.keys.half(), x.values.half()) for x in layers], caches[1])
        return caches[0], cache_bytes(caches[1])

    return make


def snapkv_scores(layer: Layer, keep: int) -> torch.Tensor:
    """`[G, T]`: the mean attention of the last queries, pooled over neighbours; these tokens themselves stay,
    as far as they are half of what is kept.
    """
    kv_heads, tokens, _ = layer.keys.shape
    received = layer.attention[:, -WINDOW:].mean(1).unflatten(0, (kv_heads, -1))
    pooled = nn.functional.avg_pool1d(received.flatten(0, 1), POOL, stride=1, padding=POOL // 2)
    scores = pooled.unflatten(0, (kv_heads, -1)).mean(1)
    stay = min(WINDOW, keep // 2)
    scores[:, tokens - stay :] = torch.inf
    return scores


def expected_scores(layer: Layer, keep: int) -> torch.Tensor:
    """`[G, T]`: the attention that normal queries of the mean and covariance seen so far will pay from the
    positions to come, times the length of the value; the first tokens stay.
    """
    kv_heads, _, D = layer.keys.shape
    queries = layer.queries[SINKS:] if len(layer.queries) > 2 * SINKS else layer.queries
    mean = queries.mean(0)
    apart = queries - mean
    covariance = torch.einsum("thi,thj->hij", apart, apart) / len(queries)
    half = torch.eye(D // 2)
    turn = torch.zeros(D, D)
    turn[D // 2 :, : D // 2], turn[: D // 2, D // 2 :] = half, -half
    rotation = (layer.cos[:, :, None] * torch.eye(D) + layer.sin[:, :, None] * turn).mean(0)
    mean, covariance = mean @ rotation.T, rotation @ covariance @ rotation.T
    keys = layer.keys.repeat_interleave(len(mean) // kv_heads, 0)
    logits = torch.einsum("hd,htd->ht", mean, keys) / D**0.5
    logits += torch.einsum("hti,hij,htj->ht", keys, covariance, keys) / (2 * D)
    scores = logits.softmax(-1).unflatten(0, (kv_heads, -1)).mean(1) * layer.values.norm(dim=-1)
    scores[:, : min(SINKS, keep // 2)] = torch.inf
    return scores


def kept_tokens(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Places `[G, n]` of the best tokens for each head, in order."""
    return scores.topk(keep, dim=-1).indices.sort(dim=-1).values


def evicted_cache(score: Callable[[Layer, int], torch.Tensor], share: float) -> Make:
    """A share of the tokens, those of the best scores for each KV head."""

    def make(layers: Sequence[Layer], config: Any) -> Made:
        """Of all layers."""
        pairs = []
        keep = max(1, int(share * layers[0].keys.shape[1]))
        for layer in layers:
            places = kept_tokens(score(layer, keep), keep)[..., None].expand(-1, -1, layer.keys.shape[-1])
            pairs.append((layer.keys.gather(1, places), layer.values.gather(1, places)))
        return filled(pairs), sum(4 * keys.numel() for keys, _ in pairs)

    return make


QUANTISED: dict[str, Make] = {
    "KIVI-like, 4 bits": kivi_cache(4, RESIDUAL),
    "KIVI-like, 2 bits": kivi_cache(2, RESIDUAL),
    "KIVI-like, 4 bits, all tokens": kivi_cache(4, None),
    "KIVI-like, 2 bits, all tokens": kivi_cache(2, None),
    **{f"{name}, {bits} bits": library_cache(name, bits) for name in ("hqq", "quanto") for bits in (4, 2)},
}
EVICTED = {"SnapKV": snapkv_scores, "ExpectedAttention": expected_scores}
LATER = ", question later"


class Prefilled:
    """A chat that the original (with eager attention) has read, and what is `known` before each of `cuts`."""

    def __init__(self, model: Any, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.positions = positions(model, batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        self.cache, self.queries = DynamicCache(), list[torch.Tensor]()
        with ExitStack() as stack, torch.no_grad():
            for layer in decoder_layers(model):
                hook = layer.self_attn.q_proj.register_forward_hook(
                    lambda *given: self.queries.append(given[2][0])
                )
                stack.callback(hook.remove)
            out = model(**inputs, **cache_argument(self.cache), use_cache=True, output_attentions=True)
        self.attentions = out.attentions
        self.cuts = list(self._cuts())
        self.known = {n: self._upto(n) for _, counts in self.cuts for n in set(counts.values())}

    def _keep_queries(self, _: Any, __: Any, output: torch.Tensor) -> None:
        self.queries.append(output[0])

    def _upto(self, count: int) -> list[Layer]:
        """What each layer knows of the first `count` tokens."""
        first = int(self.positions[..., :count].max()) + 1
        places = torch.arange(first, first + FUTURE).expand(*self.positions.shape[:-1], -1)
        rotary = self.model.model.language_model.rotary_emb
        cos, sin = (table.flatten(0, -3)[0] for table in rotary(self.queries[0], places))
        found = zip(self.cache.layers, self.attentions, self.queries, strict=True)
        return [
            Layer(
                keys=layer.keys[0, :, :count],
                values=layer.values[0, :, :count],
                attention=attention[0, :, :count, :count],
                queries=queries[:count].unflatten(-1, (-1, cos.shape[-1])),
                cos=cos,
                sin=sin,
            )
            for layer, attention, queries in found
        ]

    def _cuts(self) -> Iterator[tuple[torch.Tensor, dict[bool, int]]]:
        """Of each answer the places that predict its tokens, and how many tokens the cache holds before: all
        but the prompt's last, or with True those before the question, which comes behind images.
        """
        inside = predicted(self.batch)[0].nonzero()[:, 0]
        visual = torch.tensor(get_family(self.model.config.model_type).visual_token_ids(self.model.config))
        seen = torch.isin(self.batch["input_ids"][0], visual).nonzero()[:, 0].tolist()
        ends = [-1]
        for places in by_answer(inside, self.batch):
            first = int(places[0])
            images = [place for place in seen if place < first]
            yield places, {False: first, True: max([*images, *ends]) + 1}
            ends.append(int(places[-1]) + 1)

    @torch.no_grad()
    def log_probs(self, cache: Cache, count: int, places: torch.Tensor) -> torch.Tensor:
        """`[A, V]` at some places, of what comes after the `count` tokens that the cache stands for."""
        end = int(places[-1]) + 1
        chunk = {
            "input_ids": self.batch["input_ids"][:, count:end],
            "position_ids": self.positions[..., count:end],
        }
        logits = self.model(**chunk, **cache_argument(cache), use_cache=True).logits[0]
        return logits[places - count].float().log_softmax(-1)


def positions(model: Any, batch: Any) -> torch.Tensor:
    """Positions of all tokens, multimodal ones for Qwen2.5-VL."""
    if "image_grid_thw" not in batch:
        return torch.arange(batch["input_ids"].shape[1])[None]
    names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    return model.model.get_rope_index(**{name: batch[name] for name in names})[0]


class Over:
    """Answers over one kind of cache."""

    def __init__(self, make: Make, later: bool) -> None:
        self.make, self.later = make, later
        self.answers: list[list[Answer]] = []
        self.first_free: list[
            list[Answer]
        ] = []  # their first token comes from the prompt's pass, as in generation
        self.bytes, self.tokens = 0, 0

    def read(
        self, chat: Prefilled, expected: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> None:
        """All answers of a chat."""
        self.answers.append([])
        self.first_free.append([])
        config = chat.model.config.get_text_config()
        for (places, counts), wanted, ids in zip(chat.cuts, expected, targets, strict=True):
            count = counts[self.later]
            cache, size = self.make(chat.known[count], config)
            found = chat.log_probs(cache, count, places)
            self.answers[-1].append(scored(found, wanted, ids))
            self.first_free[-1].append(scored(torch.cat([wanted[:1], found[1:]]), wanted, ids))
            self.bytes, self.tokens = self.bytes + size, self.tokens + count


def read_over(model: Any, held_out: HeldOut, kinds: Sequence[Over]) -> None:
    """Let each of the `kinds` of cache answer; the prompts are read once for all of them."""
    for batch, parts in zip(held_out.batches, held_out.parts(), strict=True):
        chat = Prefilled(model, batch)
        for kind in kinds:
            kind.read(chat, *parts)
