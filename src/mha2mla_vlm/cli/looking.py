"""The commands that look at models: what they hold and answer, what conversions gained and lost."""

import sys
import threading
from contextlib import nullcontext
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
    load_model,
    zoo_models,
)
from mha2mla_vlm.cli.results import Result
from mha2mla_vlm.cli.starting import starting
from mha2mla_vlm.errors import InputError, need
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.utils.folders import check_file, check_output, claimed, new_folder
from mha2mla_vlm.utils.progress import status


def demo(
    model: Annotated[
        str, typer.Option(help="Name of a zoo model.", autocompletion=lambda: ZOO_NAMES)
    ] = "qwen2_5_vl",
    samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Held-out chats to evaluate on.")] = 100,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the figures.")] = None,
    device: DeviceOption = "auto",
) -> Result:
    """Convert a shipped model, compare it with the original, and measure both caches."""
    if output is not None:
        check_output(output)
    with starting():
        from mha2mla_vlm.demo import demo_table, run_demo

    result = run_demo(model, samples=samples, output=output, device=device)
    return Result(result, demo_table(result))


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
) -> Result:
    """Answer questions about images, streamed to standard error; the result has the bytes of the cache.

    In a conversation a line `/image PATH` adds an image to the next question; an empty line ends it.
    """
    with starting():
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
    return Result(found[-1].to_dict())


def inspect(checkpoint: ModelArgument) -> Result:
    """Layers, frequency pairs, ranks and bytes per token of a converted model."""
    with starting():
        from mha2mla_vlm.conversion.describe import describe, layers_table

    description = describe(checkpoint)
    return Result(description, layers_table(description))


def evaluate(
    checkpoint: ModelArgument,
    data: DataOption,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The original to compare with; a folder, hub id or zoo:NAME.", autocompletion=zoo_models
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Chats to evaluate on, at most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, help="Chats per forward pass.")] = 16,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
) -> Result:
    """Exact match of greedy answers, their cross-entropy, and the KL divergence from a baseline."""
    with starting():
        from mha2mla_vlm.data.sources import load_records
        from mha2mla_vlm.evaluation.answers import check_baseline
        from mha2mla_vlm.evaluation.answers import evaluate as evaluate_model

    records = load_records(data, limit=samples)
    if baseline is not None:
        check_baseline(checkpoint, baseline)
    model, processor = load_model(checkpoint, dtype, device)
    reference = None if baseline is None else load_model(baseline, dtype, device)[0]
    return Result(evaluate_model(model, processor, records, baseline=reference, batch_size=batch_size))


