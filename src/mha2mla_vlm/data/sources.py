"""Chats from files, one at a time: JSON lines, LLaVA's JSON, parquet, datasets folders, the hub."""

import codecs
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from huggingface_hub import is_offline_mode

from mha2mla_vlm.config import OnBadRecord
from mha2mla_vlm.data.records import ImageSource, Record
from mha2mla_vlm.errors import InputError, first_line, need, reading, shown
from mha2mla_vlm.utils.remote import unreachable

logger = logging.getLogger(__name__)

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_CHUNK = 2**20  # bytes of a JSON list read at a time
_LONGEST = 2**26  # characters of a string in it, beyond which a record is broken and not unfinished
_SPACE = re.compile(r"\s*")


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


class StoredRecords(Sequence[Record]):
    """The records of a source (`stream_records`) by number, each read when it is asked for.

    Of JSON files it holds where each record begins and ends; tables are mapped into memory by
    `datasets`. Getting a record raises `InputError` naming file and line if it cannot be read.
    """

    def __init__(self, source: str | Path) -> None:
        self.source, path = source, _path(source)
        if _is_json(path):
            self._file: Path | None = path
            self._spans = np.array([entry[:3] for entry in _json_spans(path)], dtype=np.int64).reshape(-1, 3)
            self._folder, self._unit = path.parent, _unit(path)
        else:
            self._file, self._rows = None, _dataset(source, path, streaming=False)
            self._folder = path.parent if path.is_file() else path

    def __len__(self) -> int:
        return len(self._rows) if self._file is None else len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._file is None:
            return _to_record(self._rows[int(index)], self._folder, f"{self.source} row {index + 1}")
        number, start, stop = map(int, self._spans[index])
        with self._file.open("rb") as file:
            file.seek(start)
            where = f"{self._file} {self._unit} {number}"
            return _to_record(_parsed(file.read(stop - start), where), self._folder, where)


def _path(source: str | Path) -> Path:
    path = Path(source)
    return path / "chats.jsonl" if (path / "chats.jsonl").is_file() else path


def _is_json(path: Path) -> bool:
    return path.is_file() and path.suffix != ".parquet"


def _entries(source: str | Path) -> Iterator[tuple[str, Path, Any]]:
    """Raw records, each with where it stands and the folder of its files; an error for a broken line."""
    path = _path(source)
    if _is_json(path):
        unit = _unit(path)
        for number, _, _, entry in _json_spans(path):
            where = f"{path} {unit} {number}"
            if isinstance(entry, bytes):
                try:
                    entry = _parsed(entry, where)
                except InputError as error:
                    entry = error
            yield where, path.parent, entry
        return
    dataset = _dataset(source, path)
    folder = path.parent if path.is_file() else path
    with reading(f"the dataset {source}"):  # files are opened when the first row is asked for
        rows = iter(dataset)
    number = 0
    while True:
        with reading(f"row {number + 1} of the dataset {source}"):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"{source} row {number}", folder, row


def _unit(path: Path) -> str:
    """What a file's records are called: elements of a list, or lines."""
    with path.open("rb") as file:
        return "record" if file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" else "line"


def _json_spans(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """Number, first and last byte of each record, and the record: parsed, or a line's bytes."""
    with path.open("rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        if _unit(path) == "record":
            yield from _json_list(file, path)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, start, start + len(line), line
            start += len(line)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise InputError(f"{where}: broken JSON: {first_line(error)}") from None


def _json_list(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """Elements of a JSON list, read as far as each needs."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, position, byte, number = "", 0, file.tell(), 0
    while True:
        start = _after_space(text, position)
        if number and text.startswith("]", start):
            return
        complete = text.startswith("," if number else "[", start)
        start = _after_space(text, start + complete)
        if not number and complete and text.startswith("]", start):
            return
        try:
            if not complete:
                raise json.JSONDecodeError("expected a comma or a bracket", text, start)
            entry, end = decoder.raw_decode(text, start)
            if end == len(text):  # a number might go on
                raise json.JSONDecodeError("the list does not end", text, end)
        except json.JSONDecodeError as error:
            hopeless = len(text) - error.pos > _LONGEST
            more = b"" if hopeless else file.read(_CHUNK)
            if not more:
                raise InputError(f"{path}: broken JSON after record {number}: {error.msg}") from None
            try:
                text, position = text[position:] + utf8.decode(more), 0
            except UnicodeDecodeError as broken:
                raise InputError(f"{path} is not UTF-8 text: {broken}") from None
            continue
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: broken JSON after record {number}: {first_line(error)}") from None
        number += 1
        first = byte + len(text[position:start].encode())
        byte = first + len(text[start:end].encode())
        position = end
        yield number, first, byte, entry


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # matches always


def _dataset(source: str | Path, path: Path, *, streaming: bool = True) -> Any:
    """Rows of parquet files, a folder of `datasets`, or the hub, images not decoded."""
    is_hub_id = not path.exists() and str(source).count("/") == 1 and not path.suffix
    files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    if not is_hub_id and not saved and (not path.exists() or not files):
        raise InputError(
            f"data {source} does not exist or holds no chats; give a JSONL file of chats, a LLaVA JSON file, "
            "parquet files, a datasets folder, or a dataset of the hub"
        )
    need("datasets", "data", f"reading {source}")
    # it reads its cache by itself where the user says that there is no hub
    if is_hub_id and not is_offline_mode() and (away := unreachable()):
        raise InputError(f"data {source} does not exist here, and {away}; HF_HUB_OFFLINE=1 reads the cache")
    import datasets

    with reading(f"the dataset {source}"):
        if saved:
            rows = datasets.load_from_disk(str(path))
            rows = rows["train"] if isinstance(rows, datasets.DatasetDict) else rows
        elif is_hub_id:
            rows = datasets.load_dataset(str(source), split="train", streaming=streaming)
        else:
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        return rows.decode(False) if hasattr(rows, "decode") else _undecoded(rows, datasets.Image)


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
        messages=messages, images=[_image_source(image, folder, where) for image in images], source=where
    )


def _given(value: Any) -> Any:
    """Without keys of None, which tables put where only other rows have a value."""
    if isinstance(value, list):
        return [_given(item) for item in value]
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return value


def _image_source(image: Any, folder: Path, where: str) -> ImageSource:
    """An image as files and datasets name it: a path, or an object with `bytes` or `path`."""
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        content: bytes = image["bytes"]
        return content
    name = image.get("path") if isinstance(image, dict) else image
    if not isinstance(name, str):
        raise InputError(f"{where}: `images` must be a list of file names, not {shown(image)}")
    return folder / name


def _from_llava(entry: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    turns = entry["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where}: `conversations` must be a list of objects with `from` and `value`")
    messages = []
    for turn in turns:
        speaker, value = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in _LLAVA_ROLES:
            raise InputError(f"{where}: unknown role {shown(speaker)}; known: {', '.join(_LLAVA_ROLES)}")
        if not isinstance(value, str):
            raise InputError(f"{where}: `value` must be text, not {shown(value)}")
        content: list[dict[str, str]] = []
        for i, piece in enumerate(value.split("<image>")):
            content += [{"type": "image"}] * (i > 0)
            content += [{"type": "text", "text": piece.strip("\n")}] * bool(piece.strip("\n"))
        messages.append({"role": _LLAVA_ROLES[speaker], "content": content})
    image = entry.get("image")
    return messages, image if isinstance(image, list) else [image] if image else []
