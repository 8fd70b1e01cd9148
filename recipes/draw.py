"""Chats for a run, drawn from one source: to calibrate on, to measure on, to train on.

    python recipes/draw.py lmms-lab/LLaVA-NeXT-Data OUT --calibration 128 --held-out 256 --train 16384

The source is anything that `--data` takes. Its chats are read in order, of which every EVERYth is taken until
there are enough, and dealt to the three at random, so that all are of one kind and none is in two. Chats that
cannot be read or have no answer are left out. OUT/{calibration,held-out,train} are folders that `--data`
takes; images are as they were.
"""

import argparse
import io
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mha2mla_vlm.data.records import ImageSource, Record
from mha2mla_vlm.data.sources import stream_records
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.utils.folders import new_folder

PARTS = ("calibration", "held-out", "train")


def taken(source: str, every: int) -> Iterator[Record]:
    """Every so many-th chat of a source that has an answer."""
    records = (r for r in stream_records(source, on_bad_record="skip") if r.answers())
    return itertools.islice(records, 0, None, every)


def write(record: Record, number: int, folder: Path) -> str:
    """A chat's line of JSON, its images written beside it."""
    names = []
    for index, image in enumerate(record.images):
        content, suffix = encoded(image)
        names.append(f"images/{number:06d}-{index}.{suffix}")
        (folder / names[-1]).write_bytes(content)
    return json.dumps({"messages": record.messages, "images": names})


def encoded(image: ImageSource) -> tuple[bytes, str]:
    """An image's file and the suffix of its format."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    content = image if isinstance(image, bytes) else image.read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        return content, (opened.format or "png").lower()


def draw(source: str, output: Path, counts: dict[str, int], every: int, seed: int) -> None:
    """Write the folders; raises `InputError` if the source has too few chats."""
    labels = [part for part, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(labels)
    number = -1
    with new_folder(output) as folder:
        for part in counts:
            (folder / part / "images").mkdir(parents=True)
        files = {part: (folder / part / "chats.jsonl").open("w", encoding="utf-8") for part in counts}
        for number, (part, record) in enumerate(zip(labels, taken(source, every), strict=False)):
            files[part].write(write(record, number, folder / part) + "\n")
        for file in files.values():
            file.close()
        if number + 1 < len(labels):
            raise InputError(
                f"{source} has {number + 1} chats of {len(labels)} that are asked for (of every {every}); "
                "ask for fewer, or give EVERY=1"
            )


def main() -> None:
    """Draw, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", type=Path, help="new or empty")
    for part in PARTS:
        parser.add_argument(f"--{part}", type=int, required=True, help="chats")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = {part: getattr(given, part.replace("-", "_")) for part in PARTS}
    if min(*counts.values(), given.every) < 1:
        parser.error("give 1 or more")
    try:
        draw(given.source, given.output, counts, given.every, given.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"source": given.source, "every": given.every, "seed": given.seed, **counts}))


if __name__ == "__main__":
    main()
