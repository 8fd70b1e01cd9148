"""A server of the chat page in a process of its own, and a client that is no browser."""

import contextlib
import io
import json
import os
import subprocess
import sys
import uuid

import httpx
from helpers import free_port, wait_for
from PIL import Image


class Server:
    """A page about a model, in a process of its own that keeps its temporary files in `folder`."""

    def __init__(self, model, folder, *options):
        self.port, self.folder, self.log = free_port(), folder, folder.with_name(folder.name + ".log")
        folder.mkdir()
        program = [sys.executable, "-m", "mha2mla_vlm", "chat", model, "--no-browser", "--port", self.port]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*map(str, program), *map(str, options)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"TMPDIR": str(folder)},
            )
        self.address = f"http://127.0.0.1:{self.port}"
        wait_for(self.address, self.process, self.log)

    def end(self, number):
        """Exit code and standard output after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60), self.process.stdout.read().decode()


class Client:
    """What a browser does with the page, without one."""

    def __init__(self, address):
        self.http = httpx.Client(base_url=address, timeout=60)
        self.functions = {d["api_name"]: d["id"] for d in self.http.get("/config").json()["dependencies"]}

    def upload(self, data, name="image.png"):
        """Give it a file; what stands for it from then on."""
        path = self.http.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def send(self, name, *values, event=None):
        """Begin to call a function of the page, in a session of its own; the answer to the request.

        `ask` gets a third value, the conversation so far, which the page keeps itself.
        """
        self.session = uuid.uuid4().hex
        values = [*values, None] if name == "ask" else values
        call = {"data": values, "fn_index": self.functions[name], "session_hash": self.session}
        call |= {"event_data": event}
        content, headers = json.dumps(call), {"Content-Type": "application/json"}
        return self.http.post("/gradio_api/queue/join", content=content, headers=headers)

    def events(self):
        """What comes of it, message by message."""
        with self.http.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": self.session}
        ) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def call(self, name, *values, event=None):
        """All messages of a call."""
        assert self.send(name, *values, event=event).status_code == 200
        return list(self.events())

    def result(self, name, *values, event=None):
        """What a call gives."""
        events = self.call(name, *values, event=event)
        (last,) = (event for event in events if event["msg"] == "process_completed")
        return last["output"]["data"]

    def example(self, number):
        """The image of an example that is chosen."""
        return self.result("load_example", event={"index": number, "value": None})[0]

    def said(self, name, *values):
        """The errors and warnings of a call."""
        texts = []
        for event in self.call(name, *values):
            if event["msg"] == "log":
                texts.append(event["log"])
            if event["msg"] == "process_completed":
                texts.append(event["output"].get("error") or "")
        return " ".join(texts)

    def begins(self, name, *values):
        """Call a function and go on reading until it gives something; then nobody listens any more."""
        assert self.send(name, *values).status_code == 200
        self.leave("process_generating")

    def leave(self, message=None):
        """Read on until a message of some kind, then go."""
        events = self.events()
        found = any(message in (None, event["msg"]) for event in events)
        events.close()
        assert found


@contextlib.contextmanager
def crowd(address, count):
    """Within the context, that many have asked at once; the answers to their requests."""
    asking = [Client(address) for _ in range(count)]
    answers = [client.send("ask", None, "Go on?") for client in asking]
    try:
        yield answers
    finally:
        for client, answer in zip(asking, answers, strict=True):
            if answer.status_code == 200:
                client.leave()


def images_in(folder):
    """Names of the images, of any kind, in a folder and those within."""
    return [path.name for path in folder.rglob("*") if path.suffix in (".png", ".webp")]


def png(width, height):
    """Bytes of an image."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()
