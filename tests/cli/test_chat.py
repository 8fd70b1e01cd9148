"""What `mha2mla chat` refuses, and how its answers end: all that needs no gradio."""

import json
import os
import socket
import threading

import pytest
import torch
from helpers import original, random_mla
from PIL import Image

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.serving.chat.address import FIRST_PORT, LAST_PORT, find_port
from mha2mla_vlm.serving.chat.examples import example_files, example_questions
from mha2mla_vlm.serving.chat.live import TIMED, Moment, live_answer
from mha2mla_vlm.serving.chat.question import (
    MAX_QUESTION,
    MAX_TURNS,
    Turn,
    check_answer_length,
    open_upload,
    question_record,
)
from mha2mla_vlm.serving.chat.transcript import answers_html, fraction, marked, saving_html
from mha2mla_vlm.serving.chat.uploads import FOLDER, uploads_folder
from mha2mla_vlm.zoo.chats import write_chats


@pytest.fixture
def taken():
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_is_taken_is_refused(taken, host):
    with pytest.raises(InputError, match=f"--port {taken} is taken"):
        find_port(host, taken)


def test_the_first_free_port_is_found(taken):
    found = find_port("127.0.0.1", None)
    assert FIRST_PORT <= found <= LAST_PORT
    with socket.create_server(("127.0.0.1", found)):
        assert find_port("127.0.0.1", None) > found
    assert find_port("127.0.0.1", found) == found  # connections that ended are in nobody's way


@pytest.mark.parametrize("host", ["", "no such host", "http://127.0.0.1", "192.0.2.1", "a" * 70])
def test_a_host_that_is_not_this_machine_is_refused(host):
    with pytest.raises(InputError, match="give an address of this machine"):
        find_port(host, None)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_hosts_may_be_of_ipv6(host):
    assert find_port(host, None) >= FIRST_PORT
    server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with server, pytest.raises(InputError, match="is taken"):
        find_port(host, server.getsockname()[1])


@pytest.mark.parametrize("question", [None, "", "  \n"])
def test_an_empty_question_is_refused(question):
    with pytest.raises(InputError, match="write a question"):
        question_record(None, question)


def test_a_question_has_a_limit():
    assert message_text(question_record(None, "é" * MAX_QUESTION + "\n").messages[0]) == "é" * MAX_QUESTION
    with pytest.raises(InputError, match="2,001 characters; ask in at most 2,000"):
        question_record(None, "é" * (MAX_QUESTION + 1))


def test_an_image_is_refused_with_the_reason_and_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "many.png")  # 169 megapixels in a few kilobytes
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.svg").write_text("<svg/>")
    monkeypatch.setattr(Image.Image, "convert", None)
    for name, says in (
        ("many.png", "has 13000 x 13000 pixels; give at most 89,478,485"),
        ("empty.png", "image of 0 bytes cannot be read: it is none of PNG, JPEG"),
        ("page.svg", "it is none of PNG, JPEG"),
        ("absent.png", "is not kept any longer; give it again"),
    ):
        for read in (open_upload, lambda path: question_record(path, "What is this?")):
            with pytest.raises(InputError, match=says) as refused:
                read(str(tmp_path / name))
            assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "TIFF"])
def test_an_image_is_read(tmp_path, file_format):
    Image.new("P", (30, 20), 1).save(tmp_path / "image.png", file_format)
    (image,) = question_record(str(tmp_path / "image.png"), "What is this?").load_images()
    assert (image.mode, image.size) == ("RGB", (30, 20))


def test_answers_are_no_longer_than_chats_can_be():
    config = original("llava")[0].config
    room = config.get_text_config().max_position_embeddings
    check_answer_length(config, room)
    with pytest.raises(InputError, match=f"--max-new-tokens {room + 1}: .* room for {room:,} tokens"):
        check_answer_length(config, room + 1)


@pytest.mark.parametrize("wanted", [None, "files"])
def test_uploads_have_a_folder_that_is_gone_at_the_end(tmp_path, monkeypatch, wanted):
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if wanted is not None:
        monkeypatch.setenv(FOLDER, str(tmp_path / wanted))

    def interrupted():
        with uploads_folder() as folder:
            assert os.environ[FOLDER] == str(folder)
            assert folder.parent == (tmp_path if wanted is None else tmp_path / wanted)
            assert folder.stat().st_mode & 0o077 == 0  # nobody else's
            (folder / "upload").mkdir()
            (folder / "upload" / "a.png").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [path for path in tmp_path.rglob("*") if path.name != wanted]
    assert os.environ.get(FOLDER) == (None if wanted is None else str(tmp_path / wanted))


def endless(make, name="llava"):
    """A model that never ends its answer by itself."""
    model, processor = make(name)
    model.generation_config.eos_token_id = None
    return model, processor


