"""Chats: what is read, what is refused and how, and which tokens carry labels."""

import copy
import functools
import json

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from mha2mla_vlm.data.records import IGNORE_INDEX, Record, encode, encode_with_labels, message_text
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.architectures import new_model

IMAGE = {"type": "image"}
CLOSING = {"qwen2_5_vl": "<|im_end|>", "llava_next": "<|eot_id|>", "llava": "</s>", "qwen3_vl": "<|im_end|>"}


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in content]}


def answer(value):
    return {"role": "assistant", "content": [text(value)]}


def draw(width=48, height=48, shade=200):
    return Image.new("RGB", (width, height), (shade, 30, 90))


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("a.png", 10), ("b.png", 250)):
        draw(shade=shade).save(tmp_path / name)
    return tmp_path


def write_lines(folder, *entries):
    path = folder / "data.jsonl"
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json(folder, *entries):
    path = folder / "data.json"
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return path


def turns(human="<image>\nWhat?", gpt="A digit."):
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def test_lines_of_chats_are_read_in_order_with_their_images(folder):
    first = {"messages": [user(IMAGE, "What?"), answer("Ten.")], "images": ["a.png"]}
    second = {"messages": [user("Hello."), answer("Hi.")]}
    third = {"messages": [user(IMAGE, IMAGE, "Same?"), answer("No.")], "images": ["b.png", "a.png"]}
    records = load_records(write_lines(folder, first, "", second, third))
    assert [record.messages for record in records] == [entry["messages"] for entry in (first, second, third)]
    assert [[path.name for path in record.images] for record in records] == [
        ["a.png"],
        [],
        ["b.png", "a.png"],
    ]
    shades = [image.getpixel((0, 0))[0] for image in records[2].load_images()]
    assert shades == [250, 10]
    assert records[1].source.endswith("line 3")


def test_a_folder_stands_for_the_chats_in_it_and_limit_for_the_first_ones(folder):
    entries = [{"messages": [user(str(i)), answer("x")]} for i in range(4)]
    write_lines(folder, *entries).rename(folder / "chats.jsonl")
    assert len(load_records(folder)) == 4
    assert [message_text(record.messages[0]) for record in load_records(folder, limit=2)] == ["0", "1"]


def test_content_may_be_a_plain_string(folder):
    entry = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]}
    (record,) = load_records(write_lines(folder, entry))
    assert [message["content"] for message in record.messages] == [[text("Hello.")], [text("Hi.")]]
    assert record.answers() == [1]


def test_llava_file_with_one_image_a_list_of_images_and_text_only(folder):
    one = {"id": 1, "image": "a.png", "conversations": turns() + turns("And now?", "Still.")}
    two = {"id": 2, "image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>\nSame?", "No.")}
    none = {"id": 3, "conversations": turns("Hello.", "Hi.")}
    records = load_records(write_json(folder, one, two, none))
    assert [len(record.images) for record in records] == [1, 2, 0]
    assert records[0].messages == [
        user(IMAGE, "What?"),
        answer("A digit."),
        user("And now?"),
        answer("Still."),
    ]
    assert records[1].messages[0] == user(IMAGE, IMAGE, "Same?")
    assert records[2].messages == [user("Hello."), answer("Hi.")]
    assert records[2].source.endswith("record 3")


def test_llava_placeholder_after_the_question_keeps_its_place(folder):
    (record,) = load_records(write_json(folder, {"image": "a.png", "conversations": turns("What?\n<image>")}))
    assert record.messages[0] == user("What?", IMAGE)


def test_before_an_answer_is_the_chat_and_the_images_shown_so_far():
    messages = [user(IMAGE, "One?"), answer("1"), user(IMAGE, "Two?"), answer("2")]
    record = Record(messages=messages, images=[draw(shade=1), draw(shade=2)])
    first, second = (record.before(index) for index in record.answers())
    assert (len(first.messages), len(first.images)) == (1, 1)
    assert (len(second.messages), len(second.images)) == (3, 2)


