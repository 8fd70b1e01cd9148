"""The commands that look at a model: what it holds, what it answers, what its conversion gained and lost."""

import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from mha2mla_vlm.cli.options import (
    LARGEST,
    CacheBitsOption,
    DataOption,
    DeviceOption,
    DType,
    DTypeOption,
    MaxNewTokensOption,
    ModelArgument,
    OutputOption,
    finish,
    load_model,
)
from mha2mla_vlm.errors import InputError, need
from mha2mla_vlm.utils.folders import check_file


def generate(
    checkpoint: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="The question.", show_default=False)] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image; repeat for several.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read more questions from standard input, one a line.")
    ] = False,
    max_new_tokens: MaxNewTokensOption = 128,
    cache_bits: CacheBitsOption = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
) -> None:
    """Answer questions about images, streamed to standard error; the result has the bytes of the cache.

    In a conversation a line `/image PATH` adds an image to the next question; an empty line ends it.
    """
    from mha2mla_vlm.model.cache.quantized import QuantizationConfig
    from mha2mla_vlm.serving.chat.conversation import Conversation, converse

    if prompt is None and not interactive:
        raise InputError("give a question with --prompt, or --interactive")
    quantization = {} if cache_bits is None else {"nbits": cache_bits}
    QuantizationConfig.from_dict(quantization)
    conversation = Conversation()
    for path in image or []:
        conversation.show(path)
    options = {"max_new_tokens": max_new_tokens, "quantization": quantization}
    model, processor = load_model(checkpoint, dtype, device)
    questions = [prompt] if prompt is not None else []

    def stream(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    lines, found = sys.stdin if interactive else (), []
    for answer in converse(conversation, model, processor, questions, lines, stream=stream, **options):
        print(file=sys.stderr)
        found.append(answer)
    if not found:
        raise InputError("no question was asked")
    finish(found[-1].to_dict())


def inspect(checkpoint: ModelArgument) -> None:
    """Layers, frequency pairs, ranks and bytes per token of a converted model."""
    from mha2mla_vlm.conversion.describe import describe, print_layers

    description = describe(checkpoint)
    print_layers(description)
    finish(description)


def evaluate(
    checkpoint: ModelArgument,
    data: DataOption,
    baseline: Annotated[
        str | None, typer.Option(help="The original to compare with; a folder, hub id or zoo:NAME.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Chats to evaluate on, at most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, help="Chats per forward pass.")] = 16,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
) -> None:
    """Exact match of greedy answers, their cross-entropy, and the KL divergence from a baseline."""
    from mha2mla_vlm.data.sources import load_records
    from mha2mla_vlm.evaluation.answers import check_baseline
    from mha2mla_vlm.evaluation.answers import evaluate as evaluate_model

    records = load_records(data, limit=samples)
    if baseline is not None:
        check_baseline(checkpoint, baseline)
    model, processor = load_model(checkpoint, dtype, device)
    reference = None if baseline is None else load_model(baseline, dtype, device)[0]
    finish(evaluate_model(model, processor, records, baseline=reference, batch_size=batch_size))


def report(
    checkpoint: ModelArgument,
    data: Annotated[
        str | None, typer.Option(help="Held-out chats; for a zoo model 100 are made.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The original; else the model it was converted from.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.  [default: CHECKPOINT/report.html]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Chats to evaluate on, at most.")
    ] = None,
    layer_samples: Annotated[
        int, typer.Option(min=0, max=LARGEST, help="Chats to measure the loss of each layer on; 0 skips it.")
    ] = 16,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
) -> None:
    """Write one HTML page: what was gained and lost, layer by layer and answer by answer."""
    from mha2mla_vlm.report.make import report_checkpoint

    target = output or Path(checkpoint) / "report.html"
    if output is not None:
        check_file(output)
    given: dict[str, Any] = {"data": data, "baseline": baseline}
    given |= {"samples": samples, "layer_samples": layer_samples}
    page = report_checkpoint(checkpoint, target, **given, dtype=dtype.value, device=device)
    finish({"report": str(target), **page.quality})


def task(
    data: Annotated[str, typer.Argument(help="Chats, as --data of other commands.", show_default=False)],
    output: OutputOption,
    name: Annotated[str, typer.Option(help="Name of the task.", show_default=False)],
    max_new_tokens: MaxNewTokensOption = 32,
) -> None:
    """Make an lmms-eval task of chats: one question for every answer, scored by exact match."""
    from mha2mla_vlm.data.sources import load_records
    from mha2mla_vlm.evaluation.lmms_eval.task import write_task
    from mha2mla_vlm.utils.folders import new_folder

    with new_folder(output) as folder:
        count = write_task(name, load_records(data), folder, place=output, max_new_tokens=max_new_tokens)
    finish({"task": name, "include_path": str(output), "answers": count})


def chat(
    checkpoint: ModelArgument,
    baseline: Annotated[
        str | None,
        typer.Option(help="A model to answer beside it, such as the original.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens it to others.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="[default: the first free from 7860]")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    max_new_tokens: MaxNewTokensOption = 128,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
) -> None:
    """Serve a page that asks a model about images, beside its original."""
    need("gradio", "chat", "the page")
    from mha2mla_vlm.evaluation.answers import check_baseline
    from mha2mla_vlm.model.checkpoint import load_config
    from mha2mla_vlm.serving.chat.address import find_port
    from mha2mla_vlm.serving.chat.examples import zoo_examples
    from mha2mla_vlm.serving.chat.question import check_answer_length
    from mha2mla_vlm.serving.chat.uploads import uploads_folder

    port, ended = find_port(host, port), threading.Event()
    check_answer_length(load_config(checkpoint), max_new_tokens)
    if baseline is not None:
        check_baseline(checkpoint, baseline)
    names = [name for name in (baseline, checkpoint) if name is not None]
    loaded = [load_model(name, dtype, device) for name in names]
    with uploads_folder(), zoo_examples(loaded[-1][0].config, checkpoint) as examples:
        from mha2mla_vlm.serving.chat.page import (  # gradio looks for the folder when imported
            Side,
            build_page,
            serve,
        )

        sides = [Side(name=name, model=model) for name, (model, _) in zip(names, loaded, strict=True)]
        given: dict[str, Any] = {"examples": examples, "max_new_tokens": max_new_tokens}
        page = build_page(sides, loaded[-1][1], **given, ended=ended)
        serve(page, host=host, port=port, open_browser=browser, ended=ended)
    finish({"models": names})
