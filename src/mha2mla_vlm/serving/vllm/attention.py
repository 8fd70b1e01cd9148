"""The attention layer that takes the place of vLLM's own.

Shapes: T new tokens of all requests together, H query heads and G KV heads of this process (all of them but
for tensor parallelism), D head dim, P = D / 2 pairs, R rope dims, r latent dims, A numbers in a position.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mha2mla_vlm.algorithms.rounding import rounded, rounded_keys
from mha2mla_vlm.config import DECOUPLED, LayerSpec
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.absorbed import Up
from mha2mla_vlm.model.cache.pages import PackedRows, position_width
from mha2mla_vlm.model.normed import head_order, is_normed
from mha2mla_vlm.model.projections import ByModality
from mha2mla_vlm.model.rope import rotate
from mha2mla_vlm.serving.vllm.backend import LatentBackend, LatentImpl, LatentMetadata
from mha2mla_vlm.serving.vllm.compat import (
    AttentionLayerBase,
    AutoWeightsLoader,
    ColumnParallelLinear,
    CommonAttentionMetadata,
    FullAttentionSpec,
    KVCacheSpec,
    VllmConfig,
    attend,
    parallel_place,
)


class StepTokens(nn.Module):
    """What all layers share: which tokens of a step are visual and where they are, in buffers that stay where
    they are, and how the step is described to attention.
    """

    def __init__(self, visual_token_ids: tuple[int, ...], position_axes: int, most_tokens: int) -> None:
        super().__init__()
        self.visual_token_ids = visual_token_ids
        self.step: tuple[CommonAttentionMetadata, LatentMetadata] | None = None  # the last, and from what
        self.register_buffer("visual", torch.zeros(most_tokens, dtype=torch.bool), persistent=False)
        positions = torch.zeros(position_axes, most_tokens, dtype=torch.int32)
        self.register_buffer("positions", positions, persistent=False)

    def note(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Take over the tokens `input_ids [T]` of a step, at `positions [T]` or, multimodal, `[3, T]`."""
        found = torch.stack([input_ids == token for token in self.visual_token_ids]).any(0)
        self.visual[: len(input_ids)] = found
        self.positions[:, : len(input_ids)] = positions


