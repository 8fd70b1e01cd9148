"""The page itself, in Gradio."""

import contextlib
import html
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.errors import InputError, first_line
from mha2mla_vlm.serving.chat.live import Moment, live_answer
from mha2mla_vlm.serving.chat.question import MAX_QUESTION, open_upload, question_record

MAX_UPLOAD = "10mb"
MAX_WAITING = 16  # questions
KEPT = (60, 3600)  # seconds: every minute, images that were given an hour ago are deleted
PREVIEW = 1024  # pixels, on the longer side
NOTES = (
    "The cache is that of the whole chat, measured on its tensors.",
    "Both models get the same question, one after the other, so that their speeds compare.",
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model that answers, and the name over its answers."""

    name: str
    model: PreTrainedModel


def build_page(
    sides: Sequence[Side],
    processor: ProcessorMixin,
    *,
    examples: Sequence[tuple[Path, str]] = (),
    max_new_tokens: int = 128,
    ended: threading.Event,
) -> gr.Blocks:
    """A page with an image, a question, and an answer of each of `sides`; `examples` fill both.

    `ended` stops answers that are under way.
    """

    def ask(path: str | None, question: str | None) -> Iterator[list[str]]:
        with _told():
            record = question_record(path, question)
            shown = [text for _ in sides for text in ("", "waiting")]
            for number, side in enumerate(sides):
                given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "ended": ended}
                for moment in live_answer(side.model, processor, record, **given):
                    shown[2 * number : 2 * number + 2] = [moment.text, _state(moment)]
                    yield shown

    with gr.Blocks(title="mha2mla-vlm", analytics_enabled=False, delete_cache=KEPT) as page:
        notes = " ".join(NOTES[: len(sides)])
        gr.Markdown(f"## {' and '.join(side.name for side in sides)}\n{notes}")
        image, question, button, stop = _inputs()
        outputs = _outputs(sides)
        models: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
        asked = [
            trigger(ask, [image, question], outputs, **models) for trigger in (button.click, question.submit)
        ]
        stop.click(None, cancels=asked)
        if examples:
            gr.set_static_paths([path for path, _ in examples])  # copies would be deleted as uploads are
            gr.Examples([[str(path), text] for path, text in examples], [image, question])
    return page.queue(max_size=MAX_WAITING)


def _inputs() -> tuple[Any, Any, Any, Any]:
    """An image with its preview, a question, and what asks it and stops the answer."""
    with gr.Row():
        image: Any = gr.File(
            label="Image", file_types=["image"], type="filepath", elem_id="image", height=120
        )
        with gr.Column():
            question = gr.Textbox(
                label="Question",
                info=f"{MAX_QUESTION:,} characters at most",
                lines=2,
                max_length=MAX_QUESTION,
                elem_id="question",
            )
            with gr.Row():
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop")
    look: dict[str, Any] = {"height": 260, "visible": False, "buttons": ["fullscreen"]}
    preview = gr.Image(label="Shown", interactive=False, **look, elem_id="preview")
    image.change(_preview, image, preview)
    return image, question, button, stop


def _outputs(sides: Sequence[Side]) -> list[Any]:
    """Of each side its answer and the cache behind it."""
    outputs = []
    with gr.Row():
        for number, side in enumerate(sides):
            with gr.Column():
                outputs.append(gr.Textbox(label=side.name, lines=4, elem_id=f"answer-{number}"))
                outputs.append(gr.Textbox(label="cache", lines=1, elem_id=f"cache-{number}"))
    return outputs


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with the input is said on the page, not in the log."""
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def _preview(path: str | None) -> Any:
    """The image, small; nothing, and the reason, for what cannot be asked about."""
    image = None
    if path is not None:
        try:
            image = open_upload(path)
            image.thumbnail((PREVIEW, PREVIEW))
        except InputError as error:
            gr.Warning(html.escape(str(error)))
    return gr.Image(value=image, visible=image is not None)


def _state(moment: Moment) -> str:
    """Bytes of the cache, and the speed."""
    rate = "" if moment.rate is None else f", {moment.rate:.1f} tokens per second"
    return f"{moment.cache_bytes:,} bytes for {moment.cached_tokens:,} tokens{rate}"


def serve(page: gr.Blocks, *, host: str, port: int, open_browser: bool, ended: threading.Event) -> None:
    """Serve until interrupted, or until the terminal is closed; `ended` is set then."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(hangup, signal.default_int_handler)
    try:
        address = _launch(page, host, port, open_browser)
        logger.info("the page is at %s; Ctrl-C ends it", address)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        logger.info("the page ends")
    finally:
        ended.set()
        page.close(verbose=False)


def _launch(page: gr.Blocks, host: str, port: int, open_browser: bool) -> str:
    """Begin to serve; the address."""
    bare = host.strip("[]")
    try:
        _, address, _ = page.launch(
            server_name=f"[{bare}]" if ":" in bare else bare,
            server_port=port,
            inbrowser=open_browser,
            max_file_size=MAX_UPLOAD,
            show_error=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
        )
    except Exception as error:  # of many kinds: gradio asks itself for the page, which a proxy may prevent
        raise InputError(
            f"cannot serve the page at {host}, port {port}: {first_line(error)}; if there is a proxy, set "
            "NO_PROXY=localhost,127.0.0.1"
        ) from error
    return str(address)
