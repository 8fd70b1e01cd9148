"""The one conversion, of a model in memory or on disk: sweeps over its layers, each made handed to a sink."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.allocation import allocated
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.layer import LayerwiseConversion
from mha2mla_vlm.conversion.plan import is_allocated, plan, print_plan
from mha2mla_vlm.conversion.profile import LayerwiseProfile, Profile
from mha2mla_vlm.conversion.sweep import Known
from mha2mla_vlm.conversion.work import Work
from mha2mla_vlm.model.origin import stated_by
from mha2mla_vlm.utils.progress import Phases, console

Sink = Callable[[int, dict[str, torch.Tensor]], None]  # takes a layer's number and converted attention


class Chats(NamedTuple):
    """Batches of one chat each: to calibrate on, and held out to measure the loss on."""

    calibration: Sequence[BatchFeature]
    held_out: Sequence[BatchFeature]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion chose and measured, and what else is worth knowing of it (`conversion.json`)."""

    mla: MLAConfig
    findings: dict[str, Any]


def run(
    model: PreTrainedModel,
    config: ConversionConfig,
    chats: Chats,
    *,
    device: torch.device,
    work: Work,
    sink: Sink,
    profile: Profile | None = None,
) -> Converted:
    """Convert, from where `work` stopped, and give each layer to `sink`.

    A budget needs a `profile`; where none is given, two sweeps measure it.
    """
    mla, known, before = plan(model.config, config), None, 0
    if profile is not None:
        profile.check(config)
    elif is_allocated(model.config, config):
        before = 2 * AttentionSizes.of(model.config).layers
        profile = measure(model, config, chats.calibration, device=device, work=work)
    if profile is not None:
        known = profile.layers.__getitem__
    if profile is not None and is_allocated(model.config, config):
        mla = allocated(mla, profile.losses, AttentionSizes.of(model.config), config)
    if work.main:
        print_plan(model.config, mla)
    kl = _convert(model, config, mla, chats, device=device, work=work, sink=sink, known=known, before=before)
    if work.main:
        for name, value in kl.items():
            console().print(f"{name.replace('_', ' ')}: KL {value:.4f}")
    source = model.config.name_or_path
    findings = {
        "settings": config.to_dict(),
        "source": stated_by(source, model.config) if source else {},
        "calibration_chats": len(chats.calibration),
        "held_out_chats": len(chats.held_out),
        "spectra": work.notes["spectra"],
    }
    return Converted(mla=replace(mla, kl=kl), findings=findings)


def measure(
    model: PreTrainedModel,
    config: ConversionConfig,
    batches: Sequence[BatchFeature],
    *,
    device: torch.device,
    work: Work,
) -> Profile:
    """What chats to calibrate on show about all layers: up through them and down again."""
    steps = 2 * AttentionSizes.of(model.config).layers
    with _phases(work, "measuring layers", steps, min(work.done, steps)) as phases:
        given: dict[str, Any] = {"device": device, "phases": phases, "work": work}
        sweep = LayerwiseProfile(model, config, plan(model.config, config), **given)
        with work.writing("what is measured"):
            return sweep.run(batches, config)


def _convert(
    model: PreTrainedModel,
    config: ConversionConfig,
    mla: MLAConfig,
    chats: Chats,
    *,
    device: torch.device,
    work: Work,
    sink: Sink,
    known: Known | None,
    before: int,
) -> dict[str, float]:
    """Convert the layers that are not done, `before` of the steps having been for other things; the loss."""
    done, layers = work.done - before, AttentionSizes.of(model.config).layers
    with _phases(work, "converting layers", layers, done) as phases:
        given: dict[str, Any] = {"device": device, "phases": phases, "work": work}
        sweep = LayerwiseConversion(model, config, mla, **given, known=known)
        with work.writing("hidden states"):
            sweep.begin(chats.calibration, chats.held_out, again=done > 0)
        for index in range(done, layers):
            with work.writing(f"layer {index}"):
                made = sweep.layer(index)
                with phases.phase("writing"):
                    sink(index, made.weights)
                    work.notes["spectra"] = [*work.notes.get("spectra", []), made.spectra]
                    work.finished_step(drop=index)
            phases.advance()
        return sweep.kl()


def _phases(work: Work, title: str, total: int, done: int) -> Phases:
    return Phases(title, total, done, shown=work.main, seconds=work.seconds)
