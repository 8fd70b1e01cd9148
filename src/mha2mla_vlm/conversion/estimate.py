"""What a conversion will take, estimated before it starts: from the config, the headers of the shards
and one layer of random numbers that is converted on this machine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, BatchFeature, PreTrainedModel

from mha2mla_vlm.calibration.activations import advance
from mha2mla_vlm.config import FULL, AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.allocation import budget_units, dims_in_unit, most_latent
from mha2mla_vlm.conversion.choice import possible
from mha2mla_vlm.conversion.config import AUTO, ConversionConfig
from mha2mla_vlm.conversion.layer import LayerwiseConversion
from mha2mla_vlm.conversion.on_disk import rest_shards
from mha2mla_vlm.conversion.pipeline import encode_split
from mha2mla_vlm.conversion.plan import check_attention, is_allocated, plan
from mha2mla_vlm.conversion.profile import SKETCHES, LayerwiseProfile
from mha2mla_vlm.conversion.weights import converted_config
from mha2mla_vlm.conversion.work import MemoryWork
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.checkpoint import load_config, load_processor, resolve
from mha2mla_vlm.model.files import check_weights
from mha2mla_vlm.model.modeling import decoder_layers, layer_prefixes
from mha2mla_vlm.model.offload import empty_model, front_modules, stored_names
from mha2mla_vlm.utils.compat import reshaped_names
from mha2mla_vlm.utils.memory import forget_peak, peak_resident_bytes, resident_bytes
from mha2mla_vlm.utils.progress import Phases
from mha2mla_vlm.utils.remote import DTYPES, remote_headers

WRITE_RATE = 500e6  # bytes a second, of an ordinary disk
SMALL_VOCABULARY = 16
ROUNDS = 2  # of what each chat takes, of which the faster counts: something else may have run


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes a token takes in the cache before and after (in the model's dtype), bytes of the
    result and of temporary files, peak memory (None where Linux does not report it), and seconds.
    """

    bytes_per_token: int
    bytes_per_token_original: int
    output_bytes: int
    states_bytes: int
    peak_bytes: int | None
    seconds: float
    phases: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def predict(
    name: str | Path,
    records: Sequence[Record],
    config: ConversionConfig = ConversionConfig(),
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> Prediction:
    """Estimate what `on_disk.convert_checkpoint` takes; raises `InputError` for what it would refuse."""
    source = resolve(name)
    model_config = load_config(name)
    plan(model_config, config)
    if getattr(model_config, "mla", None) is not None:
        raise InputError(
            f"{str(name)!r} has partial RoPE already; only conversions of originals can be estimated"
        )
    if Path(source).is_dir():
        check_weights(Path(source))
    sizes, original = AttentionSizes.of(model_config), empty_model(model_config)
    number = _stored_dtype(source, sizes.growing[0]) if dtype == "auto" else getattr(torch, dtype)
    check_attention(original)
    chats = encode_split(original, load_processor(name), records, config)
    config = possible(original, config, chats.lacks).config
    mla, allocated = plan(model_config, config), is_allocated(model_config, config)
    if allocated:
        mla = _evenly(mla, sizes, config).over_all(sizes)
    converted = empty_model(converted_config(model_config, mla))
    first, parts = chats.calibration[0], (chats.calibration, chats.held_out, chats.calibration[:1])
    tokens, others, timed = (sum(chat["input_ids"].shape[1] for chat in part) for part in parts)
    target, base = torch.device(device), resident_bytes() or 0
    phases, peak, kept = _one_layer(
        model_config, config, _of_one(mla, sizes), first, number, target, allocated=allocated
    )
    output_bytes = _bytes(converted, stored_names(converted), number)
    counts = _counts(model_config, sizes, tokens / timed, others / timed, len(config.tried_bits))
    seconds = {phase: taken * counts.get(phase, len(sizes.growing)) for phase, taken in phases.items()}
    seconds["writing"] = (output_bytes + len(sizes.growing) * kept) / WRITE_RATE
    # all layers' states stay until their gradients have come down; else those of two layers are there
    hidden = (sizes.layers + 2 * SKETCHES) * tokens if allocated else 2 * (tokens + 3 * others)
    return Prediction(
        bytes_per_token=bytes_per_token(converted.config, itemsize=number.itemsize),
        bytes_per_token_original=bytes_per_token(model_config, itemsize=number.itemsize),
        output_bytes=output_bytes,
        states_bytes=hidden * sizes.hidden * number.itemsize
        + len(sizes.growing) * kept
        + _bytes(original, reshaped_names(original), number),
        peak_bytes=None if peak is None else _most_memory(original, number, base, peak),
        seconds=sum(seconds.values()),
        phases=seconds,
    )


def _counts(
    config: Any, sizes: AttentionSizes, calibration: float, held_out: float, ways: int
) -> dict[str, float]:
    """How often phases do what was timed, with chats that are so many times as long together as the one that
    was timed, and `ways` to keep latents, of which each is converted where it is not clear which is best;
    others do it once for each layer that is converted.
    """
    measured = dict.fromkeys(("calibration", "sensitivity"), calibration * sizes.layers)
    made = dict.fromkeys(("partial RoPE", "factorisation"), float(ways * len(sizes.growing)))
    seen = (calibration + ways * held_out) * _vision_depth(config)
    return {
        **measured,
        **made,
        "held-out loss": ways * held_out * sizes.layers,
        "vision and embeddings": seen,
    }


def _stored_dtype(source: str, layer: int) -> torch.dtype:
    """The dtype of a decoder layer's attention, from the headers of the shards."""
    for header in _headers(source):
        for key, dtype in header:
            if f".layers.{layer}." in key and key.endswith("q_proj.weight"):
                return DTYPES[dtype]
    raise InputError(f"{source} holds no decoder layer")


def _headers(source: str) -> Iterator[list[tuple[str, str]]]:
    """Names and dtypes in each shard, of a folder or on the hub."""
    if not Path(source).is_dir():
        for _, _, header in remote_headers(source):
            yield [(key, entry["dtype"]) for key, entry in header.items() if "dtype" in entry]
        return
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield [(key, file.get_slice(key).get_dtype()) for key in file.keys()]  # noqa: SIM118 (not a dict)


def _bytes(model: PreTrainedModel, names: Sequence[str], number: torch.dtype) -> int:
    state = model.state_dict()
    kinds = {name: number if state[name].is_floating_point() else state[name].dtype for name in names}
    return sum(state[name].numel() * kind.itemsize for name, kind in kinds.items())


def _most_memory(model: PreTrainedModel, number: torch.dtype, base: int, peak: int) -> int:
    """The most that a process takes which held `base` before it converted one layer of random numbers, and
    `peak` in that: before the first layer, over a layer, of which the file it is read from is in memory as
    well, or while a shard is written.
    """
    own = {id(m): name for name, m in model.named_modules()}
    embeddings = id(model.get_input_embeddings())
    prefixes = tuple(own[id(m)] + "." for m in front_modules(model) if id(m) != embeddings and own[id(m)])
    names = stored_names(model)
    direct = [name for name in names if name.rpartition(".")[0] + "." in prefixes]
    shards = [_bytes(model, shard, number) for shard in rest_shards(model)]
    layer = max(
        _bytes(model, [name for name in names if name.startswith(prefix)], number)
        for prefix in layer_prefixes(model)
    )
    return max(peak + layer, base + max(_bytes(model, direct, number), *shards))


def _vision_depth(config: Any) -> int:
    depths = (getattr(config.vision_config, name, None) for name in ("depth", "num_hidden_layers"))
    return next((depth for depth in depths if depth), 1)  # Gemma 4 12B has no tower


def _one_layer(
    model_config: Any,
    config: ConversionConfig,
    mla: MLAConfig,
    batch: BatchFeature,
    number: torch.dtype,
    device: torch.device,
    *,
    allocated: bool,
) -> tuple[dict[str, float], int | None, int]:
    """Seconds of each phase for one chat and one layer, of vision too, the most memory, and the bytes of
    what is kept of a layer to allocate sizes.
    """
    known = forget_peak()
    model = AutoModelForImageTextToText.from_config(_small(model_config), dtype=number).to(device).eval()
    phases = Phases("timing one layer", 1)
    chat, work = _renamed(batch, model_config), MemoryWork()
    rounds: list[dict[str, float]] = []
    given: dict[str, Any] = {"device": device, "phases": phases}
    with phases:
        simplest = config.keeping(config.tried_bits[0])
        timed = LayerwiseConversion(model, simplest, mla, **given, work=MemoryWork(), warn=False)
        timed.begin([chat], [chat])
        phases.seconds.clear()
        advance(decoder_layers(model)[0], 0, timed.held_out, timed.states, "original")  # the first is slow
        if allocated:
            for _ in range(ROUNDS):
                phases.seconds.clear()
                work = MemoryWork()
                profile = LayerwiseProfile(model, config, mla, **given, work=work).run([chat], config)
                rounds.append(dict(phases.seconds))
            phases.seconds |= {phase: min(each[phase] for each in rounds) for phase in rounds[0]}
            timed.known = profile.layers.__getitem__
        timed.begin([chat], [chat])
        timed.layer(0)
    phases.seconds["vision and embeddings"] /= 2  # chats
    kept = sum(x.numel() * x.element_size() for x in work.kept("layer 0").values()) if allocated else 0
    return phases.seconds, peak_resident_bytes() if known else None, kept


def _evenly(mla: MLAConfig, sizes: AttentionSizes, config: ConversionConfig) -> MLAConfig:
    """Sizes as a budget may give them, the same in every layer: two of three dims for RoPE, if cached.

    Where modes are chosen, all at read, which takes longest.
    """
    if config.rotate_at == AUTO:
        return _evenly(mla, sizes, config.of("read"))
    unit = dims_in_unit(sizes, config)
    units = budget_units(sizes, config) // len(sizes.growing)
    if config.bits_by_channel:  # of 4 bits; rotated keys that are cached have 8
        if not config.at_read:
            rope = (config.qk_rope_head_dim or 0) // (2 * unit) or units - max(1, units // 3)
            rope = min(rope, sizes.rotary_dim // (2 * unit))
            mla, units = replace(mla, qk_rope_head_dim=2 * rope * unit), units - rope
        most = most_latent(sizes, 0 if config.at_read else sizes.rotary_dim)
        rank = min(4 * units * unit, most // 2 * 2) * sizes.kv_heads
        bits: list[list[int] | None] = [[0, 0, rank, 0]] * sizes.layers
        return replace(mla, kv_lora_rank=rank, latent_bits=bits, kv_bias=True)
    if config.at_read:
        return replace(mla, kv_lora_rank=units * unit * sizes.kv_heads)
    rope = (config.qk_rope_head_dim or 0) // unit or units - (
        (config.d_kv or 0) // unit or max(1, units // 3)
    )
    rope = min(rope, sizes.rotary_dim // unit)
    return replace(mla, qk_rope_head_dim=rope * unit, kv_lora_rank=(units - rope) * unit * sizes.kv_heads)


def _of_one(mla: MLAConfig, sizes: AttentionSizes) -> MLAConfig:
    """The same of a model with one layer, which is converted."""
    spec = mla.layer(sizes.growing[0])
    assert spec is not None, "a layer that is converted"
    one: dict[str, Any] = {"qk_rope_head_dim": spec.rope_dim, "kv_lora_rank": spec.rank}
    one["latent_bits"] = None if spec.bits is None else [list(spec.bits)]
    return replace(mla, rotate_at=spec.rotate_at, **one)


def _small(config: Any) -> Any:
    """The config with one layer, which is converted, and one of vision, and hardly a vocabulary."""
    values = config.to_dict()
    text, vision = values["text_config"], values["vision_config"]
    text |= {"num_hidden_layers": 1, "vocab_size": SMALL_VOCABULARY, "bos_token_id": None}
    text |= {"eos_token_id": None, "pad_token_id": 0}
    if text.get("layer_types"):
        text["layer_types"] = [FULL]
    if own := text.get("per_layer_config"):
        text["per_layer_config"] = {0: own[str(AttentionSizes.of(config).growing[0])]}
    vision |= dict.fromkeys({"depth", "num_hidden_layers"} & vision.keys(), 1)
    for number, name in enumerate(_token_names(values)):
        values[name] = 2 + number
    return type(config)(**values)


def _token_names(values: dict[str, Any]) -> list[str]:
    """Fields of a config that hold the ids of special tokens."""
    ends = ("_token_id", "_token_index")
    return [name for name, value in values.items() if name.endswith(ends) and type(value) is int]


def _renamed(batch: BatchFeature, config: Any) -> BatchFeature:
    """A chat in the tokens of `_small`, of which 1 is any other."""
    values = config.to_dict()
    ids = torch.ones_like(batch["input_ids"])
    for number, name in enumerate(_token_names(values)):
        ids[batch["input_ids"] == values[name]] = 2 + number
    return BatchFeature({**batch, "input_ids": ids})


def prediction_table(prediction: Prediction) -> Table:
    """The figures as a table."""
    table = Table(title="estimate", show_header=False)
    share = prediction.bytes_per_token / prediction.bytes_per_token_original
    cache = f"{prediction.bytes_per_token_original:,} to {prediction.bytes_per_token:,} ({share:.1%})"
    rows = {
        "cache bytes per token": cache,
        "result": decimal(prediction.output_bytes),
        "disk meanwhile": decimal(prediction.states_bytes),
        "memory": "unknown" if prediction.peak_bytes is None else decimal(prediction.peak_bytes),
        "time": _time(prediction.seconds),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for phase, seconds in prediction.phases.items():
        table.add_row(f"  {phase}", _time(seconds))
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.1f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
