"""How latents are kept: numbers of 16 bits, or bits by channel, as is possible, predicted and measured."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from mha2mla_vlm.algorithms.factorization import factorization
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.allocation import allocated
from mha2mla_vlm.conversion.config import AUTO, BY_CHANNEL, ENOUGH, SIXTEEN, ConversionConfig
from mha2mla_vlm.conversion.layer import Measured
from mha2mla_vlm.conversion.plan import is_allocated, plan
from mha2mla_vlm.conversion.profile import Profile
from mha2mla_vlm.conversion.sweep import has_normed_keys
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.intervals import bootstrap_interval

NAMES = {SIXTEEN: "in 16 bits", BY_CHANNEL: "in bits by channel"}


class Possible(NamedTuple):
    """How to convert, with `latent_bits` only left to choose where there is a choice; else why there is none,
    if that was to be chosen.
    """

    config: ConversionConfig
    why: str = ""


def possible(model: PreTrainedModel, config: ConversionConfig, lacks: Sequence[str]) -> Possible:
    """What can be chosen for a model, calibrated on chats that lack something.

    Raises `InputError` for bits by channel where only rotated keys that are normed could be cached, and for
    what has no sizes.
    """
    normed = has_normed_keys(model)
    if config.bits_by_channel and normed and config.modes == ("write",):
        raise InputError(  # steps of keys would have to be in the queries, behind their norm
            "latent_bits mixed with rotate_at write does not go with normed keys; "
            "give --rotate-at read or auto"
        )
    if config.latent_bits != AUTO:
        return Possible(config)
    sixteen = config.keeping(SIXTEEN)
    if not is_allocated(model.config, config):
        return Possible(sixteen)
    reasons = {
        f"calibration is narrow ({', '.join(lacks)}), which bits by channel take worse": bool(lacks),
        "rotated keys that are normed have no bits by channel": normed and config.modes == ("write",),
        f"{config.factorization} knows nothing of channels": factorization(config.factorization).statistics
        == "nothing",
    }
    if why := next((why for why, holds in reasons.items() if holds), ""):
        plan(model.config, sixteen)
        return Possible(sixteen, why)
    try:
        plan(model.config, sixteen)
    except InputError:
        return Possible(config.keeping(BY_CHANNEL), "no sizes in 16 bits are as small as this budget")
    return Possible(config)


def candidates(
    mla: MLAConfig, profile: Profile, sizes: AttentionSizes, config: ConversionConfig
) -> dict[str, MLAConfig]:
    """Sizes of layers under the budget for each way to keep latents, the simpler one first.

    Of bits by channel only if they are predicted to cost less.
    """
    first, *others = config.tried_bits
    found = {first: allocated(mla, profile.losses, sizes, config.keeping(first))}
    for bits in others:
        try:
            other = allocated(mla, profile.losses, sizes, config.keeping(bits))
        except InputError:  # no layers within the limit of arithmetic
            continue
        if predicted(other) < predicted(found[first]):
            found[bits] = other
    return found


def predicted(mla: MLAConfig) -> float:
    """KL that converting the layers, each by itself, is predicted to cost together."""
    return sum(mla.predicted_kl or [])


def is_little(measured: Mapping[str, Measured]) -> bool:
    """Whether one of what was measured costs no more than `ENOUGH`."""
    return any(each.kl[each.last] <= ENOUGH for each in measured.values())


def better(measured: Mapping[str, Measured]) -> str:
    """The one of at most two ways that loses less: the first, unless the second does so beyond chance."""
    first, *others = measured
    for other in others:
        simple, found = measured[first], measured[other]
        pairs = zip(simple.by_chat[simple.last], found.by_chat[found.last], strict=True)
        low, _ = bootstrap_interval([a - b for a, b in pairs], simple.tokens)
        return other if low > 0 else first
    return first


def choice(
    chosen: str, why: str, mlas: Mapping[str, MLAConfig], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """What was chosen of what, and why, for people and for `conversion.json`; `why` is given where there was
    no choice.
    """
    costs, first = {bits: predicted(mla) for bits, mla in mlas.items()}, next(iter(mlas))
    found = [f"{NAMES[bits]} {each.said(each.last)}" for bits, each in measured.items()]
    if not why and len(mlas) == 1:
        why = "bits by channel are predicted to lose no less"
    elif not why:
        why = f"on held-out chats {', '.join(found)}"
        clear = f"up to {ENOUGH:g} is little" if len(measured) == 1 else "no clear difference"
        why += f": {clear}" if chosen == first else ""
    return {
        "chosen": chosen,
        "why": f"latents {NAMES[chosen]}: {why}",
        "predicted_kl": costs,
        "kl": {bits: each.kl[each.last] for bits, each in measured.items()},
        "kl_interval": {bits: each.intervals()[each.last] for bits, each in measured.items()},
    }
