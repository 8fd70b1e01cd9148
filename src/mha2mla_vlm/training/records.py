"""Which chats train: each is looked at once before the work, so that none fails or is cut later."""

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature, ProcessorMixin

from mha2mla_vlm.config import OnBadRecord
from mha2mla_vlm.data.records import Record, chat_length, encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.utils.progress import track

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Numbers of the records to train on and to measure on, and how many were left out, and why."""

    train: list[int]
    held_out: list[int]
    too_long: int = 0
    unreadable: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


class Chats(Dataset[Record]):
    """Some of the records, each read when it is asked for."""

    def __init__(self, records: Sequence[Record], chosen: Sequence[int]) -> None:
        self.records, self.chosen = records, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.chosen[index]]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Records to a batch with answer-only labels; chats with and without images may be mixed."""

    processor: ProcessorMixin
    visual_token_ids: Sequence[int]

    def __call__(self, records: list[Record]) -> BatchFeature:
        return encode_with_labels(self.processor, records, self.visual_token_ids)


class _Lengths(Dataset[int | InputError]):
    """Tokens of each chat, or why it cannot be used."""

    def __init__(self, records: Sequence[Record], processor: ProcessorMixin) -> None:
        self.records, self.processor = records, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int | InputError:
        try:
            record = self.records[index]
            if not record.answers():
                raise InputError(f"{record.source}: no assistant message; there is nothing to learn")
            return chat_length(self.processor, record)
        except InputError as error:
            return error


def choose(
    records: Sequence[Record],
    processor: ProcessorMixin,
    *,
    max_length: int,
    held_out: int,
    seed: int = 0,
    on_bad_record: OnBadRecord = "fail",
    workers: int = 0,
) -> Chosen:
    """Records that can be read and are not longer than `max_length` tokens, `held_out` of them put aside.

    At most a tenth, and at least one, is put aside; none if `held_out` is 0. `workers` processes look.
    Raises `InputError` for the first record that cannot be read, unless they are to be skipped, and if no
    record is left.
    """
    kept, too_long, unreadable = [], 0, 0
    checked = _Lengths(records, processor)
    loader: Any = DataLoader(checked, batch_size=16, num_workers=workers, collate_fn=list)
    for first, lengths in enumerate(track(loader, "checking chats")):
        for index, length in enumerate(lengths, start=16 * first):
            if isinstance(length, InputError):
                if on_bad_record == "fail":
                    raise length
                logger.warning("skipped: %s", length)
                unreadable += 1
            elif length > max_length:
                too_long += 1
            else:
                kept.append(index)
    if too_long or unreadable:
        logger.info(
            "%d chats: %d longer than %d tokens dropped, %d unreadable skipped",
            len(records), too_long, max_length, unreadable,
        )  # fmt: skip
    aside = min(held_out, max(1, len(kept) // 10)) if held_out else 0
    if len(kept) <= aside:
        raise InputError(
            f"{len(kept)} of {len(records)} chat(s) can be used ({too_long} longer than {max_length} tokens, "
            f"{unreadable} unreadable); give more, or a larger max_length"
        )
    random.Random(seed).shuffle(kept)
    return Chosen(
        train=sorted(kept[aside:]), held_out=sorted(kept[:aside]), too_long=too_long, unreadable=unreadable
    )
