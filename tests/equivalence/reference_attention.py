"""Attention of a converted layer written a second time: token by token, pair by pair, in float64."""

import cmath

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm

from mha2mla_vlm.utils.compat import one_table

FROM_ONE = (Qwen3_5RMSNorm, Qwen3_5MoeRMSNorm, Gemma3RMSNorm)  # norms whose weights count from one


class ReferenceAttention(nn.Module):
    """Takes the weights of a layer's attention and the modality of every token, `[B, T]`.

    No cache, no absorption, no batching over tokens. Every key is built from its own token's factors
    and rotated as complex numbers. It knows padding from `keep [B, T]`.
    """

    def __init__(self, source, visual, keep):
        super().__init__()
        self.source, self.visual, self.keep = source, visual, keep

    def _key_value(self, x, visual, cos, sin, head):
        source = self.source
        name = ("vision" if visual else "text") if len(source.modalities) == 2 else "shared"
        if source.is_normed:
            x = self._normed_outputs(x)
        down, up = source.kv_a_proj[name], source.kv_b_proj[name]
        latent = down.weight.double() @ x
        both = up.weight.double() @ latent + (up.bias.double() if up.bias is not None else 0)
        width = len(both) // source.kv_heads
        both = both[head * width : (head + 1) * width]
        if source.at_read:
            rope, both = both[: source.rope_dim], both[source.rope_dim :]
        else:
            rope = source.k_rope_proj.weight.double() @ x
            if source.k_rope_proj.bias is not None:
                rope = rope + source.k_rope_proj.bias.double()
            rope = rope[head * source.rope_dim : (head + 1) * source.rope_dim]
        key = torch.cat([self._rotate(rope, cos, sin, head), both[: source.nope_dim]])
        return key, both[source.nope_dim :]

    def _normed_outputs(self, x):
        """What latents are made of where keys are normed: per KV head its normed key and its value."""
        source = self.source
        if source.v_proj is None:
            values = self._heads("k_proj", x, source.kv_heads)
            return torch.cat([self._norm(source.v_norm, value) for value in values])
        keys, values = (self._heads(name, x, source.kv_heads) for name in ("k_proj", "v_proj"))
        if hasattr(source, "v_norm"):
            values = [self._norm(source.v_norm, value) for value in values]
        both = [(self._norm(source.k_norm, key), value) for key, value in zip(keys, values, strict=True)]
        return torch.cat([part for head in both for part in head])

    def _heads(self, name, x, heads):
        projection = getattr(self.source, name)
        made = projection.weight.double() @ x
        return (made if projection.bias is None else made + projection.bias.double()).view(heads, -1)

    def _norm(self, norm, x):
        weight = getattr(norm, "weight", torch.ones(len(x))).double()
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        weight = 1 + weight if isinstance(norm, FROM_ONE) else weight
        return weight * x / (x.square().mean() + eps).sqrt()

    def _rotate(self, x, cos, sin, head):
        half = len(x) // 2
        turned = x.clone()
        for i, pair in enumerate(self.source.rope_pairs[head].tolist()):
            z = complex(x[i], x[i + half]) * complex(cos[pair], sin[pair])
            assert abs(abs(complex(cos[pair], sin[pair])) - 1) < 1e-5
            assert cmath.isfinite(z)
            turned[i], turned[i + half] = z.real, z.imag
        return turned

    def forward(self, hidden_states, position_embeddings, **kwargs):
        source, x = self.source, hidden_states.double()
        tables = (one_table(table, source.config) for table in position_embeddings)
        mask = kwargs.get("attention_mask")
        self.seen = mask if mask is not None and mask.dtype == torch.bool and mask.ndim == 4 else None
        cos, sin = (table.double().expand(len(x), -1, -1) for table in tables)
        batch, tokens, _ = x.shape
        out = torch.zeros(batch, tokens, source.heads, source.head_dim, dtype=torch.float64)
        for b in range(batch):
            for head in range(source.kv_heads):
                built = [
                    self._key_value(x[b, j], bool(self.visual[b, j]), cos[b, j], sin[b, j], head)
                    for j in range(tokens)
                ]
                keys, values = (torch.stack(part) for part in zip(*built, strict=True))
                for m in range(source.num_key_value_groups):
                    h = head * source.num_key_value_groups + m
                    for t in range(tokens):
                        if self.keep[b, t]:
                            out[b, t, h] = self._one(
                                x[b, t], cos[b, t], sin[b, t], keys, values, b, t, head, h
                            )
        out = out.flatten(2).to(hidden_states.dtype)
        return source.o_proj(out), None

    def _one(self, x, cos, sin, keys, values, b, t, head, h):
        source = self.source
        query, gate = self._heads("q_proj", x, source.heads)[h], 1.0
        if len(query) == 2 * source.head_dim:
            query, gate = query[: source.head_dim], query[source.head_dim :].sigmoid()
        if source.is_normed:
            query = self._norm(source.q_norm, query)
            rope = source.rope_pairs[head].tolist()
            rope += [pair + source.pair_stride for pair in rope]
            query = query[[*rope, *(dim for dim in range(source.head_dim) if dim not in rope)]]
        rope = self._rotate(query[: source.rope_dim], cos, sin, head)
        query = torch.cat([rope, query[source.rope_dim :]])
        seen = self.keep[b].bool() & (torch.arange(len(keys)) <= t)
        seen = seen if self.seen is None else self.seen[b, 0, t]  # both ways within an image
        scores = (keys @ query)[seen] * source.scaling
        return scores.softmax(0) @ values[seen] * gate
