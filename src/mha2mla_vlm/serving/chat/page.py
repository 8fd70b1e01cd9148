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
from mha2mla_vlm.serving.chat.live import live_answer
from mha2mla_vlm.serving.chat.question import MAX_QUESTION, Turn, open_upload, question_record, thumbnail
from mha2mla_vlm.serving.chat.transcript import (
    answers_html,
    history_html,
    question_html,
    saving_html,
)

MAX_UPLOAD = "10mb"
MAX_WAITING = 16  # questions
KEPT = (60, 3600)  # seconds: every minute, images that were given an hour ago are deleted
PREVIEW = 1024  # pixels, on the longer side
NOTES = (
    "Bytes are those of the cache of the whole conversation, measured on its tensors.",
    "Both models get the same questions, one after the other, so that their speeds compare; each has its own "
    "answers in its conversation.",
)
EMPTY = '<p class="empty">Give an image, ask about it, and go on asking.</p>'
STOPPED = '<p class="empty">Stopped: a question without all its answers is not part of the conversation.</p>'
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=("system-ui", "sans-serif"))
STYLE = Path(__file__).with_name("page.css")
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

    names = [side.name for side in sides]
    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "ended": ended}

    def ask(path: str | None, question: str | None, turns: list[Turn]) -> Iterator[dict[Any, Any]]:
        with _told():
            records = [question_record(path, question, turns, number) for number in range(len(sides))]
            text, small = str(question).strip(), thumbnail(path)
            moments: list[Any] = [None] * len(sides)
            asked = history_html(names, turns, question_html(text, small))
            for number, (side, record) in enumerate(zip(sides, records, strict=True)):
                for moment in live_answer(side.model, processor, record, **given):
                    if not any(moments):  # it was accepted
                        yield {said.history: asked, said.note: "", asking.image: None, asking.question: ""}
                    moments[number] = moment
                    yield {said.now: answers_html(names, moments)}
            turn = Turn(question=text, image=path, thumbnail=small, answers=tuple(moments))
            end = {
                said.now: answers_html(names, moments, whole=True),
                said.saving: saving_html(names, moments),
            }
            yield {**end, said.turns: [*turns, turn]}

    with gr.Blocks(title="mha2mla-vlm", analytics_enabled=False, delete_cache=KEPT) as page:
        notes = " ".join(NOTES[: len(sides)])
        gr.Markdown(f"## {' and '.join(names)}\n{notes}")
        said, asking = _conversation(), _inputs()
        models: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
        models |= {"show_progress": "minimal", "show_progress_on": said.now}
        inputs = [asking.image, asking.question, said.turns]
        outputs = [asking.image, asking.question, *said.all()]
        asked = [t(ask, inputs, outputs, **models) for t in (asking.button.click, asking.question.submit)]
        asking.stop.click(lambda: STOPPED, None, said.note, cancels=asked, api_name="stop")
        asking.new.click(_anew, None, said.all(), cancels=asked, api_name="new")
        if examples:
            _examples(examples, asking, said, asked)
    return page.queue(max_size=MAX_WAITING)


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What was said: turns that are part of the conversation, and how they are shown."""

    turns: Any
    saving: Any
    history: Any
    now: Any
    note: Any

    def all(self) -> list[Any]:
        """The components."""
        return [self.turns, self.saving, self.history, self.now, self.note]


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """An image and a question, and what asks, stops and begins anew."""

    image: Any
    question: Any
    button: Any
    stop: Any
    new: Any


def _conversation() -> _Said:
    return _Said(
        turns=gr.State([], time_to_live=KEPT[1]),
        saving=gr.HTML(elem_id="saving"),
        history=gr.HTML(elem_id="history"),
        now=gr.HTML(EMPTY, elem_id="now", elem_classes="turn"),
        note=gr.HTML(elem_id="note"),
    )


def _inputs() -> _Asking:
    """An image with its preview, a question, and buttons."""
    with gr.Row():
        with gr.Column(scale=2, min_width=240):
            image: Any = gr.File(
                label="Image", file_types=["image"], type="filepath", elem_id="image", height=120
            )
            look: dict[str, Any] = {"height": 150, "visible": False, "buttons": ["fullscreen"]}
            preview = gr.Image(show_label=False, interactive=False, **look, elem_id="preview")
        with gr.Column(scale=3, min_width=240):
            question = gr.Textbox(
                label="Question",
                info=f"{MAX_QUESTION:,} characters at most",
                lines=2,
                max_length=MAX_QUESTION,
                elem_id="question",
            )
            with gr.Row():
                button = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
                new = gr.Button("New chat", elem_id="new", min_width=80)
    image.change(_preview, image, preview)
    return _Asking(image=image, question=question, button=button, stop=stop, new=new)


def _examples(
    examples: Sequence[tuple[Path, str]], asking: _Asking, said: _Said, asked: Sequence[Any]
) -> None:
    """Thumbnails; one that is chosen begins a conversation with its image and question."""
    gr.set_static_paths([path for path, _ in examples])  # copies would be deleted as uploads are

    def load_example(chosen: gr.SelectData) -> list[Any]:
        path, text = examples[int(chosen.index)]
        return [str(path), text, *_anew()]

    gr.Markdown("#### Begin with an example")
    gallery = gr.Gallery(
        [(str(path), text) for path, text in examples],
        show_label=False,
        columns=len(examples),
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="examples",
    )
    outputs = [asking.image, asking.question, *said.all()]
    gallery.select(load_example, None, outputs, cancels=asked, show_progress="hidden")


def _anew() -> list[Any]:
    """A conversation that has not begun."""
    return [[], "", "", EMPTY, ""]


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
            css_paths=STYLE,
            theme=THEME,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except Exception as error:  # of many kinds: gradio asks itself for the page, which a proxy may prevent
        raise InputError(
            f"cannot serve the page at {host}, port {port}: {first_line(error)}; if there is a proxy, set "
            "NO_PROXY=localhost,127.0.0.1"
        ) from error
    return str(address)
