"""Chats from files, one at a time: JSON lines, LLaVA's JSON, parquet, datasets folders, the hub."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from mha2mla_vlm.data import Picture, Record
from mha2mla_vlm.errors import InputError

logger = logging.getLogger(__name__)

OnBadRecord = Literal["fail", "skip"]
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_CHUNK = 2**20  # characters of a JSON list read at a time


def load_records(source: str | Path, *, limit: int | None = None) -> list[Record]:
    """All chats of `stream_records`, or the first `limit`; raises `InputError` if there is none."""
    records = list(itertools.islice(stream_records(source), limit))
    if not records:
        raise InputError(f"{source} holds no records; give at least one chat")
    return records


def stream_records(source: str | Path, *, on_bad_record: OnBadRecord = "fail") -> Iterator[Record]:
    """Read chats one at a time; memory does not grow with their number.

    Accepted are JSON lines of `{"messages": [...], "images": [...]}`; the LLaVA form, a JSON list of
    `{"image": ..., "conversations": [{"from": "human", "value": "<image>..."}, ...]}`; parquet files
    with these columns, images as files or bytes, as in LLaVA-NeXT-Data; a folder with a
    `chats.jsonl`, with parquet files, or written by `datasets`; and a dataset of the hub, `OWNER/NAME`.
    Files of images are relative to the file that names them. Every image is opened once, so that a
    broken one is found before work is done on it.

    A record that cannot be read raises `InputError` naming file and line; with `on_bad_record`
    "skip" it is logged and left out. A file that cannot be read as a whole always raises.
    """
    skipped = 0
    for where, folder, entry in _entries(source):
        try:
            if isinstance(entry, InputError):
                raise entry
            record = _to_record(entry, folder, where)
            record.load_images()
        except InputError as error:
            if on_bad_record == "fail":
                raise
            skipped += 1
            logger.warning("skipped: %s", error)
            continue
        yield record
    if skipped:
        logger.warning("%s: %d record(s) skipped", source, skipped)


def _entries(source: str | Path) -> Iterator[tuple[str, Path, Any]]:
    """Raw records, each with where it stands and the folder of its files; an error for a broken line."""
    path = Path(source)
    if (path / "chats.jsonl").is_file():
        path = path / "chats.jsonl"
    if path.is_file() and path.suffix != ".parquet":
        for where, entry in _json_entries(path):
            yield where, path.parent, entry
        return
    dataset = _dataset(source, path)
    folder = path.parent if path.is_file() else path
    for number, row in enumerate(dataset, start=1):
        yield f"{source} row {number}", folder, row


def _json_entries(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            start = file.read(_CHUNK)
            if start.lstrip().startswith("["):
                for number, entry in enumerate(_json_list(start.lstrip()[1:], file, path), start=1):
                    yield f"{path} record {number}", entry
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path} line {number}", _json_line(line, f"{path} line {number}")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error}") from None


def _json_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return InputError(f"{where}: broken JSON: {error}")


def _json_list(text: str, file: TextIO, path: Path) -> Iterator[Any]:
    """Elements of a JSON list whose bracket is open, read as far as each needs."""
    decoder, first = json.JSONDecoder(), True
    while True:
        text = text.lstrip()
        if text.startswith("]"):
            return
        body = text if first else text.removeprefix(",").lstrip()
        complete = first or text.startswith(",")
        try:
            if not complete or not body:
                raise json.JSONDecodeError("expected a comma, a bracket or a record", text[:20], 0)
            entry, end = decoder.raw_decode(body)
        except json.JSONDecodeError as error:
            more = file.read(_CHUNK)
            if not more:
                raise InputError(f"{path}: broken JSON: {error}") from None
            text += more
            continue
        yield entry
        text, first = body[end:], False


def _dataset(source: str | Path, path: Path) -> Any:
    """Rows of parquet files, a folder of `datasets`, or the hub, images not decoded."""
    is_hub_id = not path.exists() and str(source).count("/") == 1 and not path.suffix
    files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    if not is_hub_id and not saved and (not path.exists() or not files):
        raise InputError(
            f"data {source} does not exist or holds no chats; give a JSONL file of chats, a LLaVA JSON file, "
            "parquet files, a datasets folder, or a dataset of the hub"
        )
    try:
        import datasets
    except ImportError:
        raise InputError(f"reading {source} needs the package datasets: pip install datasets") from None
    try:
        if saved:
            rows = datasets.load_from_disk(str(path))
            rows = rows["train"] if isinstance(rows, datasets.DatasetDict) else rows
        elif is_hub_id:
            rows = datasets.load_dataset(str(source), split="train", streaming=True)
        else:
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        return rows.decode(False) if hasattr(rows, "decode") else _undecoded(rows, datasets.Image)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the dataset {source}: {str(error).splitlines()[0]}") from None


def _undecoded(rows: Any, image: Any) -> Any:
    for name, feature in rows.features.items():
        if isinstance(feature, image):
            rows = rows.cast_column(name, image(decode=False))
    return rows


def _to_record(entry: Any, folder: Path, where: str) -> Record:
    if isinstance(entry, dict) and entry.get("messages") is not None:
        messages, images = _given(entry["messages"]), entry.get("images") or []
    elif isinstance(entry, dict) and "conversations" in entry:
        messages, images = _from_llava(entry, where)
    else:
        raise InputError(f"{where}: neither `messages` nor `conversations`; give one chat a record")
    if not isinstance(images, list):
        raise InputError(f"{where}: `images` must be a list of file names")
    return Record(
        messages=messages, images=[_picture(image, folder, where) for image in images], source=where
    )


def _given(value: Any) -> Any:
    """Without keys of None, which tables put where only other rows have a value."""
    if isinstance(value, list):
        return [_given(item) for item in value]
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return value


def _picture(image: Any, folder: Path, where: str) -> Picture:
    """An image as files and datasets name it: a path, or an object with `bytes` or `path`."""
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        content: bytes = image["bytes"]
        return content
    name = image.get("path") if isinstance(image, dict) else image
    if not isinstance(name, str):
        raise InputError(f"{where}: `images` must be a list of file names, not {str(image)[:80]}")
    return folder / name


def _from_llava(entry: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    turns = entry["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where}: `conversations` must be a list of objects with `from` and `value`")
    messages = []
    for turn in turns:
        speaker, value = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in _LLAVA_ROLES:
            raise InputError(f"{where}: unknown role {speaker!r}; known: {', '.join(_LLAVA_ROLES)}")
        if not isinstance(value, str):
            raise InputError(f"{where}: `value` must be text, not {value!r}")
        content: list[dict[str, str]] = []
        for i, piece in enumerate(value.split("<image>")):
            content += [{"type": "image"}] * (i > 0)
            content += [{"type": "text", "text": piece.strip("\n")}] * bool(piece.strip("\n"))
        messages.append({"role": _LLAVA_ROLES[speaker], "content": content})
    image = entry.get("image")
    return messages, image if isinstance(image, list) else [image] if image else []
