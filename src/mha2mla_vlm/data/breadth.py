"""What calibration chats lack, in words: a converted model is good at what its chats are like."""

import re
from collections.abc import Sequence

from mha2mla_vlm.data.records import Record, message_text

FEW = 32  # chats
SAME = 2  # questions, but for their numbers, that are still of one kind
NO_IMAGES, ONE_KIND = "no images", "only one kind of question"
RANDOM = 32  # random chats that make up for these


def lacks(records: Sequence[Record]) -> list[str]:
    """What chats to calibrate on lack, a clause each; nothing where they are broad.

    What each costs is in docs/robustness: KL on other chats ten to a thousand times as large.
    """
    shown = [len(record.images) for record in records]
    asked = {
        re.sub(r"\d+", "0", message_text(message)).strip()
        for record in records
        for message in record.messages
        if message["role"] == "user"
    }
    found = {
        f"only {len(records)} chats": len(records) < FEW,
        NO_IMAGES: not any(shown),
        "no chat with several images": any(shown) and max(shown) < 2,
        ONE_KIND: len(asked) <= SAME,
    }
    return [clause for clause, lacking in found.items() if lacking]


def random_needed(chats: int, lacking: Sequence[str]) -> int:
    """How many random chats to calibrate on besides: at most as many as there are `chats`."""
    return min(RANDOM, chats) if {NO_IMAGES, ONE_KIND} & set(lacking) else 0
