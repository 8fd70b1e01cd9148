"""What a small cache costs on chats unlike those of calibration.

    python benchmarks/robustness.py                 # an hour and a half on two cores; resumes
    python benchmarks/robustness.py --models llava --samples 20 -o /tmp/rows

Calibration, about training scans: 128 chats of all kinds, 16 of them, 128 of one kind of question ("read"),
128 without their images; at read, in 16 bits and in bits by channel, also with 32 random chats
(`--random-chats`). Measured, about test scans: chats of all kinds, chats with three images, chats without
their images, and answers to prompts at least four times as long as the longest chat of calibration. KL to
the original with 95% bootstrap intervals over chats. Appends a row to `OUT/MODEL.jsonl` for each cell, and
writes the table of all rows there into `OUT/README.md`.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measured import HeldOut, Rows, encoded, write_between, zoo_parser

from mha2mla_vlm import ConversionConfig, convert, load, load_processor, make_profile
from mha2mla_vlm.data.breadth import RANDOM
from mha2mla_vlm.data.records import IGNORE_INDEX, Record, chat_length
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import MAX_SIDE, PAGE_MULTIPLE, make_chat, zoo_records
from mha2mla_vlm.zoo.digits import Split

MARK = "<!-- written by benchmarks/robustness.py -->"
BUDGETS = (0.25, 0.125)
MODES = ("read", "read mixed", "write")  # when keys are rotated, and whether channels differ in bits
CALIBRATION = 128  # chats
TIMES = 4  # prompts so many times as long as the longest chat of calibration
TESTS = ("all kinds", "3 images", "text only", "4 times as long")


def made(
    name: str, kind: str, *, split: Split, samples: int, pages: int, weights: tuple[int, ...]
) -> list[Record]:
    """Chats with so many pages; `weights` are the odds of kinds of questions."""
    records = []
    for index in range(samples):
        rng = random.Random(f"{kind}/{name}/{split}/{index}")
        sides = [(rng.randint(1, MAX_SIDE), rng.randint(1, MAX_SIDE)) for _ in range(pages)]
        turns = rng.randint(1, 4)
        how: dict[str, Any] = {"split": split, "multiple": PAGE_MULTIPLE[name], "weights": weights}
        chat = make_chat(rng, sides=sides, turns=turns, **how)
        records.append(Record(messages=chat.messages, images=chat.images))
    return records


def text_alone(records: list[Record]) -> list[Record]:
    """Chats without their images."""
    return [
        Record(
            messages=[
                message | {"content": [part for part in message["content"] if part["type"] == "text"]}
                for message in record.messages
            ]
        )
        for record in records
    ]


def calibrations(name: str) -> dict[str, tuple[Callable[[], list[Record]], int]]:
    """Chats to calibrate on, and how many random ones besides, by what they are."""

    def all_kinds() -> list[Record]:
        return zoo_records(name, split="train", samples=CALIBRATION, seed=1)

    def read() -> list[Record]:
        return made(name, "read", split="train", samples=CALIBRATION, pages=1, weights=(0, 0, 0, 1))

    def text() -> list[Record]:
        return text_alone(all_kinds())

    return {  # with 0 where `convert` would add some by itself, too
        f"all kinds, {CALIBRATION} chats": (all_kinds, 0),
        "all kinds, 16 chats": (lambda: all_kinds()[:16], 0),
        "one kind of question": (read, 0),
        "text only": (text, 0),
        "one kind of question + random": (read, RANDOM),
        "text only + random": (text, RANDOM),
        f"all kinds, {CALIBRATION} chats + random": (all_kinds, RANDOM),
    }


def long_batches(model: Any, processor: Any, name: str, samples: int, least: int) -> Iterator[Any]:
    """Chats about one page each, one after another; answers of the last, after `least` tokens, count."""
    chats = zoo_records(name, split="test", samples=20 * samples, seed=4)
    pages = iter(chat for chat in chats if len(chat.images) == 1)
    for _ in range(samples):
        record, start = next(pages), 0
        while start < least:
            more = next(pages)
            start = encoded(model, processor, [record])[0]["input_ids"].shape[1]
            images = [*record.images, *more.images]
            record = Record(messages=record.messages + more.messages, images=images)
        [batch] = encoded(model, processor, [record])
        batch["labels"][:, :start] = IGNORE_INDEX
        yield batch


def held_out_chats(model: Any, processor: Any, name: str, samples: int) -> dict[str, HeldOut]:
    """Held-out chats of each kind."""
    chats = zoo_records(name, split="test", samples=samples, seed=0)
    three = made(name, "three", split="test", samples=samples, pages=3, weights=(1, 1, 1, 1))
    calibrated = [record for make, _ in calibrations(name).values() for record in make()]
    least = TIMES * max(chat_length(processor, record) for record in calibrated)
    batches = [encoded(model, processor, records) for records in (chats, three, text_alone(chats))]
    batches.append(list(long_batches(model, processor, name, samples, least)))
    return {kind: HeldOut(model, each) for kind, each in zip(TESTS, batches, strict=True)}


def run(name: str, modes: list[str], samples: int, folder: Path) -> None:
    """All rows of one model and these modes that are not yet in its file."""
    rows = Rows(folder / f"{name}.jsonl", "calibration", "mode", "budget", "test")
    model, processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
    held_out = held_out_chats(model, processor, name, samples)
    for kind, each in held_out.items():
        if not rows.has("original", "", 1.0, kind):
            key = {"calibration": "original", "mode": "", "budget": 1.0, "test": kind}
            rows.add(**key, samples=samples, **each.measure(model))
    for mode in modes:
        for calibration, (make, random_chats) in calibrations(name).items():
            if random_chats and mode == "write":
                continue
            profile = None
            for budget in BUDGETS:
                missing = [kind for kind in TESTS if not rows.has(calibration, mode, budget, kind)]
                if not missing:
                    continue
                chats = make()
                at, _, mixed = mode.partition(" ")
                how: dict[str, Any] = {"rotate_at": at, "latent_bits": mixed or "16"}
                config = ConversionConfig(budget=budget, random_chats=random_chats, **how)
                profile = profile or make_profile(model, processor, chats, config)
                small = convert(model, processor, chats, config, profile=profile)
                for kind in missing:
                    key = {"calibration": calibration, "mode": mode, "budget": budget, "test": kind}
                    rows.add(**key, samples=samples, **held_out[kind].measure(small))


def table(folder: Path) -> str:
    """Markdown of all rows in a folder."""
    lines = [
        f"| | rotated at | cache | calibrated on | {' | '.join(TESTS)} |",
        "|---" * (4 + len(TESTS)) + "|",
    ]
    for name in ZOO_NAMES:
        rows = Rows(folder / f"{name}.jsonl").rows
        cells = {(row["mode"], row["budget"], row["calibration"], row["test"]): row for row in rows}
        for mode in MODES:
            for budget in BUDGETS:
                for calibration in calibrations(name):
                    found = [cells.get((mode, budget, calibration, kind)) for kind in TESTS]
                    if not any(found):
                        continue
                    shown = ["" if row is None else interval(row) for row in found]
                    title = f"| `zoo:{name}` | {mode} | {budget:.1%} | {calibration} |"
                    lines.append(f"{title} {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def interval(row: dict[str, Any]) -> str:
    """A row's KL and its interval."""
    return f"{row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})"


def main() -> None:
    """Command line."""
    parser = zoo_parser(__doc__, "robustness", samples=100)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options = parser.parse_args()
    for name in options.models:
        run(name, options.modes, options.samples, options.output)
    write_between(options.output / "README.md", MARK, table(options.output))


if __name__ == "__main__":
    main()