CHAT = {"messages": [user(IMAGE, "What?"), answer("Ten.")], "images": ["a.png"]}
BAD_LINES = {
    "broken JSON": ('{"messages": [', ["line 2", "broken JSON"]),
    "unknown role": (
        CHAT | {"messages": [{"role": "wizard", "content": "x"}]},
        ["line 2", "'wizard'", "assistant"],
    ),
    "no role": (CHAT | {"messages": ["x"]}, ["line 2", "None"]),
    "no messages": (CHAT | {"messages": []}, ["line 2", "no messages"]),
    "not a chat": ({"prompt": "x"}, ["line 2", "messages", "conversations"]),
    "number": ("3", ["line 2", "messages", "conversations"]),
    "content of no type": ({"messages": [{"role": "user", "content": 3}]}, ["line 2", "content"]),
    "part of no type": ({"messages": [{"role": "user", "content": ["x"]}]}, ["line 2", "content"]),
    "missing image": (CHAT | {"images": ["gone.png"]}, ["line 2", "gone.png", "does not exist"]),
    "too many images": (
        CHAT | {"images": ["a.png", "b.png"]},
        ["line 2", "2 image(s)", "1 image placeholder"],
    ),
    "too few images": (CHAT | {"images": []}, ["line 2", "0 image(s)", "1 image placeholder"]),
    "one name for a list": (CHAT | {"images": "a.png"}, ["line 2", "images", "list"]),
    "text for an image": (CHAT | {"images": ["data.jsonl"]}, ["line 2", "data.jsonl", "cannot be read"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_and_value(folder, case):
    bad, wanted = BAD_LINES[case]
    path = write_lines(folder, CHAT, bad)
    with pytest.raises(InputError) as error:
        load_records(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert [part for part in wanted if part not in message] == []


BAD_LLAVA = {
    "unknown role": ({"conversations": [{"from": "robot", "value": "x"}]}, ["record 2", "'robot'", "human"]),
    "missing image": ({"image": "gone.png", "conversations": turns()}, ["record 2", "gone.png"]),
    "no placeholder": (
        {"image": "a.png", "conversations": turns("What?")},
        ["record 2", "1 image(s)", "0 image"],
    ),
    "no image": ({"conversations": turns()}, ["record 2", "0 image(s)", "1 image"]),
}


@pytest.mark.parametrize("case", BAD_LLAVA)
def test_a_bad_llava_record_is_refused_with_file_record_and_value(folder, case):
    bad, wanted = BAD_LLAVA[case]
    path = write_json(folder, {"conversations": turns("Hello.", "Hi.")}, bad)
    with pytest.raises(InputError) as error:
        load_records(path)
    assert [part for part in [str(path), *wanted] if part not in str(error.value)] == []


def test_a_truncated_image_is_refused_by_name(folder):
    path = folder / "broken.png"
    noise = torch.randint(0, 255, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    whole = path.read_bytes()
    for kept in (10, 60, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match=r"line 1.*broken\.png cannot be read"):
            load_records(write_lines(folder, CHAT | {"images": ["broken.png"]}))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_line_separators_of_unicode_are_text_not_the_end_of_a_record(folder, separator):
    line = json.dumps({"messages": [user(f"a{separator}b"), answer("x")]}, ensure_ascii=False)
    (record,) = load_records(write_lines(folder, line))
    assert message_text(record.messages[0]) == f"a{separator}b"


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"messages": [{"role": "user", "content": "caf\xe9"}]}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl"):
        load_records(path)


@pytest.mark.parametrize(
    "conversations", [None, "x", ["x"], [{"from": "human", "value": None}], [{"from": []}]]
)
def test_llava_turns_of_a_wrong_shape_are_refused(folder, conversations):
    first = {"conversations": turns(human="What?")}
    path = write_json(folder, first, {"conversations": conversations})
    with pytest.raises(InputError, match="record 2"):
        load_records(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_an_empty_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no records"):
        load_records(path)


def test_a_missing_file_and_a_folder_without_chats_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        load_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"holds no chats; give a JSONL file"):
        load_records(tmp_path)


def test_a_broken_json_list_is_refused_by_name(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"conversations": [}', encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.json: broken JSON"):
        load_records(path)


@functools.cache
def parts_of(name):
    """Processor, ids that count as visual and id of the placeholder of a zoo model."""
    model, processor = new_model(name)
    return processor, get_family(name).visual_token_ids(model.config), model.config.image_token_id


def two_turns():
    messages = [user(IMAGE, "Which digit is in row 1, column 2?"), answer("7")]
    messages += [user(IMAGE, "Picture 2: Read all digits."), answer("12 34 user 5")]
    return Record(messages=messages, images=[draw(96, 96), draw(96, 48)])


def short_chat():
    return Record(messages=[user(IMAGE, "How many digits are 7?"), answer("3")], images=[draw(48, 48)])


def text_chat():
    messages = [{"role": "system", "content": "Be brief."}, user("Hello."), answer("Hi there, USER: you")]
    return Record(messages=messages)


RECORDS = {"turns": two_turns, "short": short_chat, "text": text_chat}


def labelled(processor, batch, row):
    """Decoded text of each contiguous stretch of labels in a row."""
    labels = batch["labels"][row]
    stretches, current = [], []
    for value in [*labels.tolist(), IGNORE_INDEX]:
        if value != IGNORE_INDEX:
            current.append(value)
        elif current:
            stretches.append(processor.tokenizer.decode(current))
            current = []
    return stretches


def expected_labels(name, record):
    return [message_text(record.messages[index]) + CLOSING[name] for index in record.answers()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chats", [["turns"], ["text"], ["turns", "short"], ["text", "turns", "short"]])
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_labels_are_exactly_the_answers_and_what_closes_them(name, chats, side):
    processor, visual, placeholder = parts_of(name)
    processor.tokenizer.padding_side = side
    records = [RECORDS[chat]() for chat in chats]
    batch = encode_with_labels(processor, records, visual)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    for row, record in enumerate(records):
        assert labelled(processor, batch, row) == expected_labels(name, record)
        assert bool((ids[row] == placeholder).any()) == bool(record.images)
    kept = labels != IGNORE_INDEX
    assert torch.equal(labels[kept], ids[kept])
    assert not bool(torch.isin(ids[kept], torch.tensor(visual)).any())
    assert bool(mask[kept].all())
    if len(chats) > 1:
        padded = mask[:, 0] if side == "left" else mask[:, -1]
        assert not bool(padded.all()), "the batch has no padding, so the test would show nothing"


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_a_batch_holds_the_tokens_of_each_chat_alone(name):
    processor, visual, _ = parts_of(name)
    processor.tokenizer.padding_side = "left"
    records = [two_turns(), short_chat(), text_chat()]
    batch = encode_with_labels(processor, records, visual)
    for row, record in enumerate(records):
        alone = encode_with_labels(processor, [record], visual)
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][real], alone["input_ids"][0])
        assert torch.equal(batch["labels"][row][real], alone["labels"][0])


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_the_generation_prompt_ends_where_the_first_label_begins(name):
    processor, visual, _ = parts_of(name)
    processor.tokenizer.padding_side = "left"
    record = two_turns()
    whole = encode_with_labels(processor, [record], visual)
    for index, wanted in zip(record.answers(), expected_labels(name, record), strict=True):
        prompt = encode(processor, [record.before(index)], generation_prompt=True)["input_ids"][0]
        assert torch.equal(whole["input_ids"][0, : len(prompt)], prompt)
        rest = whole["labels"][0, len(prompt) :].tolist()
        stretch = rest[: rest.index(IGNORE_INDEX)] if IGNORE_INDEX in rest else rest
        assert processor.tokenizer.decode(stretch) == wanted


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_a_chat_without_an_answer_has_no_labels(name):
    processor, visual, _ = parts_of(name)
    record = Record(messages=[user(IMAGE, "What?")], images=[draw()])
    assert bool((encode_with_labels(processor, [record], visual)["labels"] == IGNORE_INDEX).all())


@pytest.fixture(scope="module")
def vicuna():
    """The shipped LLaVA-1.5 way: no BOS in the template, a tokenizer that adds it, a space after answers."""
    processor = copy.deepcopy(new_model("llava")[1])
    tokenizer = processor.tokenizer
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    processor.chat_template = (
        "{% for message in messages %}"
        "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
        "{% for part in message['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    return processor


def test_a_first_token_that_the_template_leaves_out_is_added(vicuna):
    record = Record(messages=[user("Read."), answer("7")])
    ids = encode(vicuna, [record])["input_ids"][0]
    assert (ids == vicuna.tokenizer.bos_token_id).nonzero()[:, 0].tolist() == [0]


def test_answers_are_found_where_their_end_merges_with_the_next_turn(vicuna):
    record = Record(messages=[user("Read."), answer("7"), user("Again."), answer("35")])
    batch = encode_with_labels(vicuna, [record], [vicuna.image_token_id])
    labels = batch["labels"][0]
    text = vicuna.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert text.split() == ["7", "35"]


def test_a_template_that_raises_is_bad_input(vicuna):
    refusing = copy.deepcopy(vicuna)
    refusing.chat_template = "{{ raise_exception('no such chat') }}"
    with pytest.raises(InputError, match="no such chat"):
        encode(refusing, [Record(messages=[user("Read.")])])


def test_a_kind_that_is_not_text_is_refused():
    with pytest.raises(InputError, match="kind"):
        Record(messages=[user("Read."), {**answer("7"), "kind": None}])
