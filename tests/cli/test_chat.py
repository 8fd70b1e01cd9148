"""What `mha2mla chat` refuses, and how its answers end: all that needs no gradio."""

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
from mha2mla_vlm.serving.chat.live import live_answer
from mha2mla_vlm.serving.chat.question import MAX_QUESTION, check_answer_length, open_upload, question_record
from mha2mla_vlm.serving.chat.uploads import FOLDER, uploads_folder


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
