"""The recipe trains, can be interrupted, and resumes as if it had not been."""

import json
import random

import pytest
import torch
from helpers import original

from mha2mla_vlm import load
from mha2mla_vlm.data.records import Record, encode, encode_with_labels
from mha2mla_vlm.zoo import recipe as recipe_module
from mha2mla_vlm.zoo.chats import PAGE_MULTIPLE, make_chat
from mha2mla_vlm.zoo.guides import answer_sources, token_points, token_targets
from mha2mla_vlm.zoo.recipe import Recipe, build

SHORT = Recipe(
    warmup_steps=1, steps=2, refining_steps=1, warmup_pages=2, tokens=300, evaluate_every=100, held_out=2
)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "SAVE_EVERY", 0.0)
    measure = recipe_module.answer_accuracy  # of 60 images after each phase, most of the time
    monkeypatch.setattr(
        recipe_module, "answer_accuracy", lambda *given, **_: measure(*given, count=2, seed=1)
    )
    build("llava_next", tmp_path / "whole", SHORT)
    calls = []
    true_loss = recipe_module.chat_loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # in the middle of a phase
            raise KeyboardInterrupt
        return true_loss(*args)

    monkeypatch.setattr(recipe_module, "chat_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("llava_next", tmp_path / "broken", SHORT)
    assert (tmp_path / "broken" / "state.pt").is_file()
    monkeypatch.setattr(recipe_module, "chat_loss", true_loss)
    build("llava_next", tmp_path / "broken", SHORT)
    whole, broken = (load(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert not (tmp_path / "broken" / "state.pt").exists()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "training_log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["vision warm-up", "reading", "refining"]


def test_targets_match_the_image_tokens(family):
    """As many targets as placeholders, and the digit under the middle of each cell is the cell's."""
    _, processor = original(family)
    rng = random.Random(0)
    sides = [(3, 2), (1, 4)]
    chat = make_chat(rng, split="test", multiple=PAGE_MULTIPLE[family], sides=sides, turns=2)
    ids = encode(processor, [Record(messages=chat.messages, images=chat.images)])["input_ids"]
    targets = token_targets(family, [chat])
    assert len(targets) == int((ids == processor.image_token_id).sum())
    for page, (rows, columns) in zip(chat.pages, sides, strict=True):
        seen = {page.digit_at(*point) for point in token_points(family, page) if point} - {None}
        assert {(row, column) for _, row, column in seen} == {
            (r, c) for r in range(rows) for c in range(columns)
        }
        assert all(page.digits[row][column] == digit for digit, row, column in seen)


def test_answers_are_told_by_the_tokens_of_their_cells(family):
    """The cells that attention is guided to hold the digits of the answers."""
    _, processor = original(family)
    rng = random.Random(3)
    chat = make_chat(rng, split="test", multiple=PAGE_MULTIPLE[family], sides=[(4, 4), (2, 3)], turns=6)
    batch = encode_with_labels(
        processor, [Record(messages=chat.messages, images=chat.images)], [processor.image_token_id]
    )
    is_image = batch["input_ids"] == processor.image_token_id
    digits = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789")))
    rows, positions, masks = answer_sources(family, [chat], is_image, batch["labels"], digits)
    assert len(rows) == len(positions) == len(masks) == sum(bool(cells) for _, cells in chat.sources)
    targets = torch.full(is_image.shape, -1)
    targets[is_image] = token_targets(family, [chat])[:, 0]
    answers = processor.tokenizer.batch_decode(batch["labels"][0, positions + 1].unsqueeze(-1))
    asked = [
        message["kind"]
        for message in chat.messages
        if message["role"] == "assistant"
        for character in message["content"][0]["text"]
        if character.isdigit()
    ]
    told = [kind for kind, (_, cells) in zip(asked, chat.sources, strict=True) if cells]
    for kind, character, mask in zip(told, answers, masks, strict=True):
        seen = set(targets[0, mask.bool()].tolist())
        assert len(seen) == 1
        assert kind == "count" or seen == {int(character)}
