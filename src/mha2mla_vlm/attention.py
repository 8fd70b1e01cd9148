"""Multi-head latent attention over partial RoPE, with factors per modality.

Shapes: B batch, T new tokens, S all tokens, H query heads, G KV heads, M = H / G query heads per KV
head, D head dim, R rope dims kept per head, N = D - R, r latent dims (`kv_lora_rank`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from mha2mla_vlm.cache import Kind, Run, TokenModality
from mha2mla_vlm.config import SHARED
from mha2mla_vlm.rope import one_table, rotate

EXPAND_CHUNK = 1024  # cached tokens expanded at a time when many new ones meet four times as many
QUERY_BLOCK = 256  # new tokens that meet them at a time

Up = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # `MLAAttention._up`


def dense_mask(mask: torch.Tensor | None, new: int, total: int, device: torch.device) -> torch.Tensor | None:
    """Any mask that transformers gives to attention, as one over scores `[.., T, S]`; None hides nothing.

    None means causal; `[B, S]` is padding alone, to which causality is added; `[B, 1, T, S]` is
    complete, as bool (True is kept) or to be added.
    """
    if mask is not None and mask.ndim == 4:
        return mask[..., :total]
    if mask is None and new == 1:
        return None
    causal = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    return causal if mask is None else causal & mask[:, None, None, :total].bool()


def masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores with a `dense_mask` applied."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


class MLAAttention(nn.Module):
    """Takes the place of a decoder layer's `self_attn`; caches `G * R + r` numbers a token.

    `source` is the attention module that it replaces; it gives sizes and biases, and its `o_proj` is
    kept. `rank` None leaves keys and values unfactorised: `kv_a_proj` then computes them and
    `kv_b_proj` is the identity. With `kv_bias` the up projections have a bias in any case.

    Two paths give the same result. The expanded one builds keys and values of all tokens from their
    latents and calls the model's attention backend. The absorbed one moves the up projections to
    the queries and outputs and attends over the latents themselves.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        rope_dim: int,
        rank: int | None,
        modalities: tuple[str, ...],
        kv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.config = source.config
        self.layer_idx = source.layer_idx
        self.head_dim, self.rope_dim, self.nope_dim = source.head_dim, rope_dim, source.head_dim - rope_dim
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.kv_heads  # the name attention backends look for
        self.scaling = source.scaling
        self.attention_dropout = source.attention_dropout
        self.is_causal = True
        self.modalities = modalities
        self.expand_chunk = EXPAND_CHUNK
        # the rule below which absorbed arithmetic is less: T * 2 * H * r against r * G * (N + D)
        self.absorb_limit = self.kv_heads * (self.nope_dim + self.head_dim) // (2 * self.heads)
        hidden, outputs = source.q_proj.in_features, self.kv_heads * (self.nope_dim + self.head_dim)
        bias = source.k_proj.bias is not None
        new: dict[str, Any] = {"device": source.q_proj.weight.device, "dtype": source.q_proj.weight.dtype}
        self.q_proj = nn.Linear(
            hidden, self.heads * self.head_dim, bias=source.q_proj.bias is not None, **new
        )
        self.k_rope_proj = nn.Linear(hidden, self.kv_heads * rope_dim, bias=bias, **new)
        self.kv_a_proj = nn.ModuleDict(
            {m: nn.Linear(hidden, rank or outputs, bias=bias and rank is None, **new) for m in modalities}
        )
        self.kv_b_proj = nn.ModuleDict(
            {
                m: nn.Linear(rank, outputs, bias=bias or kv_bias, **new) if rank else nn.Identity()
                for m in modalities
            }
        )
        self.o_proj = source.o_proj
        pairs = torch.arange(rope_dim // 2, device=new["device"]).repeat(self.kv_heads, 1)
        self.register_buffer("rope_pairs", pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_modality: TokenModality | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states [B, T, hidden]`; `token_modality` covers cached and new tokens."""
        batch, new, _ = hidden_states.shape
        cos, sin = (self._pair_columns(table) for table in position_embeddings)
        q_rope, q_nope = self._queries(hidden_states, cos, sin)
        k_rope = (
            self.k_rope_proj(hidden_states).view(batch, new, self.kv_heads, self.rope_dim).transpose(1, 2)
        )
        k_rope = rotate(k_rope, cos, sin)
        latent = self._down(hidden_states, token_modality)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent[:, None], k_rope, self.layer_idx)
            latent = latent[:, 0]
        cached = latent.shape[1] > new and not self.training
        if cached and self._can_absorb(new, attention_mask):
            mask = dense_mask(attention_mask, new, latent.shape[1], latent.device)
            output, weights = self._absorbed(q_rope, q_nope, latent, k_rope, token_modality, mask)
        elif cached and latent.shape[1] > 4 * self.expand_chunk and _is_dense(attention_mask):
            mask = dense_mask(attention_mask, new, latent.shape[1], latent.device)
            queries = torch.cat([q_rope, q_nope], dim=-1)
            output, weights = self._chunked(queries, latent, k_rope, token_modality, mask), None
        else:
            keys, values = self._expand(latent, k_rope, token_modality)
            queries = torch.cat([q_rope, q_nope], dim=-1)
            output, weights = self._attend(queries, keys, values, attention_mask, **kwargs)
        return self.o_proj(output.reshape(batch, new, -1)), weights

    def _pair_columns(self, table: torch.Tensor) -> torch.Tensor:
        """Columns of the kept pairs of `[B, T, D]`, per KV head: `[B, G, T, R/2]`."""
        return one_table(table, self.config)[..., self.rope_pairs].transpose(1, 2)

    def _queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated and other query parts, `[B, H, T, R]` and `[B, H, T, N]`."""
        batch, new, _ = hidden_states.shape
        groups = (self.kv_heads, self.num_key_value_groups)
        queries = self.q_proj(hidden_states).view(batch, new, *groups, self.head_dim).permute(0, 2, 3, 1, 4)
        rope, nope = queries.split([self.rope_dim, self.nope_dim], dim=-1)
        rope = rotate(rope, cos[:, :, None], sin[:, :, None])
        return rope.flatten(1, 2), nope.flatten(1, 2)

    def _down(self, hidden_states: torch.Tensor, modality: TokenModality | None) -> torch.Tensor:
        """Latents of the new tokens, `[B, T, r]`."""
        new = hidden_states.shape[1]
        total = modality.mask.shape[1] if modality is not None else new
        return self._by_modality(self.kv_a_proj, hidden_states, modality, total - new, total)

    def _by_modality(
        self,
        projections: nn.ModuleDict,
        x: torch.Tensor,
        modality: TokenModality | None,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Project `x`, the tokens `start` to `stop`, each with the projection of its modality."""
        if self.modalities == SHARED:
            return projections["shared"](x)
        tokens = self._known(modality).part(start, stop)
        parts = []
        for a, b, kind in tokens.runs:
            piece = x[:, a:b]
            if kind == Kind.MIXED:
                visual = tokens.mask[:, a:b, None].to(x.device)
                parts.append(torch.where(visual, projections["vision"](piece), projections["text"](piece)))
            else:
                parts.append(projections["vision" if kind == Kind.VISION else "text"](piece))
        if self.training:  # processes must agree on the parameters that have a gradient
            parts += [projections[name](x[:, :0]) for name in self.modalities]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _known(self, modality: TokenModality | None) -> TokenModality:
        if modality is None:
            raise ValueError("token_modality is missing; call the whole converted model, which computes it")
        return modality

    def _expand(
        self, latent: torch.Tensor, k_rope: torch.Tensor, modality: TokenModality | None, start: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, G, S, D]` of latents `[B, S, r]`, tokens `start` onwards."""
        batch, total, _ = latent.shape
        both = self._by_modality(self.kv_b_proj, latent, modality, start, start + total)
        both = both.view(batch, total, self.kv_heads, -1).transpose(1, 2)
        k_nope, values = both.split([self.nope_dim, self.head_dim], dim=-1)
        return torch.cat([k_rope, k_nope], dim=-1), values

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention backend that the model is set to; returns `[B, T, H, D]`."""
        backend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        )
        dropout = self.attention_dropout if self.training else 0.0
        return backend(self, queries, keys, values, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _can_absorb(self, new: int, mask: Any) -> bool:
        factorised = all(isinstance(up, nn.Linear) for up in self.kv_b_proj.values())
        return factorised and new <= self.absorb_limit and _is_dense(mask)

    def _up(self, name: str) -> Up:
        """Key and value blocks of an up projection: `[G, N, r]`, `[G, D, r]`, `[G, N, 1]`, `[G, 1, D]`."""
        weight, bias = _whole(self.kv_b_proj[name].weight), _whole(self.kv_b_proj[name].bias)
        split = [self.nope_dim, self.head_dim]
        key, value = weight.view(self.kv_heads, sum(split), -1).split(split, dim=1)
        if bias is None:
            return key, value, None, None
        key_bias, value_bias = bias.view(self.kv_heads, sum(split)).split(split, dim=1)
        return key, value, key_bias[:, :, None], value_bias[:, None, :]

    def _absorbed(
        self,
        q_rope: torch.Tensor,
        q_nope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        modality: TokenModality | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over latents; returns `[B, T, H, D]` and the weights `[B, H, T, S]`."""
        batch, heads, new, _ = q_nope.shape
        total = latent.shape[1]
        grouped = (batch, self.kv_heads, self.num_key_value_groups * new)
        scores = (q_rope.reshape(*grouped, self.rope_dim) @ k_rope.transpose(-1, -2)).view(
            batch, heads, new, total
        )
        nope = q_nope.reshape(*grouped, self.nope_dim)
        # all of them, in order: gathering shards needs the same calls from every process
        ups = {name: self._up(name) for name in self.modalities}
        scores = scores + self._latent_scores(nope, latent, ups, modality).view(batch, heads, new, total)
        weights = masked(scores * self.scaling, mask).softmax(dim=-1, dtype=torch.float32).to(latent.dtype)
        output = self._latent_values(weights.view(batch, heads * new, total), latent, ups, modality)
        return output.view(batch, heads, new, self.head_dim).transpose(1, 2), weights

    def _runs(self, modality: TokenModality | None, total: int) -> tuple[Run, ...]:
        return (Run(0, total, Kind.TEXT),) if self.modalities == SHARED else self._known(modality).runs

    def _names(self, kind: Kind) -> tuple[str, ...]:
        """Modalities that occur in a run."""
        if self.modalities == SHARED:
            return SHARED
        return {Kind.TEXT: ("text",), Kind.VISION: ("vision",), Kind.MIXED: ("text", "vision")}[kind]

    def _latent_scores(
        self, nope: torch.Tensor, latent: torch.Tensor, ups: dict[str, Up], modality: TokenModality | None
    ) -> torch.Tensor:
        """Scores of `nope [B, G, M*T, N]` with each token's latent, `[B, H*T, S]`.

        The key bias differs between modalities, so it does not cancel in the softmax.
        """
        batch = nope.shape[0]
        runs = self._runs(modality, latent.shape[1])
        moved = {}
        for name in {name for run in runs for name in self._names(run.kind)}:
            key, _, bias, _ = ups[name]
            constant = 0.0 if bias is None else (nope @ bias).reshape(batch, -1, 1)
            moved[name] = ((nope @ key).reshape(batch, -1, latent.shape[-1]), constant)
        parts = []
        for start, stop, kind in runs:
            by_name = []
            for name in self._names(kind):
                query, constant = moved[name]
                by_name.append(query @ latent[:, start:stop].transpose(-1, -2) + constant)
            parts.append(by_name[0] if len(by_name) == 1 else self._pick(modality, start, stop, *by_name))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _pick(
        self, modality: TokenModality | None, start: int, stop: int, text: torch.Tensor, vision: torch.Tensor
    ) -> torch.Tensor:
        visual = self._known(modality).mask[:, None, start:stop].to(text.device)
        return torch.where(visual, vision, text)

    def _latent_values(
        self, weights: torch.Tensor, latent: torch.Tensor, ups: dict[str, Up], modality: TokenModality | None
    ) -> torch.Tensor:
        """Values of all tokens under `weights [B, H*T, S]`, then expanded: `[B, H*T, D]`."""
        batch = latent.shape[0]
        sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for start, stop, kind in self._runs(modality, latent.shape[1]):
            names = self._names(kind)
            for name in names:
                part = weights[..., start:stop]
                if len(names) == 2:
                    none = torch.zeros_like(part)
                    part = self._pick(
                        modality, start, stop, *((part, none) if name == "text" else (none, part))
                    )
                mixed, mass = part @ latent[:, start:stop], part.sum(-1, keepdim=True)
                if name in sums:
                    mixed, mass = mixed + sums[name][0], mass + sums[name][1]
                sums[name] = mixed, mass
        outputs = []
        for name, (mixed, mass) in sums.items():
            _, value, _, bias = ups[name]
            output = mixed.view(batch, self.kv_heads, -1, latent.shape[-1]) @ value.transpose(-1, -2)
            outputs.append(output if bias is None else output + mass.view(batch, self.kv_heads, -1, 1) * bias)
        return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]

    def _chunked(
        self,
        queries: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        modality: TokenModality | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Expanded attention with keys and values of one chunk of tokens in memory at a time.

        Softmax over chunks is accumulated as in online softmax; returns `[B, T, H, D]`.
        """
        top = queries.new_full((*queries.shape[:3], 1), -torch.inf, dtype=torch.float32)
        mass, output = torch.zeros_like(top), torch.zeros(queries.shape, device=queries.device)
        for start in range(0, latent.shape[1], self.expand_chunk):
            stop = min(start + self.expand_chunk, latent.shape[1])
            keys, values = self._expand(latent[:, start:stop], k_rope[:, :, start:stop], modality, start)
            for first in range(0, queries.shape[2], QUERY_BLOCK):
                rows = slice(first, first + QUERY_BLOCK)
                seen = None if mask is None else mask[..., rows, start:stop]
                part, part_mass, part_top = self._softmax_part(queries[:, :, rows], keys, values, seen)
                new_top = torch.maximum(top[:, :, rows], part_top)
                old, fresh = (top[:, :, rows] - new_top).exp(), (part_top - new_top).exp()
                output[:, :, rows] = output[:, :, rows] * old + part * fresh
                mass[:, :, rows] = mass[:, :, rows] * old + part_mass * fresh
                top[:, :, rows] = new_top
        return (output / mass).to(queries.dtype).transpose(1, 2)

    def _softmax_part(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values summed under unnormalised weights `[B, H, T, D]`, and sum and maximum `[B, H, T, 1]`."""
        batch, heads, new, dim = queries.shape
        grouped = (batch, self.kv_heads, self.num_key_value_groups * new)
        scores = queries.reshape(*grouped, dim) @ keys.transpose(-1, -2)
        scores = masked(scores.view(batch, heads, new, -1).float() * self.scaling, mask)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        output = weights.to(values.dtype).view(*grouped, -1) @ values
        return output.view(batch, heads, new, dim).float(), weights.sum(-1, keepdim=True), top


def _is_dense(mask: Any) -> bool:
    return mask is None or isinstance(mask, torch.Tensor)


def _whole(parameter: Any) -> Any:
    """A parameter that is read beside its module's `forward`: FSDP gathers it there alone."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
