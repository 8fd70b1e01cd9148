"""What layers that stay as the original has them keep of a row: a state of constant size, or a window of
tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache

from mha2mla_vlm.config import AttentionSizes

STATE_ITEMSIZE = 4  # recurrent states are float32, whatever the weights are


def state_bytes_per_row(config: Any, *, itemsize: int = 2) -> int:
    """Bytes that one row of a batch keeps in these layers, however long it is, for `itemsize` bytes an
    element.

    Linear attention keeps the inputs of its convolution and a recurrent state; a sliding window at most the
    keys and values of as many tokens.
    """
    text = config.get_text_config(decoder=True)
    sizes = AttentionSizes.of(config)
    total = 0
    for index in sizes.left:
        if text.layer_types[index] == "linear_attention":
            keys, heads = text.linear_key_head_dim, text.linear_num_value_heads
            channels = 2 * text.linear_num_key_heads * keys + heads * text.linear_value_head_dim
            total += channels * text.linear_conv_kernel_dim * itemsize
            total += heads * keys * text.linear_value_head_dim * STATE_ITEMSIZE
        else:
            own = AttentionSizes.of_text(text, index)
            total += own.numbers_per_token * text.sliding_window * itemsize
    return total


def state_bytes(cache: Cache) -> int:
    """Bytes of the tensors of such layers in a cache, which `latent.cache_bytes` leaves out."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in _states(layer))


def _states(layer: Any) -> Iterator[torch.Tensor]:
    for name in ("conv_states", "recurrent_states"):
        yield from (x for x in getattr(layer, name, {}).values() if x is not None)
    if getattr(layer, "is_sliding", False) and layer.is_initialized:
        yield from (layer.keys, layer.values)