class LatentAttention(nn.Module, AttentionLayerBase):
    """Takes the place of a decoder layer's `self_attn`, `stock`, whose `o_proj` and rotary tables it keeps.

    `down_proj` gives the latents of all modalities and the keys to rotate at once. With tensor parallelism
    each process has the query heads and the rotated keys of its KV heads, and the whole latent. Where keys
    are rotated at read none are cached; the rows of one layer hold positions, of `position_axes` numbers.
    Where queries and keys are normed, latents are made of the normed keys and the values of all heads
    (`model.normed`), which each process computes whole.
    """

    def __init__(
        self, stock: Any, spec: LayerSpec, tokens: StepTokens, config: VllmConfig, position_axes: int
    ) -> None:
        super().__init__()
        _check(spec, stock, config)
        self.layer_name, rope_dim = stock.attn.layer_name, spec.rope_dim
        self.rope_dim, self.rank, self.modalities = rope_dim, int(spec.rank or 0), spec.modalities
        self.decoupled, self.at_read = spec.modalities == DECOUPLED, spec.at_read
        self.position_axes = position_axes
        self.num_heads, self.kv_heads, self.head_dim = stock.num_heads, stock.num_kv_heads, stock.head_dim
        self.all_kv_heads = stock.total_num_kv_heads
        self.tokens, self.o_proj, self.rotary_emb = tokens, stock.o_proj, stock.rotary_emb
        self.cached_rope_dim = 0 if spec.at_read else rope_dim
        hidden, outputs = stock.hidden_size, self.kv_heads * (2 * self.head_dim - self.cached_rope_dim)
        bias = stock.qkv_proj.bias is not None
        self.normed = is_normed(stock)
        self.query_proj = ColumnParallelLinear(
            hidden,
            stock.total_num_heads * self.head_dim,
            bias=bias,
            quant_config=config.quant_config,
            prefix=f"{self.layer_name.rpartition('.')[0]}.query_proj",
            return_bias=False,
        )
        if self.normed:
            width = self.all_kv_heads * self.head_dim
            self.key_proj, self.value_proj = (nn.Linear(hidden, width, bias=bias) for _ in range(2))
            self.q_norm, self.k_norm = stock.q_norm, stock.k_norm
            hidden, bias = 2 * width, False
        self.widths = [self.rank] * len(self.modalities) + [self.kv_heads * self.cached_rope_dim]
        self.packed = None
        if spec.bits is not None:
            self.packed = PackedRows(bits=spec.bits, rope=self.widths[-1])
        down_bias = spec.bits is not None or (bias and not spec.at_read)
        self.down_proj = nn.Linear(hidden, sum(self.widths), bias=down_bias)
        self.kv_b_proj = ByModality(
            {name: nn.Linear(self.rank, outputs, bias=bias or spec.bias) for name in self.modalities}
        )
        pairs = torch.zeros(self.kv_heads, rope_dim // 2, dtype=torch.long)
        self.register_buffer("rope_pairs", pairs, persistent=False)
        self.register_buffer("pair_axes", _pair_axes(stock.rotary_emb, self.head_dim // 2), persistent=False)
        self.impl = LatentImpl(self.num_heads, self.head_dim, stock.scaling)
        self.kv_cache = torch.tensor([])
        context = config.compilation_config.static_forward_context
        context[self.layer_name] = self  # in the place of the stock layer, which would have a cache

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend from `hidden_states [T, hidden]` at `positions [T]` or, multimodal, `[3, T]`."""
        new = len(hidden_states)
        visual = self.tokens.visual[:new]
        *latents, k_rope = self.down_proj(self._written(hidden_states)).split(self.widths, dim=-1)
        row = torch.where(visual[:, None], latents[1], latents[0]) if self.decoupled else latents[0]
        tables = self.tables(positions if positions.ndim == 2 else positions[None])
        cos, sin = (table[:, self.rope_pairs] for table in tables)  # [T, G, R/2]
        if not self.at_read:
            k_rope = rotate(k_rope.unflatten(-1, (self.kv_heads, -1)), cos, sin).flatten(1)
        if self.packed is None:
            row = torch.cat([row, k_rope], dim=-1)
        else:
            row = self.packed.pack(rounded(row, self.packed.bits), rounded_keys(k_rope), visual)
        query = self._queries(hidden_states)
        rope, nope = query.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        query = torch.cat([rotate(rope, cos[:, :, None], sin[:, :, None]), nope], dim=-1).flatten(1, 2)
        output = torch.empty_like(query)
        attend(query, row, visual, output, self.layer_name)
        return self.o_proj(output.flatten(1))[0]

    def _written(self, hidden: torch.Tensor) -> torch.Tensor:
        """What latents are made of: `hidden [T, hidden]` or, with norms, `[T, 2 G D]` of all KV heads."""
        if not self.normed:
            return hidden
        keys, values = (
            project(hidden).unflatten(-1, (-1, self.head_dim)) for project in (self.key_proj, self.value_proj)
        )
        return torch.cat([self.k_norm(keys), values], dim=-1).flatten(1)

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """Queries `[T, G, H / G, D]`, rotated dims first."""
        query: torch.Tensor = self.query_proj(hidden).view(len(hidden), self.kv_heads, -1, self.head_dim)
        if not self.normed:  # the rows of `query_proj` are in this order
            return query
        order = head_order(self.rope_pairs, self.head_dim, self.head_dim // 2)[:, None]
        return self.q_norm(query).gather(-1, order.expand_as(query))

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[.., P]` of all pairs at `positions [A, ..]`."""
        both = self.rotary_emb.cos_sin_cache[positions].to(self.down_proj.weight.dtype).unflatten(-1, (2, -1))
        chosen = both[0]
        for axis in range(1, len(positions)):
            chosen = torch.where(self.pair_axes == axis, both[axis], chosen)
        cos, sin = chosen.unbind(-2)
        return cos, sin

    def ups(self) -> tuple[Up, ...]:
        """The up projection of each modality."""
        rebuilt = self.rope_dim if self.at_read else 0
        return self.kv_b_proj.ups(self.kv_heads, self.head_dim - self.rope_dim, rebuilt)

    def row_width(self, dtype: torch.dtype) -> int:
        """Numbers of this dtype that a token takes in a page: r + G * R, or what holds its bytes."""
        return sum(self.widths[-2:]) if self.packed is None else self.packed.width(dtype)

    def get_attn_backend(self) -> type[LatentBackend]:
        """For vLLM."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """For vLLM: one head of a row and, in one layer at read, its position, without a value part."""
        dtype = vllm_config.model_config.dtype
        width = self.row_width(dtype) + position_width(self.position_axes, dtype)
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=width,
            head_size_v=0,
            dtype=dtype,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a converted checkpoint's weights of this layer; returns the names of what they filled."""
        taken = {"down_proj.weight"} | ({"down_proj.bias"} if self.down_proj.bias is not None else set())
        if self.down_proj.bias is not None:  # latents of numbers have none
            self.down_proj.bias.data.zero_()
        return taken | AutoWeightsLoader(self).load_weights(self._others(weights))

    def _others(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Fill what has another shape here; the rest is loaded as it is."""
        places = [f"kv_a_proj.{name}" for name in self.modalities] + ["k_rope_proj"]
        for name, value in weights:
            module, _, kind = name.rpartition(".")
            if module == "k_rope_proj" or name == "rope_pairs" or module.startswith("kv_b_proj."):
                value = self._own(value)
            if name == "rope_pairs":
                self.rope_pairs.copy_(value)
            elif module in places:
                at = places.index(module)
                target = getattr(self.down_proj, kind).data
                target.split(self.widths)[at].copy_(value)
            else:
                yield name, value

    def _own(self, value: torch.Tensor) -> torch.Tensor:
        """The rows of this process's KV heads, of rows that come KV head by KV head."""
        rank, processes = parallel_place()
        first = rank * self.all_kv_heads // processes
        heads = value.unflatten(0, (self.all_kv_heads, -1))[first : first + self.kv_heads]
        return heads.flatten(0, 1)


def _pair_axes(rotary: Any, pairs: int) -> torch.Tensor:
    """Which number of a position turns each of the pairs `[P]`, by vLLM's rotary embedding of a model."""
    sections, axes = getattr(rotary, "mrope_section", None), torch.zeros(pairs, dtype=torch.long)
    start = 0
    for axis, count in enumerate(sections or ()):
        if getattr(rotary, "mrope_interleaved", False):
            axes[axis : 3 * count : 3] = axis  # in turn, as far as each goes; time has the rest
        else:
            axes[start : start + count] = axis
        start += count
    return axes


def _check(spec: LayerSpec, stock: Any, config: VllmConfig) -> None:
    """Raise `InputError` for what cannot be served."""
    if spec.rank is None:
        raise InputError(
            "this checkpoint has only partial RoPE, its keys and values are not factorised, so there is no "
            "small cache to serve; convert it with `mha2mla convert CHECKPOINT --d-kv`, or serve the original"
        )
    wanted = config.cache_config.cache_dtype
    if wanted not in ("auto", str(config.model_config.dtype).removeprefix("torch.")):
        raise InputError(f"kv_cache_dtype {wanted!r}: latents are cached in the model's dtype; leave it out")
    if getattr(stock.attn, "sliding_window", None) is not None:
        raise InputError("sliding-window attention is not supported for converted models")
