"""Attention whose queries and keys are normed head by head before RoPE (QK-norm).

A normed key is not linear in the hidden state, so a latent is made of the outputs: with `y` the normed keys
and the values of a token, its latent is `kv_a_proj(y)` and what it caches rotated is `k_rope_proj(y)`. The
module's own projections and norms stay as they are in a converted layer, and everything behind the latent is
as it is without norms. The query projection may give a gate too: per head D numbers behind the query's.
Values may be normed too, without a scale, and be what keys are made of, where there is no projection of their
own: then a key is its value times the scale of the keys' norm, and `y` the values only.
Functions over attention modules, original or converted.

Shapes: B batch, T tokens, H query heads, G KV heads, D head dim, P rotary pairs, R rope dims.
"""

from typing import Any

import torch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
VALUE_NORM = "v_norm"


def is_normed(attention: Any) -> bool:
    """Whether queries and keys are normed."""
    return hasattr(attention, "q_norm")


def kept_children(attention: Any) -> tuple[str, ...]:
    """Children of an attention module that stay as they are when it is converted."""
    if not is_normed(attention):
        return ("o_proj",)
    norms = [name for name in (*NORMS, VALUE_NORM) if hasattr(attention, name)]
    scaled = attention.v_proj is None  # the norm of keys is in what makes them of values
    return (*PROJECTIONS, *(name for name in norms if not (scaled and name == "k_norm")))


def is_gated(attention: Any) -> bool:
    """Whether the query projection gives a gate too."""
    queries: int = attention.config.num_attention_heads * attention.head_dim
    return is_normed(attention) and attention.q_proj.out_features == 2 * queries


def normed_queries(attention: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries `[B, T, H, D]` before RoPE, of `hidden [B, T, hidden]`, normed if the module does that; and
    what multiplies the output of each head, of the same shape, if it is gated.
    """
    queries, gate = attention.q_proj(hidden), None
    if is_gated(attention):
        queries, gate = queries.unflatten(-1, (-1, 2 * attention.head_dim)).chunk(2, dim=-1)
        gate = gate.sigmoid()
    queries = queries.unflatten(-1, (-1, attention.head_dim)) if gate is None else queries
    return (attention.q_norm(queries) if is_normed(attention) else queries), gate


def keys_and_values(attention: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys before RoPE and values `[B, T, G, D]` of an original module, or of a converted one with norms."""
    keys = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    values = keys
    if attention.v_proj is not None:
        values = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, VALUE_NORM):
        values = attention.v_norm(values)
    return (attention.k_norm(keys) if is_normed(attention) else keys), values


def latent_inputs(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What latents are made of: `hidden` itself or, with norms, y `[B, T, 2 G D]`, which is per KV head its D
    numbers of keys and D of values; or `[B, T, G D]`, the values, where keys are made of the same.
    """
    if not is_normed(attention):
        return hidden
    if attention.v_proj is None:
        values = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
        return torch.flatten(attention.v_norm(values), -2)
    return torch.cat(keys_and_values(attention, hidden), dim=-1).flatten(-2)


def key_scale(attention: Any) -> torch.Tensor | None:
    """What a key is of its value `[D]`, where both are made of the same."""
    if attention.v_proj is not None:
        return None
    ones = torch.ones(attention.head_dim, device=attention.k_proj.weight.device)
    scale: torch.Tensor = attention.k_norm(ones) / attention.v_norm(ones)
    return scale


def head_order(pairs: torch.Tensor, head_dim: int, stride: int) -> torch.Tensor:
    """Dims of each KV head in the order of a converted layer's: those of its rotated `pairs [G, R/2]`, of
    which pair i is dims `(i, i + stride)`, then the others, `[G, D]`.

    It has one shape whatever the pairs are, so that it can be compiled.
    """
    rope = torch.cat([pairs, pairs + stride], dim=-1)
    places = torch.arange(rope.shape[1], device=pairs.device).expand_as(rope)
    last = torch.full((len(pairs), head_dim), head_dim, device=pairs.device)
    return last.scatter(1, rope, places).argsort(dim=-1, stable=True)
