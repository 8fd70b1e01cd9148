"""Real handwritten digits, drawn onto pages.

The scans are "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI, CC BY 4.0).
"""

import functools
import math
import random
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
TRAIN_SCANS = 1400
CELL = 24  # pixels a side of the cell that holds one digit


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans, `[1797, 8, 8]` with ink from 0 to 16, and which digit each one is."""
    with np.load(Path(__file__).parent / "digits.npz") as stored:
        return stored["images"], stored["target"]


def scan_indices(split: Split) -> list[int]:
    """Indices of the scans of a split: one fixed permutation, cut once, so the splits are disjoint."""
    order = list(range(len(scans()[1])))
    random.Random("digit scans").shuffle(order)
    return order[:TRAIN_SCANS] if split == "train" else order[TRAIN_SCANS:]


@functools.cache
def scans_by_digit(split: Split) -> tuple[tuple[int, ...], ...]:
    """For each digit 0 to 9, the indices of its scans in a split."""
    target = scans()[1]
    indices = scan_indices(split)
    return tuple(tuple(i for i in indices if target[i] == digit) for digit in range(10))


@functools.cache
def scan_image(index: int) -> Image.Image:
    """One scan as an 8 x 8 grey image, ink bright on black."""
    return Image.fromarray(np.round(scans()[0][index] * (255 / 16)).astype(np.uint8))


def draw_digit(index: int, rng: random.Random, *, augment: bool) -> np.ndarray:
    """Ink of one scan in a cell, `[CELL, CELL]` uint8, placed at random within the cell.

    With `augment` it is also turned, stretched, sheared and made thicker or thinner: the few scans
    to train on must stand for all handwriting.
    """
    angle, shear, scale_x, scale_y, reach, gamma = 0.0, 0.0, 1.0, 1.0, 1.5, 1.0
    if augment:
        angle, shear = rng.gauss(0, 0.13), rng.gauss(0, 0.12)
        scale_x, scale_y = math.exp(rng.gauss(0, 0.10)), math.exp(rng.gauss(0, 0.08))
        reach, gamma = 2.5, math.exp(rng.gauss(0, 0.35))
    shift_x, shift_y = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    step = 8 / 20  # scan pixels per page pixel: a scan fills 20 of the 24 pixels
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    a, b = cos / scale_x, (shear * cos - sin) / scale_y
    d, e = sin / scale_x, (shear * sin + cos) / scale_y
    middle = CELL / 2
    c = 4 - a * (middle + shift_x) - b * (middle + shift_y)
    f = 4 - d * (middle + shift_x) - e * (middle + shift_y)
    cell = scan_image(index).transform(
        (CELL, CELL), Image.Transform.AFFINE, (a, b, c, d, e, f), resample=Image.Resampling.BICUBIC
    )
    ink = np.asarray(cell, dtype=np.uint8)
    if augment:
        table = np.round(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
        ink = table[ink]
    return ink


def draw_page(scans: list[list[int]], rng: random.Random, *, multiple: int, augment: bool) -> Image.Image:
    """A white page with a grid of scans (rows of scan indices) from its top left corner.

    Both sides are rounded up to `multiple` pixels, the paper that a model's processor takes without
    rescaling, so that writing keeps its size.
    """
    rows, columns = len(scans), len(scans[0])
    height, width = (math.ceil(n * CELL / multiple) * multiple for n in (rows, columns))
    page = np.full((height, width), 255, dtype=np.uint8)
    for row, line in enumerate(scans):
        for column, index in enumerate(line):
            ink = draw_digit(index, rng, augment=augment)
            page[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] -= ink
    return Image.fromarray(page)
