"""The page itself, in Gradio."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.chat.live import Moment, live_answer
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.generation import prompt_record

MAX_UPLOAD = "10mb"
MAX_WAITING = 16  # questions
NOTE = (
    "Both models get the same question, one after the other, so that their speeds compare. "
    "The cache is that of the whole chat, measured on its tensors."
)


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
) -> gr.Blocks:
    """A page with a picture, a question, and an answer of each of `sides`; `examples` fill both."""

    def ask(path: str | None, question: str) -> Iterator[list[str]]:
        if not question.strip():
            raise gr.Error("Write a question first.")
        record = prompt_record(question.strip(), [] if path is None else [_opened(path)])
        shown = [text for _ in sides for text in ("", "waiting")]
        for number, side in enumerate(sides):
            moments = live_answer(side.model, processor, record, max_new_tokens=max_new_tokens)
            for moment in moments:
                shown[2 * number : 2 * number + 2] = [moment.text, _state(moment)]
                yield shown

    with gr.Blocks(title="mha2mla-vlm") as page:
        gr.Markdown(f"## {' and '.join(side.name for side in sides)}\n{NOTE}")
        with gr.Row():
            picture: Any = gr.File(
                label="Picture", file_types=["image"], type="filepath", elem_id="picture", height=120
            )
            with gr.Column():
                question = gr.Textbox(label="Question", lines=2, elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
        preview = gr.Image(label="Shown", interactive=False, height=260, visible=False, elem_id="preview")
        outputs = []
        with gr.Row():
            for number, side in enumerate(sides):
                with gr.Column():
                    outputs.append(gr.Textbox(label=side.name, lines=4, elem_id=f"answer-{number}"))
                    outputs.append(gr.Textbox(label="cache", lines=1, elem_id=f"cache-{number}"))
        picture.change(_preview, picture, preview)
        button.click(ask, [picture, question], outputs, concurrency_limit=1, concurrency_id="models")
        question.submit(ask, [picture, question], outputs, concurrency_limit=1, concurrency_id="models")
        if examples:
            gr.Examples([[str(path), text] for path, text in examples], [picture, question])
    return page.queue(max_size=MAX_WAITING)


def _opened(path: str) -> Image.Image:
    """The picture in a file; says on the page if it is none."""
    try:
        return prompt_record("", [Path(path)]).load_images()[0]
    except InputError:
        raise gr.Error("That file is not a picture that can be read: give PNG, JPEG or WebP.") from None


def _preview(path: str | None) -> Any:
    return gr.Image(value=None if path is None else _opened(path), visible=path is not None)


def _state(moment: Moment) -> str:
    """Bytes of the cache, and the speed."""
    rate = "" if moment.rate is None else f", {moment.rate:.1f} tokens a second"
    return f"{moment.cache_bytes:,} bytes for {moment.cached_tokens:,} tokens{rate}"


def serve(page: gr.Blocks, *, host: str, port: int | None, open_browser: bool) -> None:
    """Serve until interrupted."""
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        max_file_size=MAX_UPLOAD,
        show_error=True,
        quiet=True,
    )
