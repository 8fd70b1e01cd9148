"""A decoding step of the attention layers only, original against converted, over caches of random numbers.

Shapes: B batch, S cached tokens, H query heads, G KV heads, D head dim, R rope dims, r latent dims.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, Cache, PreTrainedModel

from mha2mla_vlm.algorithms.rounding import rounded
from mha2mla_vlm.bench.context import modality_of, multimodal, positions_of
from mha2mla_vlm.bench.dense import Dense, dense_ways
from mha2mla_vlm.bench.timing import Timing, time_in_turn
from mha2mla_vlm.config import AttentionSizes, LatentBits
from mha2mla_vlm.model.cache.latent import LatentCache, hold_latents, remember_modality, track_positions
from mha2mla_vlm.model.cache.packed import pack, stored_tokens
from mha2mla_vlm.model.cache.quantized import quantized_cache
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.modeling import attention_of, decoder_layers, latent_attentions, text_model
from mha2mla_vlm.model.positions import RecordingRotary, Rotation, TokenPositions
from mha2mla_vlm.model.rebuilt import Angles
from mha2mla_vlm.utils.compat import (
    attention_name,
    cache_argument,
    of_full_attention,
    set_attention_name,
    takes_layer_type,
    unshared,
)

OURS, LATER = "ours", "ours, later layers"
Rows = dict[str, Timing]
Shape = tuple[int, ...]


def random_cache(
    shapes: Sequence[tuple[Shape, Shape] | None],
    like: torch.Tensor,
    cache: LatentCache | None = None,
    bits: Sequence[LatentBits | None] = (),
) -> LatentCache:
    """A cache whose layers hold random tensors of these shapes, those with `bits` in bytes, and nothing where
    the shape is None; its buffers grow in steps in any case.
    """
    cache = LatentCache() if cache is None else cache  # an empty one is false
    for index, (shapes_of, own) in enumerate(itertools.zip_longest(shapes, bits)):
        if shapes_of is None:
            continue
        keys, values = (_random(shape, like) for shape in shapes_of)
        if own is not None:
            keys, values = pack(rounded(keys, own), own), values.to(torch.int8)
        cache.update(keys, values, index)
    return cache


def _random(shape: Shape, like: torch.Tensor) -> torch.Tensor:
    """Random numbers `[B, heads, S, width]`, the same every thousand tokens: drawing all takes minutes."""
    some = like.new_empty(*shape[:2], min(shape[2], 1024), shape[3]).normal_()
    return some.repeat(1, 1, -(-shape[2] // some.shape[2]), 1)[:, :, : shape[2]]


def random_caches(
    converted: PreTrainedModel, context: int, batch: int, quantization: dict[str, Any] | None = None
) -> tuple[LatentCache, LatentCache]:
    """Caches of `context` tokens, of keys and values `[B, G, S, D]` and of latents and rotated keys.

    Layers of sliding windows hold keys and values in both, those of linear attention nothing yet.
    """
    sizes = AttentionSizes.of(converted.config)
    like = latent_attentions(decoder_layers(converted))[0].q_proj.weight
    heads, specs = sizes.kv_heads, converted.mla_config.layers(sizes)
    text = converted.config.get_text_config(decoder=True)
    dense = list[tuple[Shape, Shape] | None]()
    for index, layer in enumerate(decoder_layers(converted)):
        own = AttentionSizes.of_text(text, index)
        whole = (batch, own.kv_heads, context, own.head_dim)
        dense.append(None if attention_of(layer) is None else (whole, whole))
    latent = list(dense)
    for index, spec in enumerate(specs):
        if spec is not None:
            rank, rope = spec.widths(sizes)
            latent[index] = (batch, 1, context, rank), (batch, heads, context, rope // heads)
    empty = LatentCache() if quantization is None else quantized_cache(**quantization)
    hold_latents(empty, [spec is not None for spec in specs], text)
    bits = [spec and spec.bits if empty.holds_rows else None for spec in specs]
    plain = LatentCache()
    hold_latents(plain, [index in sizes.growing for index in range(sizes.layers)], text)
    caches = random_cache(dense, like, plain), random_cache(latent, like, empty, bits)
    for layer in (layer for cache in caches for layer in cache.layers if getattr(layer, "is_sliding", False)):
        layer.activate_past_recording()  # for `forget_last`
    remember_modality(caches[1], modality_of(context, batch, like.device))
    if any(spec is not None and spec.at_read for spec in specs):
        track_positions(caches[1], 0, positions_of(converted, context, batch, like.device).int(), context)
    return caches


def forget_last(cache: Cache, layers: Sequence[int]) -> None:
    """Take the last token off these layers."""
    for index in layers:
        cache.layers[index].crop(-1)


@torch.no_grad()
def time_attention(
    converted: PreTrainedModel,
    dense: LatentCache,
    latent: LatentCache,
    seconds: float,
    *,
    interpolate: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Rows:
    """Attention only, from queries to the heads' outputs, over converted layers: each dense way, and ours.

    Ours includes what the up projections cost, which the original has behind it. Where keys are rotated at
    read, `ours, later layers` is without what the first layer of a step makes for all. Without
    `interpolate`, all those keys are made of latents.
    """
    modules = latent_attentions(decoder_layers(converted))
    first = modules[0]
    like = dense.layers[first.layer_idx].keys
    batch = len(like)
    theirs, own = ([cache.layers[m.layer_idx] for m in modules] for cache in (dense, latent))
    queries = [like.new_empty(batch, first.heads, 1, first.head_dim).normal_() for _ in modules]
    split = [q.split([m.rope_dim, m.nope_dim], dim=-1) for q, m in zip(queries, modules, strict=True)]

    def originally(way: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for q, layer in zip(queries, theirs, strict=True):
                way(q, layer.keys, layer.values, first.scaling)

        return run

    places = positions_of(converted, dense.get_seq_length(), batch, like.device)

    def through(turns: Rotation | None) -> None:
        for (q_rope, q_nope), module, layer in zip(split, modules, own, strict=True):
            angles = None
            if turns is not None and module.at_read:
                given = Angles.of(turns, module.rope_pairs)
                angles = given if interpolate else Angles(given.cos, given.sin, given.pairs)
            known = (latent.token_modality, None, None, angles)
            module.attend_absorbed(stored_tokens(layer, module.bits, like.dtype), q_rope, q_nope, *known)

    ways = {name: originally(way) for name, way in dense_ways(like.device).items()}
    ways[OURS] = lambda: through(_rotation(converted, places, like))
    if (kept := _rotation(converted, places, like)) is not None:
        ways[LATER] = lambda: through(kept)
    return time_in_turn(ways, device=like.device, seconds=seconds, clock=clock, captured=True)


def _rotation(converted: PreTrainedModel, places: torch.Tensor, like: torch.Tensor) -> Rotation | None:
    """What a step makes of the positions of its tokens, once for all layers that rotate at read."""
    if not converted.model.reads_positions:
        return None
    text = text_model(converted)
    return Rotation(text.rotary_emb.of_full_attention, places, like, text.config)


def _with_new_text(latent: LatentCache, batch: int, device: torch.device) -> TokenModality:
    """The modality of cached tokens, the last of which is text that comes anew."""
    known = latent.token_modality
    assert known is not None, "random_caches gives it"
    new = TokenModality.of_text(batch, 1, device)
    return known.part(0, known.mask.shape[1] - 1).extend(new)


@torch.no_grad()
def time_layers(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    dense: LatentCache,
    latent: LatentCache,
    seconds: float,
) -> Rows:
    """Attention modules with their projections and the writing of the cache, over all layers that grow."""
    sizes = AttentionSizes.of(original.config)
    like = dense.layers[sizes.growing[0]].keys
    context, device = dense.get_seq_length(), like.device
    hidden = like.new_empty(like.shape[0], 1, converted.config.get_text_config().hidden_size).normal_()
    embeddings = {model: rotary_tables(model, hidden, context - 1) for model in (original, converted)}
    modality = _with_new_text(latent, len(like), device)

    def through(model: PreTrainedModel, cache: LatentCache, **kwargs: Any) -> Callable[[], None]:
        def run() -> None:
            forget_last(cache, sizes.growing)  # so that the new one is the last that fits; buffers are dense
            if model is converted and converted.model.reads_positions:
                kwargs["token_positions"] = TokenPositions(text_model(converted).rotary_emb)
            for index in sizes.growing:
                attention = decoder_layers(model)[index].self_attn
                attention(
                    hidden_states=hidden,
                    position_embeddings=embeddings[model],
                    attention_mask=None,
                    **cache_argument(cache),
                    **unshared(attention),
                    **kwargs,
                )

        return run

    config = original.config.get_text_config(decoder=True)
    default = attention_name(config)

    def originally(way: str) -> Callable[[], None]:
        run = through(original, dense)

        def with_way() -> None:
            set_attention_name(config, way)  # read at each call
            run()

        return with_way

    ways = {name: originally(_interface(name, way)) for name, way in dense_ways(device).items()}
    ways |= {default: originally(default), OURS: through(converted, latent, token_modality=modality)}
    times = time_in_turn(ways, device=device, seconds=seconds)
    set_attention_name(config, default)
    return times


def _interface(name: str, way: Dense) -> str:
    """A dense way under a name that transformers' attention modules know."""

    def attend(
        _: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        return way(q, k, v, scaling).transpose(1, 2).contiguous(), None

    key = f"bench_{name.replace(' ', '_')}"
    AttentionInterface.register(key, attend)
    return key


def rotary_tables(model: PreTrainedModel, hidden: torch.Tensor, position: int) -> Any:
    """Rotary tables of one new token at `position`."""
    where = positions(model, torch.full(hidden.shape[:2], position, device=hidden.device))
    rotary = text_model(model).rotary_emb
    inner = rotary.rotary if isinstance(rotary, RecordingRotary) else rotary
    return (of_full_attention(rotary) if takes_layer_type(inner) else rotary)(hidden, where)


def positions(model: PreTrainedModel, places: torch.Tensor) -> torch.Tensor:
    """Places `[B, T]` of tokens as the model takes them: three times for multimodal RoPE."""
    return places.expand(3, -1, -1) if multimodal(model) else places


def best_dense(times: Rows) -> str:
    """The fastest of the original's ways."""
    return min((name for name in times if name not in (OURS, LATER)), key=lambda name: times[name].median)
