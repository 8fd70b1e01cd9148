"""Chats about pages of handwritten digits, and the files that hold them."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mha2mla_vlm.data.records import Record
from mha2mla_vlm.zoo.digits import CELL, Split, draw_page, scans_by_digit

KINDS = ("place", "count", "largest", "read")
MAX_SIDE = 4
Cell = tuple[int, int]  # row, column
PAGE_MULTIPLE = {"qwen2_5_vl": 24, "qwen3_vl": 24, "llava_next": 48, "llava": 96}  # pixels; see `draw_page`
# about, for each digit of a page, and for each page
VISUAL_TOKENS = {"qwen2_5_vl": (4, 0), "qwen3_vl": (4, 0), "llava_next": (0, 70), "llava": (0, 64)}


@dataclass(frozen=True, kw_only=True)
class Page:
    """One image and the digits on it, by row."""

    digits: list[list[int]]
    image: Image.Image

    def digit_at(self, y: float, x: float) -> tuple[int, int, int] | None:
        """Digit, row and column under a point (pixels), or None where the page is blank."""
        row, column = int(y // CELL), int(x // CELL)
        if row >= len(self.digits) or column >= len(self.digits[0]):
            return None
        return self.digits[row][column], row, column


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages as transformers takes them, and the pages that they show, in order.

    `sources` says for each digit of the answers, in order, which page it is about and which cells
    of it show the digit.
    """

    messages: list[dict[str, Any]]
    pages: list[Page]
    sources: list[tuple[int, list[Cell]]]

    @property
    def images(self) -> list[Image.Image]:
        """The pages' images."""
        return [page.image for page in self.pages]


def make_page(
    rng: random.Random, *, split: Split, multiple: int, rows: int, columns: int, augment: bool
) -> Page:
    """A page with a grid of random digits, each a random scan of the split."""
    pool = scans_by_digit(split)
    digits = [[rng.randrange(10) for _ in range(columns)] for _ in range(rows)]
    scans = [[rng.choice(pool[digit]) for digit in line] for line in digits]
    return Page(digits=digits, image=draw_page(scans, rng, multiple=multiple, augment=augment))


def ask(kind: str, digits: list[list[int]], rng: random.Random) -> tuple[str, str, list[list[Cell]]]:
    """A question of a kind about a grid of digits, its answer, and for each digit of the answer the
    cells (row, column) that it is read from.
    """
    row = rng.randrange(len(digits))
    cells = [(i, j) for i, line in enumerate(digits) for j in range(len(line))]
    if kind == "place":
        column = rng.randrange(len(digits[0]))
        question = f"Which digit is in row {row + 1}, column {column + 1}?"
        return question, str(digits[row][column]), [[(row, column)]]
    if kind == "count":
        # half of the time a digit that is there, or nearly all answers would be 0 or 1
        i, j = rng.choice(cells)
        wanted = digits[i][j] if rng.random() < 0.5 else rng.randrange(10)
        found = [(i, j) for i, j in cells if digits[i][j] == wanted]
        answer = str(len(found))
        return f"How many digits are {wanted}?", answer, [found] * len(answer)
    if kind == "largest":
        largest = max(digits[row])
        found = [(row, j) for j, digit in enumerate(digits[row]) if digit == largest]
        return f"Which digit is the largest in row {row + 1}?", str(largest), [found]
    return (
        "Read all digits.",
        " ".join("".join(map(str, line)) for line in digits),
        [[cell] for cell in cells],
    )


def make_chat(
    rng: random.Random,
    *,
    split: Split,
    multiple: int,
    sides: list[tuple[int, int]],
    turns: int,
    weights: Sequence[float] = (1, 1, 1, 1),
    augment: bool = False,
) -> Chat:
    """One chat, with a page for each (rows, columns) of `sides`.

    A page may come in a later turn than the first; a chat of several pages says which it asks
    about. `weights` are the odds of `KINDS`. Reading the whole page comes last: earlier it would
    give the other answers away.
    """
    pages = [
        make_page(rng, split=split, multiple=multiple, rows=rows, columns=columns, augment=augment)
        for rows, columns in sides
    ]
    kinds = sorted(rng.choices(KINDS, weights, k=turns), key=lambda kind: kind == "read")
    if "read" in kinds:
        kinds = kinds[: kinds.index("read") + 1]
    messages: list[dict[str, Any]] = []
    sources: list[tuple[int, list[Cell]]] = []
    shown = 0
    for turn, kind in enumerate(kinds):
        new = 1 if not shown or (shown < len(pages) and rng.random() < 0.5) else 0
        new = len(pages) - shown if turn + 1 == len(kinds) else new
        shown += new
        which = rng.randrange(shown)
        question, answer, looks = ask(kind, pages[which].digits, rng)
        sources += [(which, cells) for cells in looks]
        if len(pages) > 1:
            question = f"Picture {which + 1}: {question}"
        content: list[dict[str, str]] = [{"type": "image"}] * new + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}], "kind": kind})
    return Chat(messages=messages, pages=pages, sources=sources)


def sample_chats(name: str, *, split: Split, samples: int, seed: int) -> Iterator[Chat]:
    """Chats as evaluation and calibration see them: one page of 1 x 1 to 4 x 4 digits, or two pages."""
    for index in range(samples):
        rng = random.Random(f"{name}/{split}/{seed}/{index}")
        pages = 2 if rng.random() < 0.1 else 1
        sides = [(rng.randint(1, MAX_SIDE), rng.randint(1, MAX_SIDE)) for _ in range(pages)]
        yield make_chat(rng, split=split, multiple=PAGE_MULTIPLE[name], sides=sides, turns=rng.randint(1, 4))


def write_chats(name: str, output: Path, *, split: Split, samples: int, seed: int) -> Path:
    """Write `samples` chats as `chats.jsonl` and `images/*.png`; equal arguments give equal bytes.

    Returns the path of the JSONL file. `output` must exist.
    """
    (output / "images").mkdir()
    path = output / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index, chat in enumerate(sample_chats(name, split=split, samples=samples, seed=seed)):
            files = [f"images/{index:06d}-{i}.png" for i in range(len(chat.pages))]
            for image, image_file in zip(chat.images, files, strict=True):
                image.save(output / image_file, optimize=False)
            file.write(json.dumps({"messages": chat.messages, "images": files}) + "\n")
    return path


def zoo_records(name: str, *, split: Split, samples: int, seed: int) -> list[Record]:
    """Chats about pages of digits, as `mha2mla zoo data` writes them, without the files."""
    chats = sample_chats(name, split=split, samples=samples, seed=seed)
    return [Record(messages=chat.messages, images=chat.images) for chat in chats]
