"""The one conversion, of a model in memory or on disk: sweeps over its layers, each made handed to a sink."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.choice import better, candidates, choice, is_little, possible, predicted
from mha2mla_vlm.conversion.config import AUTO, ENOUGH, ConversionConfig
from mha2mla_vlm.conversion.layer import LayerwiseConversion, Measured
from mha2mla_vlm.conversion.plan import is_allocated, plan, print_plan
from mha2mla_vlm.conversion.profile import LayerwiseProfile, Profile
from mha2mla_vlm.conversion.sweep import Known
from mha2mla_vlm.conversion.work import Work
from mha2mla_vlm.model.origin import stated_by
from mha2mla_vlm.utils.progress import Phases, console

Sink = Callable[[int, dict[str, torch.Tensor]], None]  # takes a layer's number and converted attention


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Batches of one chat each: to calibrate on, of which the last are `random`, and held out to measure the
    loss on; and what the others to calibrate on lack (`data.breadth`).
    """

    calibration: Sequence[BatchFeature]
    held_out: Sequence[BatchFeature]
    lacks: Sequence[str] = ()
    random: int = 0

    def __len__(self) -> int:
        return len(self.calibration) + len(self.held_out)

    def __iter__(self) -> Iterator[BatchFeature]:
        return itertools.chain(self.calibration, self.held_out)


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
    """Convert, from where `work` stopped, and give each layer to `sink`, which may be given all once more.

    A budget needs a `profile`; where none is given, two sweeps measure it. Where it is not clear how latents
    are best kept, each way is converted and measured.
    """
    asked, (config, why) = config, possible(model, config, chats.lacks)
    sizes, before = AttentionSizes.of(model.config), 0
    mla = plan(model.config, config)
    mlas = {config.tried_bits[0]: mla}
    if profile is not None:
        profile.check(config)
    elif is_allocated(model.config, config):
        before = 2 * sizes.layers
        profile = measure(model, config, chats.calibration, device=device, work=work)
    if profile is not None and is_allocated(model.config, config):
        mlas = candidates(mla, profile, sizes, config)
    known = None if profile is None else profile.layers.__getitem__

    def convert(bits: str, number: int, write: bool) -> Measured:
        """The sweep of this number, for one way to keep latents."""
        given: dict[str, Any] = {"device": device, "work": work, "known": known}
        given |= {"sink": sink if write else None, "before": before + number * (sizes.layers + 1)}
        return _convert(model, config.keeping(bits), mlas[bits], chats, **given)

    chosen, measured = _best(mlas, convert)
    found = {}
    if asked.latent_bits == AUTO and is_allocated(model.config, config):
        found = {"latent_bits": choice(chosen, why, mlas, measured)}
        if work.main:
            console().print(found["latent_bits"]["why"])
    return _converted(model, asked, mlas[chosen], measured[chosen], chats, work, found)


def _best(
    mlas: Mapping[str, MLAConfig], convert: Callable[[str, int, bool], Measured]
) -> tuple[str, dict[str, Measured]]:
    """The way to keep latents that is written in the end, and what each that was tried loses.

    One is written at once if it is likely to stay, the last or one predicted to cost little.
    """
    measured, written = dict[str, Measured](), ""
    for bits, mla in mlas.items():
        if not is_little(measured):
            likely = bits == list(mlas)[-1] or predicted(mla) <= ENOUGH
            measured[bits] = convert(bits, len(measured), likely)
            written = bits if likely else written
    chosen = better(measured)
    if chosen != written:
        convert(chosen, len(measured), True)
    return chosen, measured


def _converted(
    model: PreTrainedModel,
    config: ConversionConfig,
    mla: MLAConfig,
    measured: Measured,
    chats: Chats,
    work: Work,
    more: dict[str, Any],
) -> Converted:
    """What is known of a conversion that is done."""
    source = model.config.name_or_path
    findings = {
        "settings": config.to_dict(),
        "source": stated_by(source, model.config) if source else {},
        "calibration_chats": len(chats.calibration),
        "random_chats": chats.random,
        "held_out_chats": len(chats.held_out),
        "kl_interval": measured.intervals(),
        **more,
        "spectra": work.notes["spectra"],
    }
    return Converted(mla=replace(mla, kl=measured.kl), findings=findings)


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
    sink: Sink | None,
    known: Known | None,
    before: int,
) -> Measured:
    """Convert the layers that are not done, `before` of the steps having been for other things, then measure
    the loss, a step too. Without a `sink` only to know the loss.
    """
    layers, notes = AttentionSizes.of(model.config).layers, work.notes
    done = min(work.done - before, layers + 1)
    if work.main:
        print_plan(model.config, mla)
    if done > layers:
        return Measured(**notes["measured"][str(before)])
    with _phases(work, "checking layers" if sink is None else "converting layers", layers, done) as phases:
        given: dict[str, Any] = {"device": device, "phases": phases, "work": work}
        sweep = LayerwiseConversion(model, config, mla, **given, known=known, warn=sink is not None)
        with work.writing("hidden states"):
            sweep.begin(chats.calibration, chats.held_out, again=done > 0)
        for index in range(done, layers):
            with work.writing(f"layer {index}"):
                made = sweep.layer(index)
                with phases.phase("writing"):
                    if sink is not None:
                        sink(index, made.weights)
                    notes["spectra"] = [*(notes["spectra"] if index else []), made.spectra]
                    work.finished_step(drop=index)
            phases.advance()
        measured = sweep.measured()
        with work.writing("what is measured"):
            notes["measured"] = notes.get("measured", {}) | {str(before): asdict(measured)}
            work.finished_step()
    if work.main:
        for name in measured.kl:
            console().print(f"{name.replace('_', ' ')}: {measured.said(name)}")
    return measured


def _phases(work: Work, title: str, total: int, done: int) -> Phases:
    return Phases(title, total, done, shown=work.main, seconds=work.seconds)
