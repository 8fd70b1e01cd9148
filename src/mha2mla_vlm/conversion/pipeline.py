"""The conversion, without training: partial RoPE, then factors of keys and values.

Shapes: G KV heads, R rope dims kept, r latent dims.
"""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.conversion.choice import possible
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.driver import Chats, measure, run
from mha2mla_vlm.conversion.plan import check_model, plan
from mha2mla_vlm.conversion.profile import Profile
from mha2mla_vlm.conversion.weights import rebuild
from mha2mla_vlm.conversion.work import MemoryWork
from mha2mla_vlm.data.breadth import RANDOM, lacks, random_needed
from mha2mla_vlm.data.random_chats import random_chats
from mha2mla_vlm.data.records import EncodedRecords, Record
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.utils.distributed import process_index
from mha2mla_vlm.utils.progress import track

logger = logging.getLogger(__name__)


def convert(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    config: ConversionConfig = ConversionConfig(),
    *,
    profile: Profile | None = None,
) -> PreTrainedModel:
    """Convert a model to latent attention, training-free; the model given is left as it is.

    It is an original one, or one converted to partial RoPE only (and perhaps trained since), whose
    keys and values are then factorised, with all layers alike.

    `records` calibrate, a share of them measures the loss: `converted.mla_config.kl` holds the mean
    KL divergence to the original on held-out answers after each transform. A `profile` from an
    earlier call (`make_profile`) saves measuring again. Raises `InputError` for a model or sizes that
    cannot be converted, before any work.
    """
    check_model(model)
    plan(model.config, config)
    chats = encode_split(model, processor, records, config)
    possible(model, config, chats.lacks)
    _check(chats)
    made: dict[int, dict[str, Any]] = {}
    found = run(
        model,
        config,
        chats,
        device=model.device,
        work=MemoryWork(),
        sink=made.__setitem__,
        profile=profile,
    )
    small = rebuild(model, found.mla, [made[index] for index in sorted(made)])
    small.findings = found.findings
    return small


def make_profile(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    config: ConversionConfig = ConversionConfig(),
) -> Profile:
    """What calibration shows, for several calls of `convert` with the same records and methods."""
    check_model(model)
    plan(model.config, config)
    chats = encode_split(model, processor, records, config)
    config = possible(model, config, chats.lacks).config
    _check(chats)
    return measure(model, config, chats.calibration, device=model.device, work=MemoryWork())


def encode_split(
    model: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Record], config: ConversionConfig
) -> Chats:
    """Chats to calibrate on and held out to measure the loss on, encoded when they are asked for."""
    if len(records) < 2:
        raise InputError(f"{len(records)} record(s): give at least 2, one to calibrate on and one held out")
    records = records[: config.samples]
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    if silent := [record.source for record in records if not record.answers()]:
        raise InputError(f"{silent[0]}: no assistant message; give chats with answers, which the loss is of")
    count = min(len(records) - 1, max(1, round(config.held_out * len(records))))
    own, found = records[:-count], lacks(records[:-count])
    made = random_needed(len(own), found) if config.random_chats is None else config.random_chats
    if found and not config.random_chats and process_index() == 0:
        logger.warning(
            "calibration is narrow: %s; other chats may lose much, so add such chats%s",
            ", ".join(found),
            f" ({made} random ones are added)" if made else f", or --random-chats {RANDOM}",
        )
    parts = [*own, *random_chats(processor.tokenizer, made)], records[-count:]
    calibration, held_out = (EncodedRecords(processor, part, visual) for part in parts)
    return Chats(calibration=calibration, held_out=held_out, lacks=found, random=made)


def _check(chats: Chats) -> None:
    """Encode each chat once: raises `InputError` for one that cannot be."""
    for _ in track(chats, "reading chats", len(chats)):
        pass
