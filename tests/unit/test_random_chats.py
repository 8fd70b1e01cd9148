"""Chats of random tokens, to calibrate on besides."""

import pytest
from helpers import answered, original

from mha2mla_vlm import ConversionConfig, InputError
from mha2mla_vlm.conversion.pipeline import encode_split
from mha2mla_vlm.data.random_chats import random_chats


def test_random_chats_are_text_and_the_same_each_time(family):
    _, processor = original(family)
    chats = random_chats(processor.tokenizer, 3)
    assert [chat.messages for chat in chats] == [c.messages for c in random_chats(processor.tokenizer, 3)]
    assert chats[0].messages != chats[2].messages
    assert [len(chat.images) for chat in chats] == [0, 1, 0]
    texts = [message["content"][-1]["text"] for chat in chats for message in chat.messages]
    assert not [
        text for text in texts for special in processor.tokenizer.all_special_tokens if special in text
    ]


def test_they_calibrate_and_measure_nothing(family):
    model, processor = original(family)
    records = answered(family)
    few, many = (
        encode_split(model, processor, records, ConversionConfig(random_chats=count)) for count in (0, 5)
    )
    (plain, held_out), (more, same) = ((each.calibration, each.held_out) for each in (few, many))
    assert (len(more), len(same)) == (len(plain) + 5, len(held_out))
    assert [list(batch["input_ids"].shape) for batch in same] == [
        list(batch["input_ids"].shape) for batch in held_out
    ]
    assert int((more[-1]["labels"] >= 0).sum()) > 0


def test_fewer_than_none():
    with pytest.raises(InputError, match="random_chats = -1"):
        ConversionConfig(random_chats=-1)
