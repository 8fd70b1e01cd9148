"""The latent cache, and the only places that count its bytes.

Shapes: B batch, T new tokens, S all tokens, G KV heads, R rope dims per head, r latent dims.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.modality import Kind, Run, TokenModality
from mha2mla_vlm.utils.compat import (
    add_layer,
    keep_address,
    make_layers,
    replace_layers,
    replicate,
    static_length,
    static_room,
)

GROWTH = 32  # tokens by which buffers grow


class Pieces(ABC):
    """Tokens that a layer hands out piece by piece, because it does not hold them as they are used."""

    length: int

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Latents `[B, n, r]` and rotated keys `[B, G, n, R]` of the next n tokens, until all are out."""

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens at once."""
        latents, keys = zip(*self, strict=True)
        return torch.cat(latents, dim=1), torch.cat(keys, dim=2)


class LatentLayer(DynamicLayer):
    """One layer: `keys` is the latent `[B, 1, S, r]`, `values` the rotated key part `[B, G, S, R]`.

    Both are views of buffers that grow in steps, so that a new token does not copy the old ones. The first
    such layer of a cache holds the modality of its tokens, so that it follows what happens to rows.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.token_modality: TokenModality | None = None
        self.positions: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents and rotated keys; returns all of them."""
        grows = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if grows or torch.compiler.is_compiling():  # in-place writes break autograd, and graphs
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self._recent_length()
        stop = start + key_states.shape[-2]
        buffers = self._writable(key_states, value_states, start, stop)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self._buffers = buffers
        self.keys, self.values = (buffer[:, :, :stop] for buffer in buffers)
        return self.keys, self.values

    def stored(self) -> "tuple[torch.Tensor, torch.Tensor] | Pieces":
        """Latents `[B, S, r]` and rotated keys of all tokens, in the form that attention takes."""
        return self.keys[:, 0], self.values

    def _recent_length(self) -> int:
        """Tokens in `keys` and `values`: all but those that a subclass keeps in another form."""
        return self.keys.shape[2] if self.is_initialized and self.keys.ndim == 4 else 0

    def _writable(
        self, latent: torch.Tensor, rope: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers if the tokens so far lie in them and the new ones fit, else larger copies."""
        if self._buffers is not None and start:
            buffer = self._buffers[0]
            same = buffer.data_ptr() == self.keys.data_ptr() and len(buffer) == len(latent)
            writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
            if same and writable and stop <= buffer.shape[2]:
                return self._buffers
        capacity = -(-stop // GROWTH) * GROWTH if start else stop  # a prompt fits exactly
        grown = tuple(new.new_empty(*new.shape[:2], capacity, new.shape[-1]) for new in (latent, rope))
        if start:
            for buffer, old in zip(grown, (self.keys, self.values), strict=True):
                buffer[:, :, :start] = old
        return grown[0], grown[1]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._buffers = self.token_modality = self.positions = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)
        self._follow(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._follow(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = len(self.keys) if self.is_initialized else 0
        super().batch_repeat_interleave(repeats)
        self._follow(torch.arange(rows).repeat_interleave(repeats))

    def _follow(self, rows: torch.Tensor) -> None:
        """What is known of tokens after the cache's rows became these."""
        self._buffers = None
        self.token_modality = _rows(self.token_modality, rows)
        self.positions = None if self.positions is None else self.positions[:, rows.to(self.positions.device)]

    def offload(self) -> None:
        """Move to the CPU, buffers included."""
        super().offload()
        self._buffers = None


def _rows(known: TokenModality | None, indices: torch.Tensor) -> TokenModality | None:
    return None if known is None else known.rows(indices)


class LatentCache(DynamicCache):
    """A `DynamicCache` of latents: what a plain one becomes when a converted model first fills it.

    Where `holds_rows`, latents of integers come as rows of bytes.
    """

    holds_rows = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        replicate(self, LatentLayer)

    @property
    def token_modality(self) -> TokenModality | None:
        """Which of its tokens are visual, None where all share factors."""
        return known_modality(self)


class LatentStaticLayer(StaticLayer):
    """A layer of fixed room, for `torch.compile`: latents `[B, 1, room, r]`, keys `[B, G, room, R]`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.token_modality: TokenModality | None = None
        self.positions: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As transformers does, but keys and values differ in their number of heads."""
        super().lazy_initialization(key_states, value_states[:, :1])
        shape = (*value_states.shape[:2], static_room(self), value_states.shape[-1])
        self.values = torch.zeros(shape, dtype=value_states.dtype, device=value_states.device)
        keep_address(self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write latents and rotated keys; returns the whole room, or only a prompt if it is the first."""
        first = not self.is_initialized
        whole = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if first else whole

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)
        self.token_modality = _rows(self.token_modality, beam_idx)
        self.positions = None if self.positions is None else self.positions[:, beam_idx]


_HOLDERS = (LatentLayer, LatentStaticLayer)
_OURS = {
    DynamicLayer: LatentLayer,
    DynamicSlidingWindowLayer: LatentLayer,
    StaticLayer: LatentStaticLayer,
    LatentLayer: LatentLayer,
    LatentStaticLayer: LatentStaticLayer,
}


def hold_latents(cache: Cache, converted: Sequence[bool], config: Any = None) -> None:
    """Make an empty cache of keys and values, which transformers or a user made, one of latents in the layers
    that are `converted`; the config of the language model says what the others are.

    Caches of other layers, quantised ones, stay as they are. Raises `InputError` for a static cache that
    is not empty.
    """
    if any(isinstance(layer, _HOLDERS) for layer in cache.layers):
        return
    if not replace_layers(cache, _OURS, converted) and isinstance(cache, StaticCache):
        raise InputError(
            "this static cache was set up for keys and values; give a new StaticCache(config, max_cache_len)"
        )
    if not cache.layers and not all(converted):
        make_layers(cache, converted, config)


def filled_length(cache: Cache, layer_idx: int) -> torch.Tensor | None:
    """Tokens in a layer that returns its whole room; None for others, whose tensors are their tokens."""
    layer = cache.layers[layer_idx]
    return static_length(layer) if isinstance(layer, LatentStaticLayer) else None


def _holder(cache: Cache) -> Any:
    """Where the modality of cached tokens is: the first layer of latents, whose rows it follows, or the cache
    itself where its layers are transformers' quantised ones.
    """
    return next((layer for layer in cache.layers if isinstance(layer, _HOLDERS)), cache)


def known_modality(cache: Cache) -> TokenModality | None:
    """The modality of cached tokens."""
    holder = _holder(cache) if cache.layers else None
    return getattr(holder, "token_modality", None)


def remember_modality(cache: Cache, modality: TokenModality) -> None:
    """Keep the modality of all tokens that the cache will hold after this step."""
    if not cache.layers:
        add_layer(cache)
    _holder(cache).token_modality = modality


def track_modality(cache: Cache | None, new: TokenModality | torch.Tensor) -> TokenModality:
    """Modality of all tokens, the cached and the `new` ones (or their mask `[B, T]`), and remember it.

    It is kept where the tokens are and cut to the cache's length first: cropping and beam search only ever
    remove or repeat generated tokens, which are text. Raises `InputError` for a cache whose rows or tokens
    were not filled through this model.
    """
    if isinstance(cache, StaticCache):
        return _track_static(cache, new if isinstance(new, torch.Tensor) else new.mask)
    new = TokenModality.from_mask(new) if isinstance(new, torch.Tensor) else new
    if cache is None:
        return new
    past = cache.get_seq_length()
    if past:
        known = known_modality(cache)
        if known is None or known.mask.shape[1] < past:
            raise InputError(
                f"the cache holds {past} tokens of unknown modality; give one that this model filled"
            )
        new = _match_rows(known.part(0, past), new.mask.shape[0]).extend(new)
    remember_modality(cache, new)
    return new


def _track_static(cache: StaticCache, new_mask: torch.Tensor) -> TokenModality:
    """As `track_modality`, with one mask for the whole room and without waiting for the device.

    Which tokens are visual is then known only on the device, so all are of kind MIXED but for those of
    a prompt that is the first.
    """
    layer, new = _holder(cache), new_mask.shape[1]
    room = static_room(layer)
    if not layer.is_initialized:
        mask = torch.zeros(len(new_mask), room, dtype=torch.bool, device=new_mask.device)
        mask[:, :new] = new_mask
        keep_address(mask)
        first = TokenModality.from_mask(new_mask)
        rest = (Run(new, room, Kind.MIXED),) if new < room else ()
        remember_modality(cache, TokenModality(mask, (Run(0, room, Kind.MIXED),)))
        return TokenModality(mask, (*first.runs, *rest), first)
    known = known_modality(cache)
    if known is None or len(known.mask) != len(new_mask):
        raise InputError("the static cache holds tokens of unknown modality; give one that this model filled")
    positions = torch.arange(new, device=new_mask.device) + static_length(layer)
    known.mask.index_copy_(1, positions, new_mask)
    return TokenModality(known.mask, known.runs, TokenModality(new_mask, (Run(0, new, Kind.MIXED),)))


def _match_rows(known: TokenModality, rows: int) -> TokenModality:
    """Follow a cache whose rows were repeated or selected from outside, where that is unambiguous."""
    have = known.mask.shape[0]
    if rows == have:
        return known
    if rows > have and rows % have == 0:
        return TokenModality(known.mask.repeat_interleave(rows // have, dim=0), known.runs)
    if all(run.kind != Kind.MIXED for run in known.runs):
        return TokenModality(known.mask[:1].expand(rows, -1), known.runs)
    raise InputError(
        f"the cache went from {have} to {rows} rows that differ in modality; select rows before filling it"
    )


def track_positions(cache: Cache, layer_idx: int, new: torch.Tensor, total: int) -> torch.Tensor:
    """Positions of the first `total` tokens `[A, B, total]`, of which a layer has just added the `new`
    `[A, B, T]`, and remember them: kept where the modality is, once for all layers.

    Raises `InputError` for a cache that was filled by another model.
    """
    holder: Any = _holder(cache)
    known: Any = getattr(holder, "positions", None)
    count = new.shape[-1]
    if isinstance(holder, LatentStaticLayer):
        if known is None:
            known = new.new_zeros(*new.shape[:2], static_room(holder))
            keep_address(known)
            holder.positions = known
        last = torch.arange(count, device=new.device) + (static_length(cache.layers[layer_idx]) - count)
        known.index_copy_(2, last, new)
        return known[..., :total]
    past = total - count
    if past and (known is None or known.shape[-1] < past or new.shape[1] % known.shape[1]):
        raise InputError(
            f"the cache holds {past} tokens of unknown positions; give one that this model filled"
        )
    if past:
        known = known[..., :past].repeat_interleave(new.shape[1] // known.shape[1], dim=1)
        new = torch.cat([known, new], dim=-1)
    holder.positions = new
    return new


def bytes_per_token(config: Any, *, itemsize: int = 2, original: bool = False) -> int:
    """Bytes that a token adds to the cache, over all layers, for `itemsize` bytes an element.

    `config` is that of an original model, `2 * G * D` elements a layer, or of a converted one,
    `G * R + r` elements in the layers that are, or r and once the positions where keys are rotated at read;
    without factorisation r is `G * (2 * D - R)`. Latents of integers take the bytes of their bits. With
    `original` they are those of the model that a converted one was made of.
    """
    sizes = AttentionSizes.of(config)
    values = getattr(config, "mla", None)
    if values is None or original:
        return len(sizes.growing) * sizes.numbers_per_token * itemsize
    return MLAConfig.from_dict(values).token_bytes(sizes, itemsize)


def cache_bytes(cache: Cache, *, allocated: bool = False) -> int:
    """Bytes of the tensors in a cache: of its tokens, or with `allocated` of the storage behind them.

    Counts latents, rotated keys and positions, if quantised with their ranges: what grows with tokens. What
    other layers keep is in `state.state_bytes`. The modality of tokens adds a byte for each token of the
    sequence, once for all layers, which is not counted.
    """
    tensors = [tensor for layer in cache.layers for tensor in _stored(layer)]
    positions = (getattr(holder, "positions", None) for holder in (cache, *cache.layers))
    tensors += [x for x in positions if x is not None]
    if allocated:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors that a cache layer holds, of ours or of transformers' quantised ones."""
    if hasattr(layer, "tensors"):
        yield from layer.tensors()
        return
    if getattr(layer, "is_sliding", False):
        return
    for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
        yield from _tensors_in(getattr(layer, name, None))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Plain tensors in tuples, dicts and tensors that are made of others."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors_in(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)
