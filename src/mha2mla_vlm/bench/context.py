"""The context that benchmarks attend over: text, many images, and text.

Shapes: A axes of a position, B batch, S tokens.
"""

import torch
from transformers import PreTrainedModel

from mha2mla_vlm.model.modality import TokenModality

VISUAL = (0.05, 0.85)  # the span of a context that is visual
SIDE = 32  # of its images: tokens, in rows and columns


def modality_of(context: int, batch: int, device: torch.device) -> TokenModality:
    """A context of text, one long run of visual tokens, and text."""
    mask = torch.zeros(batch, context, dtype=torch.bool, device=device)
    start, stop = _visual(context)
    mask[:, start:stop] = True
    return TokenModality.from_mask(mask)


def positions_of(model: PreTrainedModel, context: int, batch: int, device: torch.device) -> torch.Tensor:
    """Positions of its tokens `[A, B, S]`: with multimodal RoPE, images of SIDE by SIDE tokens."""
    places = torch.arange(context, device=device)
    if not multimodal(model):
        return places.expand(1, batch, -1)
    start, stop = _visual(context)
    inside = (places - start).clamp(0, stop - start - 1)
    image, token = inside // SIDE**2, inside % SIDE**2
    visual = start + image * SIDE + torch.stack([torch.zeros_like(token), token // SIDE, token % SIDE])
    first = start + (image[-1] + 1) * SIDE - stop  # what later text is moved by
    text = places + first * (places >= stop)
    where = torch.where((places >= start) & (places < stop), visual, text)
    return where[:, None].expand(-1, batch, -1)


def multimodal(model: PreTrainedModel) -> bool:
    """Whether the model's positions have three axes."""
    return "mrope_section" in (model.config.get_text_config().rope_parameters or {})


def _visual(context: int) -> tuple[int, int]:
    start, stop = (int(share * context) for share in VISUAL)
    return start, stop
