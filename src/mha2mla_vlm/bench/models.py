"""A converted model beside its original, over contexts and batch sizes: bytes, seconds and memory.

All ratios are the original's figure over the converted model's: above 1 is a gain.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from mha2mla_vlm.bench.context import modality_of
from mha2mla_vlm.bench.layers import (
    LATER,
    OURS,
    best_dense,
    forget_last,
    positions,
    random_caches,
    time_attention,
    time_layers,
)
from mha2mla_vlm.bench.timing import Timing, peak_memory, time_in_turn
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import LatentCache, bytes_per_token, cache_bytes
from mha2mla_vlm.model.modeling import attention_of, decoder_layers, latent_attentions
from mha2mla_vlm.utils.compat import cache_argument
from mha2mla_vlm.utils.machine import device_name
from mha2mla_vlm.utils.progress import track

logger = logging.getLogger(__name__)
CONTEXTS = (1024, 4096, 16384, 65536)
BATCHES = (1, 8)
PREFILL_LIMIT = {"cpu": 4096, "cuda": 65536}  # tokens of a prompt that is timed: it grows with their square
ROOM = 0.5  # share of the free memory that two caches may take


def bench_models(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    *,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    seconds: float = 2.0,
    quantization: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Rows over all contexts and batch sizes that memory allows, and on what they were measured.

    `seconds` is the time for each comparison, `quantization` a `QuantizationConfig` for the converted
    model's cache, as keyword arguments. Raises `InputError` if the models are not of one shape.
    """
    check_pair(original, converted)
    cases = [(context, batch) for batch in batches for context in contexts]
    rows = []
    for context, batch in track(cases, "measuring"):
        if reason := _too_large(original, converted, context, batch):
            if len(cases) > 1:
                logger.warning("left out %d tokens in a batch of %d: %s", context, batch, reason)
            continue
        rows.append(bench_row(original, converted, context, batch, seconds, quantization))
    if not rows:
        raise InputError(_nothing_fits(original, converted, min(batches)))
    device = next(converted.parameters()).device
    return {"rows": rows, "device": device_name(device), "dtype": str(converted.dtype).removeprefix("torch.")}


def check_pair(original: PreTrainedModel, converted: PreTrainedModel) -> None:
    """Raise `InputError` unless the second is a conversion of a model like the first."""
    if getattr(converted.config, "mla", None) is None:
        raise InputError(f"{converted.config.model_type} is not a converted model; convert it first")
    specs = converted.mla_config.layers(AttentionSizes.of(converted.config))
    if any(spec is not None and spec.rank is None for spec in specs):
        raise InputError("this model has only partial RoPE and caches no latents; convert it with --d-kv")
    if getattr(original.config, "mla", None) is not None:
        raise InputError("the baseline is a converted model; give the original")
    sizes = [AttentionSizes.of(model.config) for model in (original, converted)]
    if sizes[0] != sizes[1]:
        raise InputError(f"the models differ in attention: {sizes[0]} and {sizes[1]}")


