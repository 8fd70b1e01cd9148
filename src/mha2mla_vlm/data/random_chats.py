"""Chats of random tokens and pictures: calibration that sees what no calibration chat has.

Calibrated on few or narrow chats, factors spend their rank on what these hold, and any other word or picture
is new to them. Random tokens and noise need no data, and reach directions that chats do not (docs/method.md).
"""

import random
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from mha2mla_vlm.data.records import Record

QUESTION_TOKENS = 160
ANSWER_TOKENS = 8
NOISE_SIDE, PICTURE_SIDE = 24, 96  # pixels, before and after it is enlarged


def random_chats(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0) -> list[Record]:
    """`count` chats of a question and an answer, of tokens drawn evenly from all that are text; every second
    chat shows a picture of smooth noise.
    """
    rng = random.Random(seed)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [index for index in range(len(tokenizer)) if index not in special]

    def text(tokens: int) -> dict[str, str]:
        return {"type": "text", "text": str(tokenizer.decode(rng.choices(ids, k=tokens)))}

    chats = []
    for index in range(count):
        images = [_picture(rng)] if index % 2 else []
        question: list[Any] = [{"type": "image"} for _ in images] + [text(QUESTION_TOKENS)]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [text(ANSWER_TOKENS)]},
        ]
        chats.append(Record(messages=messages, images=images, source="random tokens"))
    return chats


def _picture(rng: random.Random) -> Image.Image:
    noise = Image.frombytes("RGB", (NOISE_SIDE, NOISE_SIDE), rng.randbytes(3 * NOISE_SIDE**2))
    return noise.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR)
