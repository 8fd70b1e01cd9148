"""Chats of random tokens: calibration that sees words which no calibration chat has.

Calibrated on few or narrow chats, factors spend their rank on what these hold, and any other word is new to
them. Random tokens need no data, and span what the embeddings hold (docs/method.md).
"""

import random

from transformers import PreTrainedTokenizerBase

from mha2mla_vlm.data.records import Record

QUESTION_TOKENS = 160
ANSWER_TOKENS = 8


def random_chats(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0) -> list[Record]:
    """`count` chats of one question and its answer, of tokens drawn evenly from all that are text."""
    rng = random.Random(seed)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [index for index in range(len(tokenizer)) if index not in special]

    def text(tokens: int) -> str:
        return str(tokenizer.decode(rng.choices(ids, k=tokens)))

    return [
        Record(
            messages=[
                {"role": role, "content": [{"type": "text", "text": text(tokens)}]}
                for role, tokens in (("user", QUESTION_TOKENS), ("assistant", ANSWER_TOKENS))
            ],
            source="random tokens",
        )
        for _ in range(count)
    ]
