"""A latent cache quantised to 8, 4 or 2 bits, dequantised a few blocks at a time.

transformers' quantised layers dequantise the whole cache at every step; they work too, but their
peak memory is that of no quantisation. Here attention takes the cache piece by piece.

Shapes: B batch, S all tokens, G KV heads, R rope dims per head, r latent dims.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, LatentLayer, Pieces
from mha2mla_vlm.model.cache.quantization import BITS, Quantized, dequantize, quantize
from mha2mla_vlm.strict import Strict
from mha2mla_vlm.utils.compat import replicate

PIECE = {"cpu": 4096, "cuda": 16384}  # tokens that are dequantised at a time


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Strict):
    """`cache_config` of `generate(cache_implementation="quantized")` with backend "latent".

    `nbits` are those of latents, `rope_nbits` those of rotated keys, which take rounding worse: by
    default at least 4; 16 leaves them as they are. Ranges are of `q_group_size` tokens. The last
    `residual_length` tokens at most are not yet quantised.
    """

    backend: Literal["latent"] = "latent"
    nbits: int = 4
    rope_nbits: int | None = None
    q_group_size: int = 64
    residual_length: int = 128

    def __post_init__(self) -> None:
        if self.nbits not in BITS:
            raise InputError(f"nbits is {self.nbits!r}; use one of {', '.join(map(str, BITS))}")
        if self.rope_nbits not in (None, 16, *BITS):
            raise InputError(f"rope_nbits is {self.rope_nbits!r}; use one of 16, {', '.join(map(str, BITS))}")
        if self.q_group_size < 1 or self.residual_length < self.q_group_size:
            raise InputError(
                f"residual_length {self.residual_length} must be at least q_group_size {self.q_group_size}, "
                "and that at least 1"
            )

    @property
    def key_bits(self) -> int:
        """Bits of rotated keys."""
        return self.rope_nbits or max(self.nbits, 4)


class QuantizedLatentLayer(LatentLayer):
    """One layer: whole blocks of tokens quantised, and the last ones as they are in `keys`, `values`."""

    def __init__(self, config: QuantizationConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config or QuantizationConfig()
        self.latent: Quantized | None = None
        self.rope: Quantized | torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, torch.Tensor]:
        """Append; returns the first tokens as they are, and later all of them as `Pieces`."""
        first = self.get_seq_length() == 0
        recent = super().update(key_states.detach(), value_states.detach())
        length = recent[0].shape[2]
        if length >= self.config.residual_length or (first and length >= self.config.q_group_size):
            self._quantize(length - length % self.config.q_group_size)
        return (key_states, value_states) if first else (self.stored(), value_states)

    def stored(self) -> Pieces:
        """All tokens, a few blocks at a time."""
        return QuantizedTokens(self)

    def _quantize(self, count: int) -> None:
        """Quantise the first `count` of the recent tokens, whole blocks."""
        block = self.config.q_group_size
        latent = quantize(self.keys[:, :, :count], self.config.nbits, block)
        rope: Quantized | torch.Tensor = self.values[:, :, :count].clone()
        if self.config.key_bits != 16:
            rope = quantize(self.values[:, :, :count], self.config.key_bits, block)
        self.latent = latent if self.latent is None else self.latent.followed_by(latent)
        if isinstance(self.rope, Quantized) and isinstance(rope, Quantized):
            self.rope = self.rope.followed_by(rope)
        elif isinstance(self.rope, torch.Tensor) and isinstance(rope, torch.Tensor):
            self.rope = torch.cat([self.rope, rope], dim=2)
        else:
            self.rope = rope
        self._set_recent(self.keys[:, :, count:].clone(), self.values[:, :, count:].clone())

    def _set_recent(self, latent: torch.Tensor, rope: torch.Tensor) -> None:
        self.keys, self.values, self._buffers = latent, rope, None

    @property
    def quantized_length(self) -> int:
        """Quantised tokens."""
        return 0 if self.latent is None else self.latent.tokens

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.quantized_length + self._recent_length()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is stored."""
        yield from (self.keys, self.values) if self.is_initialized else ()
        for part in (self.latent, self.rope):
            if part is not None:
                yield from part.tensors if isinstance(part, Quantized) else (part,)

    def numbers(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[B, 1, n, r]` and rotated keys of quantised tokens; both ends between blocks."""
        assert self.latent is not None, "no quantised tokens"
        block = self.config.q_group_size

        def part(x: torch.Tensor) -> torch.Tensor:
            return x[:, :, start // block : stop // block]

        latent = dequantize(self.latent.map(part), self.keys.dtype)
        if isinstance(self.rope, Quantized):
            return latent, dequantize(self.rope.map(part), self.keys.dtype)
        assert self.rope is not None, "rotated keys come with latents"
        return latent, self.rope[:, :, start:stop]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (negative), or all after so many (positive, as before transformers 5.18)."""
        length = self.get_seq_length()
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
        if kept >= self.quantized_length:
            super().crop(kept - length)
            return
        whole = kept - kept % self.config.q_group_size  # of a block that is cut, the rest become recent
        latent, rope = self.numbers(whole, min(whole + self.config.q_group_size, self.quantized_length))
        self._set_recent(latent[:, :, : kept - whole].clone(), rope[:, :, : kept - whole].clone())
        self._map(lambda x: x[:, :, : whole // self.config.q_group_size], lambda x: x[:, :, :whole])

    def _map(self, blocks: Any, tokens: Any) -> None:
        """Apply `blocks` to quantised tensors and `tokens` to those that are not."""
        self.latent = None if self.latent is None else self.latent.map(blocks)
        if isinstance(self.rope, Quantized):
            self.rope = self.rope.map(blocks)
        elif self.rope is not None:
            self.rope = tokens(self.rope)

    def reset(self) -> None:
        """Forget all tokens."""
        self.latent = self.rope = self.token_modality = None
        if self.is_initialized:
            self._set_recent(self.keys[:, :, :0], self.values[:, :, :0])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._map(*2 * (lambda x: x.repeat_interleave(repeats, dim=0),))

    def _select(self, rows: torch.Tensor) -> None:
        self._map(*2 * (lambda x: x[rows.to(x.device)],))


class QuantizedTokens(Pieces):
    """The tokens of a layer: the quantised ones, `coded`, and after them the `recent` ones."""

    def __init__(self, layer: QuantizedLatentLayer) -> None:
        self.layer = layer
        self.length = layer.get_seq_length()

    @property
    def coded(self) -> tuple[Quantized | None, Quantized | torch.Tensor | None]:
        """Latents and rotated keys of the first tokens, which may be none; keys may be left as they are."""
        return self.layer.latent, self.layer.rope

    @property
    def recent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[B, 1, n, r]` and rotated keys `[B, G, n, R]` of the last tokens."""
        return self.layer.keys, self.layer.values

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        block, stop = self.layer.config.q_group_size, self.layer.quantized_length
        size = max(PIECE.get(self.layer.keys.device.type, PIECE["cuda"]) // block, 1) * block
        for start in range(0, stop, size):
            latent, rope = self.layer.numbers(start, min(start + size, stop))
            yield latent[:, 0], rope
        if self.length > stop:
            yield self.recent[0][:, 0], self.recent[1]


def quantized_bytes_per_token(config: Any, quantization: QuantizationConfig, *, itemsize: int = 2) -> float:
    """Bytes that a token adds to a long quantised cache of a converted model, over all layers.

    Ranges are included: for each channel of a block two numbers of `itemsize` bytes, those of the weights.
    A layer left as the original keeps its keys and values as they are.
    """
    sizes, mla = AttentionSizes.of(config), MLAConfig.from_dict(config.mla)
    total, ranges = 0.0, 2 * itemsize / quantization.q_group_size
    for spec in (mla.layer(index) for index in sizes.growing):
        if spec is None:
            total += sizes.numbers_per_token * itemsize
            continue
        widths = zip(spec.widths(sizes), (quantization.nbits, quantization.key_bits), strict=True)
        total += sum(n * (bits / 8 + ranges if bits < 16 else itemsize) for n, bits in widths)
    return total


class QuantizedLatentCache(LatentCache):
    """A `LatentCache` of which all but the last tokens are quantised."""

    holds_rows = False


def quantized_cache(**config: Any) -> QuantizedLatentCache:
    """A quantised `LatentCache`; takes what `QuantizationConfig` does."""
    cache = QuantizedLatentCache()
    replicate(cache, partial(QuantizedLatentLayer, QuantizationConfig.from_dict(config)))
    return cache
