"""Conversion of a checkpoint that stays on disk: a layer at a time is read, converted and written."""

import contextlib
import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.choice import possible
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.describe import conversion_summary
from mha2mla_vlm.conversion.driver import Chats, Converted, Sink, run
from mha2mla_vlm.conversion.pipeline import encode_split
from mha2mla_vlm.conversion.plan import check_attention, plan
from mha2mla_vlm.conversion.weights import converted_config, kept_names
from mha2mla_vlm.conversion.work_folder import WorkFolder
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.errors import InputError, reading
from mha2mla_vlm.model.card import write_card
from mha2mla_vlm.model.checkpoint import load, load_config, load_processor, local_folder, resolve
from mha2mla_vlm.model.files import weights_digest, weights_files
from mha2mla_vlm.model.modeling import layer_prefixes, write_findings
from mha2mla_vlm.model.offload import check_shapes, disk_map, empty_model, read_weights, stored_names
from mha2mla_vlm.utils.compat import reshaped_names, tied_names
from mha2mla_vlm.utils.distributed import claimed_by_first, process_count
from mha2mla_vlm.utils.folders import check_output
from mha2mla_vlm.utils.memory import peak_resident_bytes
from mha2mla_vlm.utils.progress import kept, status, track

SHARD_BYTES = 1_000_000_000  # of what lies beside the layers, which have a shard each


@dataclass(frozen=True, kw_only=True)
class StreamedConversion:
    """What was made, the seconds that each phase took, and the most memory that the process held."""

    mla: MLAConfig
    summary: dict[str, Any]
    seconds: dict[str, float]
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**self.summary, "seconds": self.seconds, "peak_bytes": self.peak_bytes}


def convert_checkpoint(
    name: str | Path,
    records: Sequence[Record],
    output: str | Path,
    config: ConversionConfig = ConversionConfig(),
    *,
    resume: bool = False,
    spill: str | Path | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    source: dict[str, str] | None = None,
) -> StreamedConversion:
    """Convert a model folder or hub id to `output`, with one decoder layer in memory at a time.

    What `convert` and `save` would give. A budget takes two more passes over the layers, before they are
    converted, to find what each needs. It works in `OUTPUT.partial`; interrupted at any moment, it is resumed
    there with `resume`. Hidden states of the chats lie there too, or in `spill`. With a `source` the model
    is in a temporary folder, which the result does not name: what `source` says it was made of is in the
    findings. Raises `InputError` for what cannot be converted, and for disks and shards that fail, with the
    work so far kept.
    """
    folder, target = local_folder(name), torch.device(device)
    plan(model_config := load_config(folder), config)
    weights_files(folder)
    processor, named = load_processor(folder), dict[str, Any]()
    if source or not Path(resolve(name)).is_dir():  # on the hub, wherever its files are now
        named["original"] = None if source else _original(model_config, str(name))
    with _room_for_experts(folder, model_config, Path(output)) as options:
        model = _on_disk(folder, model_config, dtype, target, options)
        chats = encode_split(model, processor, records, config)
        possible(model, config, chats.lacks)
        _check_shares(chats)
        given = {"model": str(folder), "config": config.to_dict(), "dtype": str(model.dtype)}
        given["records"] = _digest(chats)  # which encodes each, before any work
        settings = given | {"processes": process_count(), "weights": weights_digest(folder)}
        with claimed_by_first(output):
            work = WorkFolder(Path(output), settings, resume=resume, spill=Path(spill) if spill else None)
            return _convert(model, processor, config, chats, target, work, named, source)


def _convert(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: ConversionConfig,
    chats: Chats,
    device: torch.device,
    work: WorkFolder,
    named: dict[str, Any],
    source: dict[str, str] | None,
) -> StreamedConversion:
    """Convert, from where `work` stopped; `named` are fields of the result's config to be set, and `source`
    takes the place of what the folder of the model says of itself.
    """
    with kept(work.folder, "resume with --resume"):
        found = run(model, config, chats, device=device, work=work, sink=_shards(model, work))
        findings = found.findings | ({"source": source} if source else {})
        found = replace(found, mla=replace(found.mla, **named), findings=findings)
        start = time.perf_counter()
        if work.main:
            with work.writing("the rest of the model"), status("writing the rest of the model"):
                _write_rest(model, processor, found, work)
                write_findings(found.findings, work.result)
        work.seconds["writing"] = work.seconds.get("writing", 0.0) + time.perf_counter() - start
    work.finish()
    return StreamedConversion(
        mla=found.mla,
        summary=conversion_summary(model.config, found.mla, model.dtype, found.findings),
        seconds=dict(work.seconds),
        peak_bytes=peak_resident_bytes(),
    )


