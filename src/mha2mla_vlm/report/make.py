"""The report of a checkpoint: what it needs is found, measured, and written."""

from pathlib import Path
from typing import Any

from mha2mla_vlm.data.records import Record
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError, need
from mha2mla_vlm.evaluation.answers import check_baseline
from mha2mla_vlm.model.checkpoint import load, load_config, load_processor, pick_device, resolve
from mha2mla_vlm.model.origin import original_is_missing, original_of, read_findings, shared_name
from mha2mla_vlm.model.shipped import ZOO_PREFIX
from mha2mla_vlm.report.gather import Report, gather
from mha2mla_vlm.report.page import write_report
from mha2mla_vlm.utils.folders import check_file, claimed
from mha2mla_vlm.zoo.chats import zoo_records

ZOO_CHATS = 100


def report_checkpoint(
    checkpoint: str,
    target: Path,
    *,
    data: str | None = None,
    baseline: str | None = None,
    samples: int | None = None,
    layer_samples: int = 16,
    dtype: str = "auto",
    device: str = "auto",
) -> Report:
    """Measure a converted checkpoint beside its original on `data`, and write the page to `target`.

    Raises `InputError` if the checkpoint is not a converted one, if the original or chats must be named, or
    without matplotlib.
    """
    need("matplotlib", "report", "a report")
    config = load_config(checkpoint)
    if getattr(config, "mla", None) is None:
        raise InputError(f"{checkpoint!r} is not a converted model; make one with: mha2mla convert")
    check_file(target)
    original = baseline or original_of(checkpoint)
    if original is None:
        raise original_is_missing(checkpoint, "--baseline MODEL")
    check_baseline(checkpoint, original)
    records = _records(data, original, samples)
    with claimed(target, check_file):
        where, processor = pick_device(device), load_processor(checkpoint)
        model, other = (load(name, dtype=dtype).to(where) for name in (checkpoint, original))
        found = gather(
            model,
            other,
            processor,
            records,
            name=Path(resolve(checkpoint)).name,
            findings=read_findings(checkpoint),
            commands=_commands(checkpoint, original, data, read_findings(checkpoint)),
            layer_samples=layer_samples,
        )
        write_report(found, target)
    return found


def _records(data: str | None, original: str, samples: int | None) -> list[Record]:
    if data is not None:
        return list(load_records(data, limit=samples))
    if not original.startswith(ZOO_PREFIX):
        raise InputError("give held-out chats with --data")
    bare = original.removeprefix(ZOO_PREFIX)
    return zoo_records(bare, split="test", samples=samples or ZOO_CHATS, seed=0)


def _commands(checkpoint: str, original: str, data: str | None, findings: dict[str, Any]) -> list[str]:
    """The commands that make the checkpoint and the page, as far as they are known."""
    settings = findings.get("settings", {})
    sizes = [
        f"--{key.replace('_', '-')} {settings[key]}"
        for key in ("budget", "max_decode_cost", "qk_rope_head_dim", "d_kv")
        if settings.get(key)
    ]
    how = [
        f"--{key.replace('_', '-')} {settings[key]}"
        for key in ("rotate_at", "latent_bits", "rope_selection", "factorization")
        if settings.get(key)
    ]
    how += ["--no-fold"] if settings.get("fold") is False else []
    name = shared_name(checkpoint)
    convert = " ".join(["mha2mla convert", shared_name(original), "--data CHATS -o", name, *sizes, *how])
    report = " ".join(["mha2mla report", name, *([f"--data {shared_name(data)}"] if data else [])])
    return [convert, report] if settings else [report]
