"""Projections of a converted layer's attention, and what is left where the original's were.

Shapes: B batch, T tokens, r latent dims.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mha2mla_vlm.model.absorbed import Up
from mha2mla_vlm.model.modality import Kind, TokenModality


class Replaced(nn.Module):
    """Where the original's `k_proj` or `v_proj` was, so that what is meant for it fails instead of vanishing.

    transformers makes up weights where a family's own class finds none in a converted folder, but refuses
    those of another shape; peft leaves out an adapter's modules that are not there, but refuses those that
    are not layers it knows.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, device=device))


class ByModality(nn.ModuleDict):
    """One projection for each modality of tokens, or `shared` by all."""

    def forward(self, x: torch.Tensor, tokens: TokenModality | None) -> torch.Tensor:
        """Project `x [B, T, ..]`, whose `tokens` have these modalities; raises `ValueError` without them."""
        if "shared" in self:
            return self["shared"](x)
        if tokens is None:
            raise ValueError("token_modality is missing; call the whole converted model, which computes it")
        parts = []
        for start, stop, kind in tokens.runs:
            piece = x[:, start:stop]
            if kind == Kind.MIXED:
                visual = tokens.mask[:, start:stop, None].to(x.device)
                parts.append(torch.where(visual, self["vision"](piece), self["text"](piece)))
            else:
                parts.append(self["vision" if kind == Kind.VISION else "text"](piece))
        if self.training:  # processes must agree on the parameters that have a gradient
            parts += [projection(x[:, :0]) for projection in self.values()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def ups(self, kv_heads: int, nope_dim: int, rope_dim: int = 0) -> tuple[Up, ...]:
        """Each as an up projection; gathering shards needs all, in order, in every process."""
        sizes = (kv_heads, nope_dim, rope_dim)
        return tuple(Up(_whole(up.weight), _whole(up.bias), *sizes) for up in self.values())


def _whole(parameter: Any) -> Any:
    """A parameter that is read beside its module's `forward`: FSDP gathers it only there."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
