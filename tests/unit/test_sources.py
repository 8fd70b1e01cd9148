"""Chats from parquet, datasets folders and long lists, one at a time, and bad records among them."""

import json

import pytest
from PIL import Image

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.data.sources import StoredRecords, load_records, stream_records
from mha2mla_vlm.errors import InputError

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Ten."}]}
CHAT = {"messages": [QUESTION, ANSWER], "images": ["a.png"]}


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("a.png", 10), ("b.png", 250)):
        Image.new("RGB", (48, 48), (shade, 30, 90)).save(tmp_path / name)
    return tmp_path


def turns(human="<image>\nWhat?", gpt="A digit."):
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def llava_rows(folder):
    """Rows as LLaVA-NeXT-Data has them: images as bytes, and one record without any."""
    shown = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    rows = [{"id": str(i), "image": image, "conversations": turns()} for i, image in enumerate(shown)]
    return [*rows, {"id": "2", "image": None, "conversations": turns("What is 1 + 1?", "2")}]


def test_parquet_with_images_as_bytes(folder):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(llava_rows(folder)).cast_column("image", datasets.Image())
    (folder / "parts").mkdir()
    rows.select([0, 1]).to_parquet(folder / "parts" / "0.parquet")
    rows.select([2]).to_parquet(folder / "parts" / "1.parquet")
    for source, count in ((folder / "parts", 3), (folder / "parts" / "0.parquet", 2)):
        records = load_records(source)
        assert [len(record.images) for record in records] == [1, 1, 0][:count]
        assert records[1].load_images()[0].getpixel((0, 0)) == (250, 30, 90)
        assert message_text(records[0].messages[1]) == "A digit."


def test_a_folder_of_datasets(folder):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(llava_rows(folder)).cast_column("image", datasets.Image())
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(folder / "split")
    for name in ("saved", "split"):
        assert [len(record.images) for record in load_records(folder / name)] == [1, 1, 0]


def test_chats_in_parquet_lose_the_keys_that_only_other_rows_have(folder):
    datasets = pytest.importorskip("datasets")
    image_chat = {"messages": [QUESTION, ANSWER | {"kind": "read"}], "images": ["a.png"]}
    text_chat = {"messages": [ANSWER | {"role": "user"}, ANSWER], "images": []}
    datasets.Dataset.from_list([image_chat, text_chat]).to_parquet(folder / "chats.parquet")
    first, second = load_records(folder / "chats.parquet")
    assert first.messages == image_chat["messages"]
    assert second.messages == text_chat["messages"]
    assert first.images == [folder / "a.png"]


def test_bad_records_are_skipped_on_demand_and_counted(folder, caplog):
    (folder / "broken.png").write_bytes(b"no image")
    lines = [CHAT, "{broken", CHAT | {"images": ["broken.png"]}, CHAT | {"images": ["absent.png"]}, CHAT]
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    records = list(stream_records(path, on_bad_record="skip"))
    assert [record.source.split()[-1] for record in records] == ["1", "5"]
    logged = [record.getMessage() for record in caplog.records]
    assert [f"line {n}" in message for n, message in zip((2, 3, 4), logged, strict=False)] == [True] * 3
    assert "3 record(s) skipped" in logged[3]
    with pytest.raises(InputError, match="line 2: broken JSON"):
        list(stream_records(path))


def test_a_long_json_list_is_read_as_far_as_it_is_asked_for(folder):
    path, entry = folder / "long.json", json.dumps({"conversations": turns("What? " * 500, "7")})
    count = 800  # some megabytes, and then rubbish
    path.write_text("[" + " ,\n".join([entry] * count) + ", {rubbish", encoding="utf-8")
    stream = stream_records(path)
    assert [next(stream).source for _ in range(3)][-1] == f"{path} record 3"
    assert len(load_records(path, limit=count)) == count
    with pytest.raises(InputError, match="broken JSON"):
        load_records(path)


@pytest.mark.parametrize("text", ["[{} {}]", "[{},", "[", "[{}"])
def test_a_json_list_that_is_not_one_is_refused(folder, text):
    entry = json.dumps({"conversations": turns("What?", "7")})
    path = folder / "data.json"
    path.write_text(text.replace("{}", entry), encoding="utf-8")
    with pytest.raises(InputError, match="broken JSON"):
        load_records(path)


def test_a_dataset_that_the_hub_does_not_have_is_a_clear_error():
    """Or that cannot be asked for, where no hub is reached."""
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="no-one/nothing"):
        load_records("no-one/nothing")


def written(folder, form):
    """The same three chats in a form, as a source."""
    chats = [CHAT, {"messages": [ANSWER | {"role": "user"}, ANSWER], "images": []}, CHAT]
    if form == "lines":
        text = "\n\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats)
        (folder / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
        return folder / "data.jsonl"
    if form == "list":
        rows = [{"image": "a.png", "conversations": turns("<image>\nWhät?")} for _ in range(3)]
        rows[1] = {"conversations": turns("What is 1 + 1?", "2")}
        (folder / "data.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
        return folder / "data.json"
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(llava_rows(folder)).cast_column("image", datasets.Image())
    rows.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


@pytest.mark.parametrize("form", ["lines", "list", "parquet"])
def test_stored_records_are_those_of_the_stream(folder, form, monkeypatch):
    """By number, in any order, also where a list is read in pieces that split its characters."""
    monkeypatch.setattr("mha2mla_vlm.data.sources._CHUNK", 7)
    source = written(folder, form)
    streamed, stored = list(stream_records(source)), StoredRecords(source)
    assert len(stored) == len(streamed) == 3
    for index in (2, 0, 1):
        assert stored[index] == streamed[index]
    assert stored[1:] == streamed[1:]


def test_a_broken_line_is_told_when_it_is_asked_for(folder):
    path = folder / "data.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n\n{"messages": \n' + b"\xff\n")
    stored = StoredRecords(path)
    assert len(stored) == 3
    assert len(stored[0].images) == 1
    with pytest.raises(InputError, match="line 3: broken JSON"):
        stored[1]
    with pytest.raises(InputError, match="line 4 is not UTF-8"):
        stored[2]


def test_a_broken_list_is_not_read_to_its_end(folder, monkeypatch):
    """A record that is wrong, not unfinished, is told at once, however long the file goes on."""
    monkeypatch.setattr("mha2mla_vlm.data.sources._CHUNK", 64)
    monkeypatch.setattr("mha2mla_vlm.data.sources._LONGEST", 512)
    path = folder / "data.json"
    good = json.dumps({"conversations": turns("What?", "2")})
    path.write_bytes(f"[{good}, {{broken}}, {good}, ".encode() + b" " * 10_000 + b"\xff")
    with pytest.raises(InputError, match="broken JSON after record 1"):
        StoredRecords(path)