def _original(config: Any, name: str) -> str | None:
    """What a model of the hub was made of: itself, unless it is converted."""
    known = getattr(config, "mla", None)
    return known.get("original") if known else name


def _shards(model: PreTrainedModel, work: WorkFolder) -> Sink:
    """Writes each converted layer as a shard of the result."""
    names, prefixes = shard_names(model), layer_prefixes(model)
    return lambda index, made: work.write(names[index], _layer_tensors(model, prefixes[index], made))


@contextlib.contextmanager
def _room_for_experts(folder: Path, config: Any, output: Path) -> Iterator[dict[str, str]]:
    """Within the context, the option that says where transformers writes weights anew which it holds in
    another shape than the checkpoint; nothing where there are none.
    """
    with reading(f"the model in {folder}"):
        rewritten = reshaped_names(empty_model(config))
    if not rewritten:
        yield {}
        return
    path = check_output(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.experts.", dir=path.parent) as room:
        yield {"offload_folder": room}


def _on_disk(
    folder: Path, config: Any, dtype: str, device: torch.device, options: dict[str, str]
) -> PreTrainedModel:
    """The model, whose weights are read as they are needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys")  # of parameters
        with reading(f"the model in {folder}"):
            model = load(folder, dtype=dtype, device_map=disk_map(config, device), **options)
            check_shapes(model)
    check_attention(model)
    return model


def _check_shares(chats: Chats) -> None:
    """Raise `InputError` if a process would have no chats."""
    counts = len(chats.calibration), len(chats.held_out)
    if min(counts) < process_count():
        raise InputError(
            f"{counts[0]} chats to calibrate on and {counts[1]} held out are too few for "
            f"{process_count()} processes; give each one of both"
        )


def _layer_tensors(
    model: PreTrainedModel, prefix: str, made: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a shard holds: a layer's converted attention, and all else in the layer as it was."""
    attention = prefix + "self_attn."
    kept = kept_names(model, (name for name in stored_names(model) if name.startswith(prefix)))
    return {attention + key: value for key, value in made.items()} | read_weights(model, kept)


def _write_rest(
    model: PreTrainedModel, processor: ProcessorMixin, found: Converted, work: WorkFolder
) -> None:
    """What the decoder layers are not, the index of all shards, and all that is not weights."""
    names = shard_names(model)
    for shard, keys in zip(names[AttentionSizes.of(model.config).layers :], rest_shards(model), strict=True):
        work.write(shard, read_weights(model, keys))
    skeleton = empty_model(converted_config(model.config, found.mla))
    _write_index(skeleton, work.result, names)
    config = skeleton.config
    config.architectures, config.dtype = [type(skeleton).__name__], model.dtype
    config.save_pretrained(work.result)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(work.result)
    skeleton.save_remote_code(work.result)
    write_card(config, work.result, name=work.output.name, findings=found.findings)
    processor.save_pretrained(work.result)


def _write_index(skeleton: Any, folder: Path, names: Sequence[str]) -> None:
    """The index of the shards; that they are the whole model, in the right shapes, is checked."""
    found, where, size = {}, {}, 0
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                found[key], where[key] = tuple(file.get_slice(key).get_shape()), name
        size += (folder / name).stat().st_size
    tied = tied_names(skeleton)
    expected = {k: tuple(v.shape) for k, v in skeleton.state_dict().items() if k not in tied}
    assert found == expected, sorted(found.items() ^ expected.items())[:4]
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def shard_names(model: PreTrainedModel) -> list[str]:
    """Files of the result: one for each decoder layer, then those of the rest."""
    count = AttentionSizes.of(model.config).layers + len(rest_shards(model))
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def rest_shards(model: PreTrainedModel) -> list[list[str]]:
    """Names of what lies beside the decoder layers, in shards of at most `SHARD_BYTES` or one tensor."""
    prefixes = tuple(layer_prefixes(model))
    shards: list[list[str]] = [[]]
    size = 0
    state = model.state_dict()
    for key in stored_names(model):
        if key.startswith(prefixes):
            continue
        bytes_of = state[key].numel() * state[key].element_size()
        if shards[-1] and size + bytes_of > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += bytes_of
    return shards


def _digest(chats: Chats) -> str:
    """What the chats are, in short."""
    found = hashlib.sha256()
    for batch in track(chats, "reading chats", len(chats)):
        for key, value in sorted(batch.items()):
            found.update(key.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
