"""The chat page's server: several at once, requests that come past the page, and what is left at its end."""

import json
import signal
import socket
import threading
import time

import pytest
from chat_client import Client, Server, crowd, images_in, png
from helpers import free_port, original, run_command

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.serving.chat import page
from mha2mla_vlm.serving.chat.uploads import FOLDER

pytestmark = pytest.mark.pages


@pytest.fixture
def client(server):
    return Client(server.address)


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("", "write a question first"),
        (None, "write a question first"),
        ("long " * 4000, "the question has 19,999 characters; ask in at most 2,000"),
        ("a\ud800", "question: half a surrogate pair"),
        ("What is <image>?", "&lt;image&gt;"),
    ],
)
def test_a_question_that_comes_past_the_page_is_refused(client, question, says):
    assert says in client.said("ask", None, question)


@pytest.mark.parametrize("function", ["ask", "_preview"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png(13_000, 13_000), "13000 x 13000 pixels; give at most 89,478,485"),
        (b"", "image of 0 bytes cannot be read"),
        (b"<svg/>", "none of PNG, JPEG"),
    ],
    ids=["many pixels", "empty", "svg"],
)
def test_an_image_is_refused_with_the_reason(client, function, data, says):
    image = client.upload(data)
    assert says in client.said(function, *([image, "What is this?"] if function == "ask" else [image]))


def test_an_image_of_any_shape_has_a_preview(client):
    for width, height in ((1, 1), (3000, 1), (20_000, 10)):
        assert client.said("_preview", client.upload(png(width, height))) == ""


def test_who_leaves_frees_the_model(server):
    for _ in range(3):
        Client(server.address).begins("ask", None, "Go on?")
    start = time.monotonic()
    Client(server.address).begins("ask", None, "And now?")
    assert time.monotonic() - start < 30  # each of the others would have taken a minute


def test_many_may_wait_but_not_more(server):
    with crowd(server.address, page.MAX_WAITING + 4) as answers:
        assert [answer.status_code for answer in answers[: page.MAX_WAITING + 1]] == [200] * (
            page.MAX_WAITING + 1
        )
        assert answers[-1].status_code == 503
        assert "Queue is full" in answers[-1].text
    client = Client(server.address)  # they left, and there is room again
    end = time.monotonic() + 60
    while client.send("ask", None, "And now?").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.5)
    client.leave("process_generating")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_no_image_stays_on_the_disk(endless, tmp_path, name):
    """Also when it ends while the model answers and while an image is being sent."""
    server = Server(endless, tmp_path / "tmp", "--max-new-tokens", 1500)
    client = Client(server.address)
    image = client.upload(png(60, 60))
    client.said("_preview", image)
    assert {"image.png", "image.webp"} <= set(images_in(server.folder))
    assert client.send("ask", image, "What is this?").status_code == 200
    events = client.events()
    assert any(event["msg"] == "process_generating" for event in events)
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        head = 'Content-Disposition: form-data; name="files"; filename="b.png"\r\nContent-Type: image/png\r\n'
        half.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            + head.encode()
            + b"\r\n"
            + png(9, 9)
        )
        time.sleep(1)
        code, printed = server.end(getattr(signal, name))
    events.close()
    assert code == 0, server.log.read_text()
    assert json.loads(printed) == {"models": [str(endless)]}
    assert "Traceback" not in server.log.read_text()
    assert not [path for path in server.folder.rglob("*") if path.is_file()]


def test_an_image_is_not_kept_for_ever_while_the_page_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "KEPT", (1, 15))
    monkeypatch.setenv(FOLDER, str(tmp_path / "uploads"))
    (tmp_path / "example.png").write_bytes(png(60, 60))
    model, processor = original("llava")
    side, examples = page.Side(name="it", model=model), [(tmp_path / "example.png", "What is this?")]
    blocks = page.build_page([side], processor, examples=examples, max_new_tokens=2, ended=threading.Event())
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())
    try:
        client = Client(address)
        image = client.upload(png(80, 80))
        assert client.said("_preview", image) == ""
        assert client.said("ask", image, "What is this?") == ""
        example = client.example(0)
        assert client.said("ask", example, "What is this?") == ""
        assert len(images_in(tmp_path / "uploads")) == 2
        end = time.monotonic() + 60
        while images_in(tmp_path / "uploads"):
            assert time.monotonic() < end
            time.sleep(0.5)
        assert "is not kept any longer; give it again" in client.said("ask", image, "What is this?")
        example = client.example(0)
        assert client.said("ask", example, "And this?") == ""
    finally:
        blocks.close(verbose=False)


@pytest.mark.parametrize("why", ["port", "proxy"])
def test_what_comes_in_the_way_later_is_one_line_too(monkeypatch, why):
    model, processor = original("llava")
    given = {"host": "127.0.0.1", "port": free_port(), "open_browser": False, "ended": threading.Event()}
    if why == "proxy":
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
    blocks = page.build_page([page.Side(name="it", model=model)], processor, ended=given["ended"])
    other = socket.create_server(("127.0.0.1", given["port"] if why == "port" else 0))
    says = f"cannot serve the page at 127.0.0.1, port {given['port']}: "
    with other, pytest.raises(InputError, match=says):
        page.serve(blocks, **given)
    assert given["ended"].is_set()


def test_what_cannot_be_served_is_refused_before_weights_are_loaded(monkeypatch, capsys, tmp_path):
    for name, family in (("model", "llava"), ("other", "qwen2_5_vl")):
        model, processor = original(family)
        model.config.save_pretrained(tmp_path / name)  # without weights
        processor.save_pretrained(tmp_path / name)

    def refused(*options):
        code, out, err = run_command(monkeypatch, capsys, "chat", tmp_path / "model", *options)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"error: --port {port} is taken" in refused("--port", port)
    assert "error: --host 192.0.2.1: " in refused("--host", "192.0.2.1")
    assert "error: --max-new-tokens 1000000: " in refused("--max-new-tokens", 1_000_000)
    assert "error: the baseline has family qwen2_5_vl" in refused("--baseline", tmp_path / "other")
    assert "error: cannot read the weights" in refused("--baseline", tmp_path / "model")