def answering():
    """Whether a model is at work."""
    return any("(run)" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("make", [original, random_mla])
@pytest.mark.parametrize("how", ["nobody listens", "the page ends"])
def test_an_answer_ends_before_its_end(make, how):
    model, processor = endless(make)
    ended = threading.Event()
    moments = live_answer(model, processor, question_record(None, "Go on?"), max_new_tokens=1500, ended=ended)
    assert [next(moments).new_tokens for _ in range(3)] == [1, 2, 3]
    assert answering()
    if how == "nobody listens":
        moments.close()
    else:
        ended.set()
        assert sum(1 for _ in moments) < 1000
    assert not answering()


def test_a_page_that_ended_answers_nothing():
    model, processor = original("llava")
    ended = threading.Event()
    ended.set()
    record = question_record(None, "Go on?")
    assert list(live_answer(model, processor, record, max_new_tokens=4, ended=ended)) == []


def test_a_broken_model_gives_the_reason_instead_of_an_answer():
    model, processor = original("llava")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    record = question_record(None, "Go on?")
    moments = live_answer(model, processor, record, max_new_tokens=4, ended=threading.Event())
    with pytest.raises(InputError, match="not finite"):
        list(moments)


def test_an_image_that_a_family_cannot_take_is_refused(tmp_path):
    Image.new("RGB", (3000, 1)).save(tmp_path / "wide.png")
    model, processor = original("qwen2_5_vl")
    record = question_record(str(tmp_path / "wide.png"), "What is this?")
    with pytest.raises(InputError, match=r"question: .*aspect ratio"):
        list(live_answer(model, processor, record, max_new_tokens=4, ended=threading.Event()))


def moment(text, tokens=60, size=252):
    return Moment(text=text, new_tokens=1, cached_tokens=tokens, cache_bytes=tokens * size, seconds=0.0)


def turn(*answers, image=None):
    answers = tuple(moment(text) for text in answers)
    return Turn(question="And here?", image=image, thumbnail=None, answers=answers)


def test_each_model_goes_on_with_its_own_answers(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "image.png")
    earlier = [turn("one", "1", image=str(tmp_path / "image.png")), turn("two", "2")]
    for side, said in ((0, ["one", "two"]), (1, ["1", "2"])):
        record = question_record(None, "Sure?", earlier, side)
        texts = [message_text(message) for message in record.messages]
        assert texts == ["And here?", said[0], "And here?", said[1], "Sure?"]
        assert len(record.images) == 1
    (tmp_path / "image.png").unlink()
    with pytest.raises(InputError, match="is not kept any longer"):
        question_record(None, "Sure?", earlier)


def test_a_conversation_has_a_limit(monkeypatch):
    question_record(None, "Sure?", [turn("one")] * (MAX_TURNS - 1))
    with pytest.raises(InputError, match=f"at most {MAX_TURNS} questions; begin a new one"):
        question_record(None, "Sure?", [turn("one")] * MAX_TURNS)
    model, processor = original("llava")
    monkeypatch.setattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 40)
    record = question_record(None, "Go on?" * 10)
    with pytest.raises(
        InputError, match="an answer up to 30, and the model has room for 40; begin a new one"
    ):
        next(live_answer(model, processor, record, max_new_tokens=30, ended=threading.Event()))


@pytest.mark.parametrize(
    ("text", "other", "shown"),
    [
        ("255 636 754", "255 636 754", "255 636 754"),
        ("255 636 754", "255 6365 754", "255 <mark>636</mark> 754"),
        ("a\n <b>  c", "a c", "a\n <mark>&lt;b&gt;</mark>  c"),
        ("", "all", ""),
        ("all ${x}", "", "<mark>all</mark> <mark>&#36;&#123;x&#125;</mark>"),
    ],
)
def test_words_that_differ_are_marked(text, other, shown):
    assert marked(text, other) == shown


def test_the_saving_is_that_of_the_bytes():
    names = ["original", "<small>"]
    text = saving_html(names, [moment("a", size=2048), moment("a")])
    assert text == (
        "<strong>1/8 of the cache</strong>&lt;small&gt;: 15.1 kB instead of 122.9 kB for the 60 tokens of "
        "this conversation"
    )
    assert "12.3% for each token" in saving_html(names, [moment("a", size=2048), moment("b c", tokens=90)])
    assert "No smaller cache" in saving_html(names, [moment("a"), moment("a")])
    assert saving_html(names[:1], [moment("a")]) == ""
    assert [fraction(share) for share in (0.5, 0.1875, 0.252, 0.9)] == ["1/2", "18.8%", "1/4", "90.0%"]


def test_a_speed_is_said_once_there_are_tokens_to_tell():
    given = {"text": "", "cached_tokens": 1, "cache_bytes": 1, "seconds": 0.5}
    rates = [Moment(new_tokens=tokens, **given).rate for tokens in (1, 2, TIMED - 1, TIMED)]
    assert rates == [None, None, None, 2 * (TIMED - 1)]


def test_only_whole_answers_are_compared():
    sides = ["one", "two"]
    assert "<mark>" not in answers_html(sides, [moment("a"), moment("b")])
    assert "waiting" in answers_html(sides, [moment("a"), None])
    assert answers_html(sides, [moment("a"), moment("b")], whole=True).count("<mark>") == 2
    assert "The same answer." in answers_html(sides, [moment("a b"), moment("a  b")], whole=True)
    assert "<mark>" not in answers_html(["one"], [moment("a")], whole=True)


def test_examples_are_the_first_questions_of_chats_about_one_image(tmp_path):
    write_chats("llava", tmp_path, split="train", samples=9, seed=0)
    config = original("llava")[0].config
    found = example_questions(config, "model", str(tmp_path))
    assert len(found) == 4
    with example_files(found) as files:
        assert [text for _, text in files] == [text for _, text in found]
        assert [Image.open(path).size for path, _ in files] == [image.size for image, _ in found]
    assert example_questions(config, "model", None) == []
    assert len(example_questions(config, "zoo:llava", None)) == 4
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
    )
    with pytest.raises(InputError, match=r"text\.jsonl: none of the first"):
        example_questions(config, "model", str(tmp_path / "text.jsonl"))