def report(
    checkpoint: ModelArgument,
    data: Annotated[
        str | None, typer.Option(help="Held-out chats; for a zoo model 100 are made.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The original; else the model it was converted from.",
            show_default=False,
            autocompletion=zoo_models,
        ),
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
) -> Result:
    """Write one HTML page: what was gained and lost, layer by layer and answer by answer."""
    with starting():
        from mha2mla_vlm.report.make import report_checkpoint

    target = output or Path(checkpoint) / "report.html"
    if output is not None:
        check_file(output)
    given: dict[str, Any] = {"data": data, "baseline": baseline}
    given |= {"samples": samples, "layer_samples": layer_samples}
    page = report_checkpoint(checkpoint, target, **given, dtype=dtype.value, device=device)
    return Result({"report": str(target), **page.quality})


def task(
    data: Annotated[str, typer.Argument(help="Chats, as --data of other commands.", show_default=False)],
    output: OutputOption,
    name: Annotated[str, typer.Option(help="Name of the task.", show_default=False)],
    max_new_tokens: MaxNewTokensOption = 32,
) -> Result:
    """Make an lmms-eval task of chats: one question for every answer, scored by exact match."""
    with starting():
        from mha2mla_vlm.data.sources import load_records
        from mha2mla_vlm.evaluation.lmms_eval.task import write_task

    with new_folder(output) as folder:
        count = write_task(name, load_records(data), folder, place=output, max_new_tokens=max_new_tokens)
    return Result({"task": name, "include_path": str(output), "answers": count})


BesideOption = Annotated[
    str | None,
    typer.Option(
        help="A model to answer beside it, such as the original.",
        show_default=False,
        autocompletion=zoo_models,
    ),
]
ExamplesOption = Annotated[
    str | None,
    typer.Option(
        help="Chats whose first questions are examples; for a zoo model some are made.",
        show_default=False,
    ),
]


def chat(
    checkpoint: ModelArgument,
    baseline: BesideOption = None,
    data: ExamplesOption = None,
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
) -> Result:
    """Serve a page that asks a model about images, beside its original."""
    need("gradio", "chat", "the page")
    with starting():
        from mha2mla_vlm.evaluation.answers import check_baseline
        from mha2mla_vlm.model.checkpoint import load_config
        from mha2mla_vlm.serving.chat.address import find_port
        from mha2mla_vlm.serving.chat.examples import example_files, example_questions
        from mha2mla_vlm.serving.chat.question import check_answer_length
        from mha2mla_vlm.serving.chat.uploads import uploads_folder

    port, ended = find_port(host, port), threading.Event()
    config = load_config(checkpoint)
    check_answer_length(config, max_new_tokens)
    if baseline is not None:
        check_baseline(checkpoint, baseline)
    questions = example_questions(config, checkpoint, data)
    names = [name for name in (baseline, checkpoint) if name is not None]
    loaded = [load_model(name, dtype, device) for name in names]
    with uploads_folder(), example_files(questions) as examples:
        with status("loading gradio"):  # which looks for the folder when imported
            from mha2mla_vlm.serving.chat.page import Side, build_page, serve

        sides = [Side(name=name, model=model) for name, (model, _) in zip(names, loaded, strict=True)]
        given: dict[str, Any] = {"examples": examples, "max_new_tokens": max_new_tokens}
        page = build_page(sides, loaded[-1][1], **given, ended=ended)
        serve(page, host=host, port=port, open_browser=browser, ended=ended)
    return Result({"models": names})


def bench(
    checkpoint: ModelArgument,
    baseline: Annotated[
        str, typer.Option(help="The original model.", show_default=False, autocompletion=zoo_models)
    ],
    context: Annotated[
        list[int] | None,
        typer.Option(min=2, max=LARGEST, help="Tokens; repeat for several.  [default: 1k, 4k, 16k, 64k]"),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, max=LARGEST, help="Batch size; repeat for several.  [default: 1, 8]"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, max=3600.0, help="Time for each comparison.")] = 2.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the rows and a plot; new or empty.")
    ] = None,
    cache_bits: CacheBitsOption = None,
    dtype: DTypeOption = DType.bfloat16,
    device: DeviceOption = "auto",
) -> Result:
    """Bytes, seconds and memory of a converted model beside its original; above 1 is a gain."""
    if output is not None:
        check_output(output)
    with starting():
        from mha2mla_vlm.bench.models import BATCHES, CONTEXTS, bench_models
        from mha2mla_vlm.bench.report import rows_table, write_report
        from mha2mla_vlm.evaluation.answers import check_baseline
        from mha2mla_vlm.model.cache.quantized import QuantizationConfig

    quantization = None if cache_bits is None else {"nbits": cache_bits}
    QuantizationConfig.from_dict(quantization or {})
    check_baseline(checkpoint, baseline)
    with nullcontext() if output is None else claimed(output):
        (converted, _), (original, _) = (load_model(name, dtype, device) for name in (checkpoint, baseline))
        result = bench_models(
            original,
            converted,
            contexts=context or CONTEXTS,
            batches=batch_size or BATCHES,
            seconds=seconds,
            quantization=quantization,
        )
        if output is not None:
            write_report(result, output)
    return Result(result, rows_table(result))
