"""The zoo's data: real digits split without overlap, reproducible, with answers that are right."""

import hashlib
import json
import random
import re

import numpy as np
import pytest

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.architectures import new_model
from mha2mla_vlm.zoo.chats import (
    KINDS,
    MAX_SIDE,
    PAGE_MULTIPLE,
    ask,
    make_chat,
    make_page,
    sample_chats,
    write_chats,
)
from mha2mla_vlm.zoo.digits import CELL, SPLITS, draw_page, scan_image, scan_indices, scans, scans_by_digit

COUNT = 40
# sha256 of images and target, as load_digits() of scikit-learn 1.9 gives them
SCIKIT_LEARN_DIGITS = "f6d9e39f37dc45d327f6db33428ee58970ccceabb2535a5c179de35886b70443"


def test_the_scans_are_those_of_scikit_learn():
    images, target = scans()
    stored = images.astype(np.float64).tobytes() + target.astype(np.int64).tobytes()
    assert images.shape == (1797, 8, 8)
    assert hashlib.sha256(stored).hexdigest() == SCIKIT_LEARN_DIGITS


def test_splits_are_disjoint_and_cover_every_scan():
    train, test = (scan_indices(split) for split in SPLITS)
    assert len(train) == 1400
    assert len(test) == 397
    assert sorted(train + test) == list(range(1797))


def test_no_test_scan_has_the_pixels_of_a_training_scan():
    train, test = ({scan_image(i).tobytes() for i in scan_indices(split)} for split in SPLITS)
    assert len(train) == 1400
    assert len(test) == 397
    assert not train & test


@pytest.mark.parametrize("split", SPLITS)
def test_scans_by_digit_hold_each_scan_of_the_split_under_its_own_digit(split):
    by_digit, target = scans_by_digit(split), scans()[1]
    assert len(by_digit) == 10
    assert sorted(i for indices in by_digit for i in indices) == sorted(scan_indices(split))
    for digit, indices in enumerate(by_digit):
        assert len(indices) > 20
        assert {int(target[i]) for i in indices} == {digit}


def test_a_scan_image_is_the_scan():
    scan = np.asarray(scan_image(5), dtype=float)
    np.testing.assert_allclose(scan / 255 * 16, scans()[0][5], atol=0.04)


def check_answer(question, answer, digits):
    """Work out the answer from the words of the question alone; returns the kind of question."""
    flat = [digit for line in digits for digit in line]
    if found := re.fullmatch(r"Which digit is in row (\d+), column (\d+)\?", question):
        row, column = map(int, found.groups())
        assert answer == str(digits[row - 1][column - 1])
        return "place"
    if found := re.fullmatch(r"How many digits are (\d)\?", question):
        assert answer == str(sum(digit == int(found[1]) for digit in flat))
        return "count"
    if found := re.fullmatch(r"Which digit is the largest in row (\d+)\?", question):
        assert answer == str(sorted(digits[int(found[1]) - 1])[-1])
        return "largest"
    assert question == "Read all digits."
    lines = answer.split(" ")
    assert [[int(digit) for digit in line] for line in lines] == digits
    return "read"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_digits_and_the_question(kind):
    rng = random.Random(kind)
    for _ in range(60):
        rows, columns = rng.randint(1, MAX_SIDE), rng.randint(1, MAX_SIDE)
        digits = [[rng.randrange(10) for _ in range(columns)] for _ in range(rows)]
        question, answer, cells = ask(kind, digits, rng)
        assert check_answer(question, answer, digits) == kind
        assert len(cells) == sum(character.isdigit() for character in answer)
        if kind != "count":  # each digit of the answer stands in the cells that are said to tell it
            told = [{digits[row][column] for row, column in group} for group in cells]
            assert told == [{int(character)} for character in answer if character.isdigit()]


def test_questions_reach_every_place_of_a_grid():
    digits = [[1, 2, 3], [4, 5, 6]]
    rng = random.Random(0)
    assert {ask("place", digits, rng)[1] for _ in range(200)} == set("123456")
    assert {ask("largest", digits, rng)[1] for _ in range(50)} == {"3", "6"}


def chats_behind(name):
    """The chats of a written file, made again, with the digits of their pages."""
    return sample_chats(name, split="test", samples=COUNT, seed=3)


@pytest.fixture(scope="module", params=ZOO_NAMES)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_chats(request.param, folder, split="test", samples=COUNT, seed=3)


def test_written_answers_are_right_for_the_pages_shown(written):
    name, path = written
    kinds = []
    for chat, record in zip(chats_behind(name), load_records(path), strict=True):
        pages = chat.pages
        images = record.load_images()
        assert [image.tobytes() for image in images] == [
            page.image.convert("RGB").tobytes() for page in pages
        ]
        for place in record.answers():
            question, answer = (message_text(record.messages[i]) for i in (place - 1, place))
            which, shown = 0, len(record.before(place).images)
            if len(pages) > 1:
                number, question = re.fullmatch(r"Picture (\d): (.*)", question).groups()
                which = int(number) - 1
            assert which < shown, "asked about an image not shown yet"
            kind = check_answer(question, answer, pages[which].digits)
            assert record.messages[place]["kind"] == kind
            kinds.append(kind)
    assert set(kinds) == set(KINDS)


