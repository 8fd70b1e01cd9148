"""What keeping latents and rotated keys in few bits does to their numbers. Pure functions.

Shapes: r latent dims.
"""

import torch

from mha2mla_vlm.config import CHANNEL_BITS, LatentBits

KEY_LIMIT = 127  # of rotated keys, in steps
HALF_LIMIT = 65280  # of float16, as bfloat16 has it


def rounded_keys(keys: torch.Tensor) -> torch.Tensor:
    """Rotated keys in steps, as they are after they were kept in 8 bits; gradients pass as in `rounded`."""
    inside = keys.clamp(-KEY_LIMIT, KEY_LIMIT)
    if torch.is_grad_enabled() and keys.requires_grad:
        return inside + (inside.round() - inside).detach()
    return inside.round()


def rounded(latent: torch.Tensor, bits: LatentBits) -> torch.Tensor:
    """Latents `[.., r]` in steps, as they are after they were kept in `bits`: integers are middles of steps.

    Gradients pass as if nothing were rounded (straight-through), but not where numbers are out of range.
    """
    halves, *parts = latent.split(bits.counts, dim=-1)
    limits = [2 ** (each - 1) - 0.5 for each in CHANNEL_BITS[1:]]
    pairs = list(zip(parts, limits, strict=True))
    halves = halves.clamp(-HALF_LIMIT, HALF_LIMIT)
    found = [(part.floor() + 0.5).clamp(-limit, limit) for part, limit in pairs]
    found = torch.cat([halves.to(torch.float16).to(latent.dtype), *found], dim=-1)
    if torch.is_grad_enabled() and latent.requires_grad:
        inside = torch.cat([halves, *(part.clamp(-limit, limit) for part, limit in pairs)], dim=-1)
        return inside + (found - inside).detach()
    return found
