"""The latent cache, the modality of its tokens, and the only places that count its bytes.

Shapes: B batch, T new tokens, S all tokens, G KV heads, R rope dims per head, r latent dims.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Self

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.errors import InputError

GROWTH = 32  # tokens by which buffers grow
MAX_RUNS = 32  # more runs than this cost more in launches than they save in arithmetic


class Kind(IntEnum):
    """Modality of a run of token positions over the rows of a batch."""

    TEXT = 0
    MIXED = 1  # text in some rows, visual in others
    VISION = 2


class Run(NamedTuple):
    """Token positions `start` to `stop` of one kind."""

    start: int
    stop: int
    kind: Kind


@dataclass(frozen=True)
class TokenModality:
    """Which tokens are visual: `mask [B, S]`, and the same as runs along S.

    Visual tokens come in few contiguous runs, so attention works run by run on views instead of
    gathering tokens; only where rows of a batch differ (padding, other images) it needs the mask.
    """

    mask: torch.Tensor
    runs: tuple[Run, ...]
    new: "TokenModality | None" = None  # the last of these tokens, where others were cached before

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Self:
        """Find the runs of a mask; waits for the device once."""
        code = (mask.any(0).long() + mask.all(0).long()).cpu()
        kinds, lengths = torch.unique_consecutive(code, return_counts=True)
        runs, start = [], 0
        for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            runs.append(Run(start, start + length, Kind(kind)))
            start += length
        return cls(mask, _few(runs))

    def part(self, start: int, stop: int) -> "TokenModality":
        """The tokens from `start` to `stop`."""
        return TokenModality(self.mask[:, start:stop], runs_between(self.runs, start, stop))

    def extend(self, new: "TokenModality") -> "TokenModality":
        """These tokens followed by `new`."""
        length = self.mask.shape[1]
        runs = list(self.runs)
        for start, stop, kind in new.runs:
            if runs and runs[-1].kind == kind and kind != Kind.MIXED:
                runs[-1] = Run(runs[-1].start, stop + length, kind)
            else:
                runs.append(Run(start + length, stop + length, kind))
        return TokenModality(torch.cat([self.mask, new.mask.to(self.mask.device)], dim=1), _few(runs), new)


def runs_between(runs: Sequence[Run], start: int, stop: int) -> tuple[Run, ...]:
    """The runs of the tokens from `start` to `stop`, counted from there."""
    return tuple(
        Run(max(a, start) - start, min(b, stop) - start, k) for a, b, k in runs if a < stop and b > start
    )


def _few(runs: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(runs) if len(runs) <= MAX_RUNS else (Run(0, runs[-1].stop, Kind.MIXED),)


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

    Both are views of buffers that grow in steps, so that a new token does not copy the old ones.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents and rotated keys; returns all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # in-place writes break autograd
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
        self._buffers = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)
        self._buffers = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def offload(self) -> None:
        """Move to the CPU, buffers included."""
        super().offload()
        self._buffers = None


class LatentCache(DynamicCache):
    """The cache that converted models use in `generate` when none is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers: list[LatentLayer] = []
        self.layer_class_to_replicate = LatentLayer
        self.token_modality: TokenModality | None = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)
        self._select_modality(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._select_modality(indices)

    def _select_modality(self, rows: torch.Tensor) -> None:
        if self.token_modality is not None:
            mask = self.token_modality.mask
            self.token_modality = TokenModality(mask[rows.to(mask.device)], self.token_modality.runs)


class LatentStaticLayer(StaticLayer):
    """A layer of fixed room, for `torch.compile`: latents `[B, 1, room, r]`, keys `[B, G, room, R]`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As transformers does, but keys and values differ in their number of heads."""
        super().lazy_initialization(key_states, value_states[:, :1])
        shape = (*value_states.shape[:2], self.max_cache_len, value_states.shape[-1])
        self.values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write latents and rotated keys; returns the whole room, or a prompt alone if it is the first."""
        first = not self.is_initialized
        whole = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if first else whole


def hold_latents(cache: StaticCache) -> None:
    """Make an empty static cache, which transformers sizes for keys and values, one of latents.

    Raises `InputError` if it is not empty, or not of plain layers.
    """
    if all(isinstance(layer, LatentStaticLayer) for layer in cache.layers):
        return
    if any(type(layer) is not StaticLayer or layer.is_initialized for layer in cache.layers):
        raise InputError(
            "this static cache was set up for keys and values; give a new StaticCache(config, max_cache_len)"
        )
    cache.layers = [LatentStaticLayer(max_cache_len=layer.max_cache_len) for layer in cache.layers]


def filled_length(cache: Cache, layer_idx: int) -> torch.Tensor | None:
    """Tokens in a layer that returns its whole room; None for others, whose tensors are their tokens."""
    layer = cache.layers[layer_idx]
    return layer.cumulative_length if isinstance(layer, LatentStaticLayer) else None


def track_modality(cache: Cache | None, new_mask: torch.Tensor) -> TokenModality:
    """Modality of all tokens, the cached and the new ones of `new_mask [B, T]`, and remember it.

    It is kept on the cache, whatever class that has, and cut to the cache's length first: cropping
    and beam search only ever remove or repeat generated tokens, which are text. Selecting rows that
    differ needs a `LatentCache`, whose modality follows. Raises `InputError` for a cache whose rows
    or tokens were not filled through this model.
    """
    if isinstance(cache, StaticCache):
        return _track_static(cache, new_mask)
    new = TokenModality.from_mask(new_mask)
    if cache is None:
        return new
    past = cache.get_seq_length()
    if past:
        known: TokenModality | None = getattr(cache, "token_modality", None)
        if known is None or known.mask.shape[1] < past:
            raise InputError(
                f"the cache holds {past} tokens of unknown modality; give one that this model filled"
            )
        new = _match_rows(known.part(0, past), new_mask.shape[0]).extend(new)
    cache.token_modality = new
    return new


def _track_static(cache: StaticCache, new_mask: torch.Tensor) -> TokenModality:
    """As `track_modality`, with one mask for the whole room and without waiting for the device.

    Which tokens are visual is then known on the device alone, so all are of kind MIXED but for those of
    a prompt that is the first.
    """
    room, new = cache.layers[0].max_cache_len, new_mask.shape[1]
    if not cache.layers[0].is_initialized:
        mask = torch.zeros(len(new_mask), room, dtype=torch.bool, device=new_mask.device)
        mask[:, :new] = new_mask
        torch._dynamo.mark_static_address(mask)
        first = TokenModality.from_mask(new_mask)
        rest = (Run(new, room, Kind.MIXED),) if new < room else ()
        cache.token_modality = TokenModality(mask, (Run(0, room, Kind.MIXED),))
        return TokenModality(mask, (*first.runs, *rest), first)
    known: TokenModality | None = getattr(cache, "token_modality", None)
    if known is None or len(known.mask) != len(new_mask):
        raise InputError("the static cache holds tokens of unknown modality; give one that this model filled")
    positions = torch.arange(new, device=new_mask.device) + cache.layers[0].cumulative_length
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


def bytes_per_token(config: Any, *, itemsize: int = 2, original: bool = False) -> int:
    """Bytes that a token adds to the cache, over all layers, for `itemsize` bytes an element.

    `config` is that of an original model, `2 * G * D` elements a layer, or of a converted one,
    `G * R + r` elements; without factorisation r is `G * (2 * D - R)`. With `original` they are those
    of the model that a converted one was made of.
    """
    sizes = AttentionSizes.of(config)
    values = getattr(config, "mla", None)
    if values is None or original:
        return sizes.layers * 2 * sizes.kv_heads * sizes.head_dim * itemsize
    mla = MLAConfig.from_dict(values)
    elements = 0
    for rope, rank in map(mla.layer, range(sizes.layers)):
        elements += sizes.kv_heads * rope
        elements += sizes.kv_heads * (2 * sizes.head_dim - rope) if rank is None else rank
    return elements * itemsize


def cache_bytes(cache: Cache, *, allocated: bool = False) -> int:
    """Bytes of the tensors in a cache: of its tokens, or with `allocated` of the storage behind them.

    Counts latents and rotated keys, if quantised with their ranges. The modality of tokens adds one byte
    for each token of the sequence, once for all layers, which is not counted.
    """
    tensors = [tensor for layer in cache.layers for tensor in _stored(layer)]
    if allocated:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors that a cache layer holds, of ours or of transformers' quantised ones."""
    if hasattr(layer, "tensors"):
        yield from layer.tensors()
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
