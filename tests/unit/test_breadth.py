"""What calibration chats are said to lack."""

import logging
from dataclasses import replace

import pytest
from helpers import answered, original
from PIL import Image

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import encode_split
from mha2mla_vlm.data.breadth import FEW, lacks
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.zoo.chats import zoo_records


def chats(questions, images=0):
    shown = [{"type": "image"}] * images
    return [
        Record(
            messages=[{"role": "user", "content": [*shown, {"type": "text", "text": text}]}],
            images=[Image.new("RGB", (28, 28))] * images,
        )
        for text in questions
    ]


def test_broad_chats_lack_nothing():
    assert lacks(zoo_records("qwen2_5_vl", split="train", samples=64, seed=1)) == []


@pytest.mark.parametrize(
    ("records", "found"),
    [
        (
            chats([f"Which is in row {i}?" for i in range(FEW)], 2),
            ["only one kind of question"],
        ),
        (chats(["What", "is", "this?"] * FEW), ["no images"]),
        (chats(["What", "is", "this?"] * FEW, 1), ["no chat with several images"]),
        (chats(["What", "is", "this?"], 2), ["only 3 chats"]),
    ],
    ids=["questions", "images", "several", "few"],
)
def test_what_narrow_chats_lack(records, found):
    assert lacks(records) == found


def test_a_conversion_says_so_unless_random_chats_are_asked_for(caplog):
    model, processor = original("llava")
    with caplog.at_level(logging.WARNING):
        encode_split(model, processor, answered("llava"), ConversionConfig(random_chats=4))
        assert not caplog.messages
        encode_split(model, processor, answered("llava"), ConversionConfig(random_chats=0))
    assert "calibration is narrow: only 5 chats" in caplog.messages[0]
    assert "--random-chats" in caplog.messages[0]


@pytest.mark.parametrize(
    ("records", "added"),
    [
        (chats(["Read."] * 40, 1), 32),
        (chats(["Read."] * 5, 1), 4),
        (chats(["What", "is", "this?"] * 20), 32),
        (chats(["What", "is", "this?"] * 20, 1), 0),
    ],
    ids=["one kind", "few of one kind", "no images", "broad"],
)
def test_random_chats_are_added_to_those_of_one_kind(records, added, caplog):
    model, processor = original("llava")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "3"}]}
    records = [replace(record, messages=[*record.messages, answer]) for record in records]
    with caplog.at_level(logging.WARNING):
        made = encode_split(model, processor, records, ConversionConfig())
    assert made.random == added
    assert len(made.calibration) + len(made.held_out) == len(records) + added
    assert not added or f"({added} random ones are added)" in caplog.messages[0]