def bench_row(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    context: int,
    batch: int,
    seconds: float,
    quantization: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All figures for one context and batch size."""
    dense, latent = random_caches(converted, context, batch, quantization)
    layers = decoder_layers(converted)
    attention = time_attention(converted, dense, latent, seconds)
    modules = time_layers(original, converted, dense, latent, seconds)
    row: dict[str, Any] = {"context": context, "batch": batch}
    row |= byte_counts(converted, dense, latent)
    row |= compared("attention", attention, len(latent_attentions(layers)))
    row |= compared("layer", modules, len(AttentionSizes.of(original.config).growing))
    row |= _steps(original, converted, dense, latent, seconds)
    row |= prefill(original, converted, context, batch, seconds)
    return row


def byte_counts(converted: PreTrainedModel, dense: LatentCache, latent: LatentCache) -> dict[str, Any]:
    """What the caches hold, and what the formula says of the converted model's."""
    first = AttentionSizes.of(converted.config).growing[0]
    tokens = len(dense.layers[first].keys) * dense.get_seq_length(first)
    itemsize = dense.layers[first].keys.element_size()
    return {
        "cache_bytes": cache_bytes(latent),
        "cache_bytes_original": cache_bytes(dense),
        "cache_bytes_formula": tokens * bytes_per_token(converted.config, itemsize=itemsize),
        "cache_ratio": cache_bytes(dense) / cache_bytes(latent),
    }


def compared(name: str, times: dict[str, Timing], layers: int) -> dict[str, Any]:
    """Seconds of one layer, and the ratio against the best way of the original."""
    best = best_dense(times)
    return {
        f"{name}_ratio": times[best].median / times[OURS].median,
        f"{name}_baseline": best,
        f"{name}_seconds": _spread(times[OURS], layers),
        f"{name}_seconds_original": {
            n: _spread(t, layers) for n, t in times.items() if n not in (OURS, LATER)
        },
    }


def _spread(timing: Timing, share: int = 1) -> list[float]:
    """Median and quartiles."""
    return [x / share for x in (timing.median, timing.low, timing.high)]


@torch.no_grad()
def _steps(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    keys_and_values: LatentCache,
    latent: LatentCache,
    seconds: float,
) -> dict[str, Any]:
    """A step of the whole models as `generate` takes it: the original over transformers' DynamicCache."""
    growing = AttentionSizes.of(original.config).growing
    like, context = keys_and_values.layers[growing[0]].keys, keys_and_values.get_seq_length()
    device, batch = like.device, len(like)
    dense = DynamicCache(config=original.config)
    for index, layer in enumerate(keys_and_values.layers):
        if index in growing:
            dense.update(layer.keys, layer.values, index)
        else:
            dense.layers[index] = copy.deepcopy(layer)
    steps = {
        "original": _step(original, dense, context, batch),
        "ours": _step(converted, latent, context, batch),
    }
    times = time_in_turn(steps, device=device, seconds=seconds)
    peaks = {}
    for name, step in steps.items():
        with peak_memory(device) as peak:
            step()
        peaks[name] = peak["bytes"]
    return {
        "step_ratio": times["original"].median / times["ours"].median,
        "step_seconds": _spread(times["ours"]),
        "step_seconds_original": _spread(times["original"]),
        "tokens_per_second": batch / times["ours"].median,
        "tokens_per_second_original": batch / times["original"].median,
        "step_peak_bytes": peaks["ours"],
        "step_peak_bytes_original": peaks["original"],
    }


def _step(model: PreTrainedModel, cache: Cache, context: int, batch: int) -> Callable[[], None]:
    """One new token over a cache, which is then as before."""
    inputs = _tokens(model, 1, batch, start=context)
    # linear attention takes tokens into a state, which costs the same whatever is in it
    layers = [i for i, layer in enumerate(decoder_layers(model)) if attention_of(layer) is not None]

    def run() -> None:
        model(**inputs, **cache_argument(cache), use_cache=True)
        forget_last(cache, layers)

    return run


@torch.no_grad()
def prefill(
    original: PreTrainedModel, converted: PreTrainedModel, context: int, batch: int, seconds: float
) -> dict[str, Any]:
    """A prompt of `context` tokens through both; None where it would take too long."""
    device = next(converted.parameters()).device
    if context * batch > PREFILL_LIMIT.get(device.type, PREFILL_LIMIT["cuda"]):
        return {"prefill_ratio": None, "prefill_seconds": None, "prefill_seconds_original": None}

    def whole(model: PreTrainedModel) -> Callable[[], None]:
        inputs = _tokens(model, context, batch)
        return lambda: model(**inputs, use_cache=True, logits_to_keep=1)

    runs = {"original": whole(original), "ours": whole(converted)}
    times = time_in_turn(runs, device=device, seconds=seconds)
    return {
        "prefill_ratio": times["original"].median / times["ours"].median,
        "prefill_seconds": _spread(times["ours"]),
        "prefill_seconds_original": _spread(times["original"]),
    }


def _tokens(model: PreTrainedModel, length: int, batch: int, start: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with visual tokens but no images, for which language models take as long; or one token."""
    device = next(model.parameters()).device
    ids = torch.full((batch, length), 1, device=device)
    if length > 1:
        ids[modality_of(length, batch, device).mask] = model.config.image_token_id
    places = torch.arange(start, start + length, device=device).expand(batch, -1)
    return {"input_ids": ids, "position_ids": positions(model, places)}


def _too_large(original: PreTrainedModel, converted: PreTrainedModel, context: int, batch: int) -> str | None:
    wanted = context * batch * _per_token(original, converted)
    free = free_memory(next(converted.parameters()).device)
    if free is None or wanted <= ROOM * free:
        return None
    return f"the caches take {wanted / 2**30:,.1f} GiB and {free / 2**30:.1f} GiB are free"


def _per_token(original: PreTrainedModel, converted: PreTrainedModel) -> int:
    """Bytes of the caches that are compared."""
    itemsize = converted.dtype.itemsize
    return sum(bytes_per_token(m.config, itemsize=itemsize) for m in (original, original, converted))


def _nothing_fits(original: PreTrainedModel, converted: PreTrainedModel, batch: int) -> str:
    """What would fit instead, and what the model is made for."""
    free = free_memory(next(converted.parameters()).device) or 0
    most = int(ROOM * free) // (batch * _per_token(original, converted))
    made_for = converted.config.get_text_config(decoder=True).max_position_embeddings
    return (
        f"no context fits: the caches may take {ROOM * free / 2**30:,.1f} GiB, that is {most:,} tokens in a "
        f"batch of {batch:,}; the model is made for up to {made_for:,} tokens"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