def test_every_written_record_loads_with_its_images(written):
    _, path = written
    records = load_records(path)
    assert len(records) == COUNT
    assert {len(record.images) for record in records} == {1, 2}
    assert max(len(record.answers()) for record in records) > 1
    files = sorted(file.name for file in (path.parent / "images").iterdir())
    assert files == sorted(image.name for record in records for image in record.images)


def test_page_sides_are_the_least_multiples_that_hold_the_grid(written):
    name, path = written
    multiple = PAGE_MULTIPLE[name]
    for chat, record in zip(chats_behind(name), load_records(path), strict=True):
        for page, image in zip(chat.pages, record.load_images(), strict=True):
            cells = len(page.digits[0]), len(page.digits)
            for side, count in zip(image.size, cells, strict=True):
                assert side % multiple == 0
                assert count * CELL <= side < count * CELL + multiple


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_equal_arguments_write_equal_bytes_and_any_other_argument_does_not(name, tmp_path):
    base = {"split": "test", "samples": 6, "seed": 3}
    variants = {"one": {}, "again": {}, "seed": {"seed": 4}, "split": {"split": "train"}}
    for label, change in variants.items():
        (tmp_path / label).mkdir()
        write_chats(name, tmp_path / label, **base | change)
    made = {label: files_of(tmp_path / label) for label in variants}
    assert made["one"] == made["again"]
    assert len(made["one"]) >= 7
    for other in ("seed", "split"):
        assert made["one"]["chats.jsonl"] != made[other]["chats.jsonl"]
        assert made["one"]["images/000000-0.png"] != made[other]["images/000000-0.png"]


def test_a_longer_file_begins_with_the_shorter_one(tmp_path):
    for count in (3, 5):
        (tmp_path / str(count)).mkdir()
        write_chats("llava", tmp_path / str(count), split="test", samples=count, seed=0)
    short, long = ((tmp_path / count / "chats.jsonl").read_text().splitlines() for count in ("3", "5"))
    assert long[:3] == short
    assert len(long) == 5
    assert all(json.loads(line)["messages"] for line in long)


def test_reading_the_whole_page_comes_last_and_once():
    for seed in range(60):
        rng = random.Random(seed)
        chat = make_chat(rng, split="train", multiple=24, sides=[(2, 2), (1, 3)], turns=4)
        kinds = [message["kind"] for message in chat.messages if message["role"] == "assistant"]
        assert "read" not in kinds[:-1]
        parts = [part["type"] for message in chat.messages for part in message["content"]]
        assert parts.count("image") == len(chat.images) == 2


def test_a_page_shows_each_digit_in_its_own_cell_on_white():
    scans = [[scans_by_digit("test")[8][0], scans_by_digit("test")[1][0]]]
    page = np.asarray(draw_page(scans, random.Random(0), multiple=96, augment=False))
    assert page.shape == (96, 96)
    assert page.dtype == np.uint8
    for column in range(2):
        assert page[:CELL, column * CELL : (column + 1) * CELL].min() < 100
    assert page[CELL:].min() == 255
    assert page[:, 2 * CELL :].min() == 255


def test_augmentation_changes_the_ink_and_stays_in_the_cell():
    scans = [[scans_by_digit("train")[3][0]]]
    plain, turned = (
        np.asarray(draw_page(scans, random.Random(1), multiple=48, augment=a)) for a in (False, True)
    )
    assert (plain != turned).mean() > 0.01
    assert turned[CELL:].min() == 255
    assert turned[:, CELL:].min() == 255


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_the_processor_takes_a_page_without_rescaling_it(name):
    """One visual token stands for a fixed number of pixels, whatever the page."""
    _, processor = new_model(name)
    rng = random.Random(0)
    for rows, columns in ((1, 1), (1, 4), (3, 2), (4, 4)):
        page = make_page(
            rng, split="test", multiple=PAGE_MULTIPLE[name], rows=rows, columns=columns, augment=False
        )
        made = processor.image_processor(page.image.convert("RGB"), return_tensors="np")
        width, height = page.image.size
        if name.startswith("qwen"):
            assert made["image_grid_thw"][0].tolist() == [1, height // 6, width // 6]
        elif name == "llava":
            assert made["pixel_values"].shape[-2:] == (height, width)
        else:
            tiles = width // 48 * (height // 48)
            fits = max(width, height) <= 96
            assert made["pixel_values"].shape[1] == 1 + (tiles if fits else 4)
