"""Multi-head latent attention over partial RoPE, with factors per modality.

Shapes: B batch, T new tokens, S all tokens, H query heads, G KV heads, M = H / G query heads per KV
head, D head dim, R rope dims kept per head, N = D - R, r latent dims (`kv_lora_rank`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache

from mha2mla_vlm.algorithms.rounding import rounded, rounded_keys
from mha2mla_vlm.config import SHARED, AttentionSizes, LayerSpec
from mha2mla_vlm.model.absorbed import Piece, absorb_limit, dense_mask
from mha2mla_vlm.model.cache.latent import Pieces, filled_length
from mha2mla_vlm.model.cache.packed import cached
from mha2mla_vlm.model.chunked import attend_chunks
from mha2mla_vlm.model.decoding import attend_latents
from mha2mla_vlm.model.kernels import DecodeBackend
from mha2mla_vlm.model.modality import Kind, Run, TokenModality
from mha2mla_vlm.model.normed import head_order, is_normed, kept_children, latent_inputs, normed_queries
from mha2mla_vlm.model.positions import TokenPositions
from mha2mla_vlm.model.projections import ByModality, Replaced
from mha2mla_vlm.model.rebuilt import Angles, Rebuilt
from mha2mla_vlm.model.rope import rotate
from mha2mla_vlm.utils.compat import (
    attention_backend,
    is_plain,
    one_table,
    pop_cache,
    record_attentions,
    records_attentions,
)

EXPAND_CHUNK = 1024  # cached tokens expanded at a time when many new ones meet four times as many


class MLAAttention(nn.Module):
    """Takes the place of a decoder layer's `self_attn`; caches `G * R + r` numbers a token, or r.

    `source` is the attention module that it replaces, original or converted; it gives sizes and biases, and
    its `o_proj` is kept. A `spec` without rank leaves keys and values unfactorised: `kv_a_proj` then computes
    them and `kv_b_proj` is the identity. Where queries and keys are normed, all of `source` is kept, and
    latents are made of its normed keys and its values (`model.normed`); a gate multiplies the heads' outputs.

    Two paths give the same result. The expanded one builds keys and values of all tokens from their
    latents and calls the model's attention backend. The absorbed one moves the up projections to
    the queries and outputs and attends over the latents themselves. Where keys are rotated at read
    (`LayerSpec.rotate_at`), both make rotated keys of the latents, by the positions of their tokens.
    """

    def __init__(self, source: nn.Module, spec: LayerSpec, *, empty: bool = False) -> None:
        """With `empty`, new parameters take no memory until others are assigned to them."""
        super().__init__()
        self.config = source.config
        rope_dim, rank, modalities = spec.rope_dim, spec.rank, spec.modalities
        self.layer_idx = source.layer_idx
        self.head_dim, self.rope_dim, self.nope_dim = source.head_dim, rope_dim, source.head_dim - rope_dim
        sizes = AttentionSizes.of_text(self.config)
        self.rotary_dim, self.pair_stride = sizes.rotary_dim, sizes.pair_stride
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        self.num_key_value_groups = self.heads // self.kv_heads  # the name attention backends look for
        self.scaling = source.scaling
        self.attention_dropout = source.attention_dropout
        self.is_causal = True
        self.modalities, self.at_read, self.bits = modalities, spec.at_read, spec.bits
        self.expand_chunk = EXPAND_CHUNK
        self.decode_backend: DecodeBackend = "auto"
        self.absorb_limit = absorb_limit(self.heads, self.kv_heads, self.nope_dim, self.head_dim)
        hidden, outputs = source.q_proj.in_features, spec.outputs(sizes)
        self.is_normed, bias = is_normed(source), _key_bias(source)
        down_bias = bias if rank is None else spec.bits is not None  # what integers count from
        device = source.q_proj.weight.device
        new: dict[str, Any] = {"device": "meta" if empty else device, "dtype": source.q_proj.weight.dtype}
        if self.is_normed:
            made_of = 1 if sizes.one_projection else 2  # values, or keys and values
            hidden = made_of * self.kv_heads * self.head_dim
        else:
            self.q_proj = nn.Linear(
                hidden, self.heads * self.head_dim, bias=source.q_proj.bias is not None, **new
            )
        if not self.at_read:
            self.k_rope_proj = nn.Linear(hidden, self.kv_heads * rope_dim, bias=bias, **new)
        self.kv_a_proj = ByModality(
            {m: nn.Linear(hidden, rank or outputs, bias=down_bias, **new) for m in modalities}
        )
        self.kv_b_proj = ByModality(
            {
                m: nn.Linear(rank, outputs, bias=bias or spec.bias, **new) if rank else nn.Identity()
                for m in modalities
            }
        )
        for name in kept_children(source):
            self.add_module(name, getattr(source, name))
        if not self.is_normed:
            self.k_proj, self.v_proj = Replaced(device), Replaced(device)
        pairs = torch.empty(self.kv_heads, rope_dim // 2, dtype=torch.long, device=new["device"])
        self.register_buffer("rope_pairs", pairs)
        self.reset_buffers()

    def reset_buffers(self, keep: Callable[[torch.Tensor], bool] = lambda _: False) -> None:
        """Fill the buffers as without a checkpoint, the first pairs rotated, but those to `keep`."""
        if not keep(self.rope_pairs):
            self.rope_pairs.copy_(torch.arange(self.rope_dim // 2))
        for module in (self.k_proj, self.v_proj):
            if isinstance(module, Replaced) and not keep(module.weight):
                module.weight.zero_()

    def new_weights(self) -> dict[str, torch.Tensor]:
        """All parameters and buffers but those that are the source's."""
        kept = tuple(f"{name}." for name in kept_children(self))
        return {name: value for name, value in self.state_dict().items() if not name.startswith(kept)}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        token_modality: TokenModality | None = None,
        token_positions: TokenPositions | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states [B, T, hidden]`; `token_modality` covers cached and new tokens, as do
        `token_positions`, which keys that are rotated at read need where there is a cache.

        `cache` (before transformers 5.24 `past_key_values`) is among the keyword arguments.
        """
        batch, new, _ = hidden_states.shape
        cache: Cache | None = pop_cache(kwargs)
        cos, sin = (one_table(table, self.config) for table in position_embeddings)
        angles = Angles(cos, sin, self.rope_pairs)
        columns = angles.columns(0, new)
        q_rope, q_nope, gate = self._queries(hidden_states, *columns)
        written = latent_inputs(self, hidden_states)
        k_rope = self._rotated_keys(written, *columns)
        latent = self._down(written, token_modality)[:, None]
        filled = None
        if cache is not None:
            latent, k_rope = cached(cache, self.layer_idx, latent, k_rope, self.bits)
            filled = filled_length(cache, self.layer_idx)
        stored = latent if isinstance(latent, Pieces) else (latent[:, 0], k_rope)
        if self.at_read and cache is not None and token_positions is not None:
            given = (cache, self.layer_idx, hidden_states, _length(stored), self.config)
            angles = Angles.of(token_positions.rotation(*given), self.rope_pairs)
        known = (token_modality, angles if self.at_read else None, attention_mask, filled)
        output, weights = self._over(stored, q_rope, q_nope, *known, **kwargs)
        record_attentions(weights)
        output = output if gate is None else output * gate
        return self.o_proj(output.reshape(batch, new, -1)), weights

    def _over(
        self,
        stored: Piece | Pieces,
        q_rope: torch.Tensor,
        q_nope: torch.Tensor,
        modality: TokenModality | None,
        angles: Angles | None,
        mask: Any,
        filled: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over cached and new tokens by the path that suits; `[B, T, H, D]`."""
        new = q_rope.shape[2]
        total = _length(stored)
        cached = total > new and not self.training and (mask is None or isinstance(mask, torch.Tensor))
        cached = cached and not records_attentions()  # whose weights are the backend's
        if cached and self._can_absorb(new):
            dense = dense_mask(mask, new, total, q_rope.device, filled)
            return self.attend_absorbed(stored, q_rope, q_nope, modality, dense, filled, angles), None
        queries = torch.cat([q_rope, q_nope], dim=-1)
        if cached and total > 4 * self.expand_chunk:
            dense = dense_mask(mask, new, total, q_rope.device, filled)
            chunks = self._expanded_chunks(stored, modality, angles)
            return attend_chunks(queries, chunks, dense, self.scaling), None
        latent, k_rope = stored.whole() if isinstance(stored, Pieces) else stored
        keys, values = self._expand(latent, k_rope, modality, angles)
        if isinstance(mask, torch.Tensor):  # a static cache has masks of its whole length
            mask = mask[..., :total]
        return self._attend(queries, keys, values, mask, **kwargs)

    def _rotated_keys(self, written: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotated key parts of the new tokens that are cached beside latents, `[B, G, T, R or 0]`."""
        batch, new, _ = written.shape
        if self.at_read:
            return written.new_empty(batch, self.kv_heads, new, 0)
        keys = self.k_rope_proj(written).view(batch, new, self.kv_heads, self.rope_dim)
        keys = rotate(keys.transpose(1, 2), cos, sin)
        return keys if self.bits is None else rounded_keys(keys)

    def _queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rotated and other query parts, `[B, H, T, R]` and `[B, H, T, N]`, and the gate `[B, T, H, D]`."""
        batch, new, _ = hidden_states.shape
        groups = (self.kv_heads, self.num_key_value_groups)
        queries, gate = normed_queries(self, hidden_states)
        queries = queries.view(batch, new, *groups, self.head_dim).permute(0, 2, 3, 1, 4)
        if self.is_normed:  # else the rows of `q_proj` are in this order
            order = head_order(self.rope_pairs, self.head_dim, self.pair_stride)[:, None, None]
            queries = queries.gather(-1, order.expand(batch, *queries.shape[1:]))
        rope, nope = queries.split([self.rope_dim, self.nope_dim], dim=-1)
        rope = rotate(rope, cos[:, :, None], sin[:, :, None])
        return rope.flatten(1, 2), nope.flatten(1, 2), gate

    def _down(self, written: torch.Tensor, modality: TokenModality | None) -> torch.Tensor:
        """Latents of the new tokens, `[B, T, r]`."""
        tokens = None if modality is None else (modality.new or modality).part(0, written.shape[1])
        latent = self.kv_a_proj(written, tokens)
        return latent if self.bits is None else rounded(latent, self.bits)

    def _expand(
        self,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        modality: TokenModality | None,
        angles: Angles | None,
        start: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, G, S, D]` of latents `[B, S, r]`, tokens `start` onwards."""
        batch, total, _ = latent.shape
        tokens = None if modality is None else modality.part(start, start + total)
        both = self.kv_b_proj(latent, tokens).view(batch, total, self.kv_heads, -1).transpose(1, 2)
        if angles is not None:
            k_rope, both = both.split([self.rope_dim, self.nope_dim + self.head_dim], dim=-1)
            k_rope = rotate(k_rope, *angles.columns(start, start + total))
        k_nope, values = both.split([self.nope_dim, self.head_dim], dim=-1)
        return torch.cat([k_rope, k_nope], dim=-1), values

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention backend that the model is set to; returns `[B, T, H, D]`."""
        backend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = attention_backend(self.config)
        dropout = self.attention_dropout if self.training else 0.0
        return backend(self, queries, keys, values, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _can_absorb(self, new: int) -> bool:
        return new <= self.absorb_limit and all(is_plain(up) for up in self.kv_b_proj.values())

    def attend_absorbed(
        self,
        stored: Piece | Pieces,
        q_rope: torch.Tensor,
        q_nope: torch.Tensor,
        modality: TokenModality | None,
        mask: torch.Tensor | None,
        filled: torch.Tensor | None,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """Attention over latents of rotated and other query parts `[B, H, T, R / N]`; `[B, T, H, D]`.

        `angles` are those of all stored tokens, where keys are rotated at read.
        """
        total = _length(stored)
        runs: tuple[Run, ...] = (Run(0, total, Kind.TEXT),)
        visual = None
        if modality is not None and self.modalities != SHARED:
            runs, visual = modality.runs, modality.mask.to(q_rope.device)
        rebuilt = self.rope_dim if self.at_read else 0
        ups, given = self.kv_b_proj.ups(self.kv_heads, self.nope_dim, rebuilt), (runs, visual, mask, filled)
        if angles is not None:
            stored = Rebuilt(stored, ups, runs, visual, angles)
        return attend_latents(self.decode_backend, q_rope, q_nope, ups, self.scaling, stored, *given)

    def _expanded_chunks(
        self, stored: Piece | Pieces, modality: TokenModality | None, angles: Angles | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of stored tokens, chunk by chunk."""
        start = 0
        for latent, k_rope in stored if isinstance(stored, Pieces) else (stored,):
            for a in range(0, latent.shape[1], self.expand_chunk):
                b = a + self.expand_chunk
                yield self._expand(latent[:, a:b], k_rope[:, :, a:b], modality, angles, start + a)
            start += latent.shape[1]


def _length(stored: Piece | Pieces) -> int:
    return stored.length if isinstance(stored, Pieces) else stored[0].shape[1]


def _key_bias(source: Any) -> bool:
    """Whether what makes latents has a bias in an attention module, original or converted."""
    if is_normed(source):
        return False  # that of its projections comes before the norm
    if isinstance(source, MLAAttention) and source.at_read:
        return any(up.bias is not None for up in source.kv_b_proj.values())
    keys = source.k_rope_proj if isinstance(source, MLAAttention) else source.k_proj
    return keys.bias is not None
