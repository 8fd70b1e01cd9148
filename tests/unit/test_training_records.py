"""Which chats train: nothing cut, nothing lost silently, the same answers in any batch."""

import json

import pytest
import torch
from helpers import original
from PIL import Image

from mha2mla_vlm.data.records import IGNORE_INDEX, Record, chat_length, encode, encode_with_labels
from mha2mla_vlm.data.sources import StoredRecords
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.training.records import choose
from mha2mla_vlm.zoo.chats import sample_chats


def records(name, count=12):
    return [
        Record(messages=chat.messages, images=chat.images)
        for chat in sample_chats(name, split="train", samples=count, seed=4)
    ]


TEXT_ONLY = Record(messages=[{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "7"}])


def test_the_length_of_a_chat_is_that_of_its_tokens(family):
    _, processor = original(family)
    for record in [*records(family), TEXT_ONLY]:
        assert chat_length(processor, record) == encode(processor, [record])["input_ids"].shape[1]


def test_long_chats_are_dropped_and_counted(family):
    _, processor = original(family)
    chats = records(family)
    lengths = [chat_length(processor, record) for record in chats]
    limit = sorted(lengths)[8]
    chosen = choose(chats, processor, max_length=limit, held_out=2)
    kept = sorted(chosen.train + chosen.held_out)
    assert kept == [i for i, length in enumerate(lengths) if length <= limit]
    assert chosen.too_long == len(chats) - len(kept)
    assert len(chosen.held_out) == 1  # at most a tenth
    again = choose(chats, processor, max_length=limit, held_out=2, workers=2)
    assert again == chosen
    with pytest.raises(InputError, match="0 of 12"):
        choose(chats, processor, max_length=3, held_out=2)


def test_unreadable_chats_fail_or_are_counted(tmp_path):
    _, processor = original("qwen2_5_vl")
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "7"}]
    good = json.dumps({"image": "a.png", "conversations": turns})
    mute = '{"conversations": [{"from": "human", "value": "What?"}]}'
    lines = [good, good.replace("a.png", "gone.png"), good, "{", mute, good]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    stored = StoredRecords(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=r"line 2: image .*gone.png does not exist"):
        choose(stored, processor, max_length=999, held_out=1)
    chosen = choose(stored, processor, max_length=999, held_out=1, on_bad_record="skip")
    assert sorted(chosen.train + chosen.held_out) == [0, 2, 5]
    assert chosen.unreadable == 3


def test_chats_with_and_without_images_in_one_batch(family):
    """Labels of a mixed batch are those of each chat alone."""
    model, processor = original(family)
    visual = get_family(family).visual_token_ids(model.config)
    chats = [*records(family, 2), TEXT_ONLY]
    batch = encode_with_labels(processor, chats, visual)
    for row, record in enumerate(chats):
        alone = encode_with_labels(processor, [record], visual)
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], alone["input_ids"][0])
        assert torch.equal(batch["labels"][row][mask], alone["labels"][0])
        assert bool((batch["labels"][row][~mask] == IGNORE_INDEX).all())
