"""The command `mha2mla`: each command a few lines over the API, its result one JSON line on stdout."""

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from mha2mla_vlm.cli.looking import chat, evaluate, generate, inspect, report, task
from mha2mla_vlm.cli.options import (
    LARGEST,
    AdapterOption,
    CacheBitsOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    DType,
    DTypeOption,
    ModelArgument,
    OutputOption,
    PushOption,
    ResumeOption,
    SpillOption,
    finish,
    load_model,
    mirrored,
)
from mha2mla_vlm.cli.zoo import zoo_app
from mha2mla_vlm.conversion.config import AUTO, ConversionConfig
from mha2mla_vlm.errors import InputError, Interrupted, first_line, need
from mha2mla_vlm.training.config import FinetuneConfig, read_recipe
from mha2mla_vlm.utils.folders import check_output, claimed

app = typer.Typer(
    help="Convert vision-language models to multi-head latent attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
app.add_typer(zoo_app, name="zoo")
for _command in (evaluate, generate, inspect, report, chat, task):
    app.command()(_command)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where a system error happened.")] = False,
) -> None:
    """Convert vision-language models to multi-head latent attention."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Name of a zoo model.")] = "qwen2_5_vl",
    samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Held-out chats to evaluate on.")] = 100,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the figures.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Convert a shipped model, compare it with the original, and measure both caches."""
    if output is not None:
        check_output(output)
    from mha2mla_vlm.demo import print_table, run_demo

    result = run_demo(model, samples=samples, output=output, device=device)
    print_table(result)
    finish(result)


@app.command()
@mirrored(ConversionConfig)
def convert(
    model: ModelArgument,
    data: DataOption,
    output: OutputOption,
    adapter: AdapterOption = None,
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    spill: SpillOption = None,
    push_to_hub: PushOption = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Held-out chats to write OUTPUT/report.html about.", show_default=False),
    ] = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
    **options: Any,
) -> None:
    """Convert a model without training; a fifth of the chats is held out to measure the KL.

    One layer at a time is in memory, and an interrupted run can be resumed.
    """
    check_output(output)
    if eval_data is not None:
        need("matplotlib", "report", "--eval-data")
    from mha2mla_vlm.conversion.plan import plan
    from mha2mla_vlm.data.sources import load_records
    from mha2mla_vlm.model.checkpoint import load_config, pick_device
    from mha2mla_vlm.model.hub import check_repository
    from mha2mla_vlm.utils.distributed import claimed_by_first, join_processes, shared_work

    config = ConversionConfig(**{key: value for key, value in options.items() if value is not None})
    plan(load_config(model), config)
    if eval_data is not None:
        load_records(eval_data, limit=1)
    check_repository(push_to_hub)
    target, records = join_processes(pick_device(device)), load_records(data, limit=config.samples)
    if dry_run:
        _print_estimate(model, records, config, dtype, target)
        return
    streamed = {"resume": resume, "spill": spill, "dtype": dtype.value, "device": target}
    how: dict[str, Any] = {"dtype": dtype.value, "device": device}
    with shared_work(), claimed_by_first(output):
        _convert(
            (model, adapter, records, output, config),
            streamed,
            lambda source, result: _finish_conversion(
                output, push_to_hub, result, lambda: _report(eval_data, source, output, how)
            ),
        )


def _print_estimate(model: str, records: Any, config: Any, dtype: DType, device: Any) -> None:
    from mha2mla_vlm.conversion.estimate import predict, print_prediction
    from mha2mla_vlm.utils.progress import console

    if config.rotate_at == AUTO:
        console().print("modes and sizes are chosen by measuring; the estimate is for all layers at read")
    prediction = predict(model, records, config, dtype=dtype.value, device=device)
    print_prediction(prediction)
    finish(prediction.to_dict())


def _convert(
    given: tuple[str, str | None, Any, Path, Any],
    options: dict[str, Any],
    then: Callable[[str, dict[str, Any]], None],
) -> None:
    """Convert with an adapter merged in, if there is one; the first of several processes does the rest."""
    from mha2mla_vlm.conversion.adapters import merged
    from mha2mla_vlm.conversion.on_disk import convert_checkpoint
    from mha2mla_vlm.utils.distributed import process_index, shared_work

    model, adapter, records, output, config = given
    with merged(model, adapter, output, resume=options["resume"]) as source:
        temporary = adapter is not None
        converted = convert_checkpoint(source, records, output, config, temporary=temporary, **options)
        if process_index() == 0:
            with shared_work(False):
                then(source, converted.to_dict())


def _report(data: str | None, model: str, output: Path, how: dict[str, Any]) -> dict[str, Any]:
    if data is None:
        return {}
    from mha2mla_vlm.report.make import report_checkpoint

    path = output / "report.html"
    try:
        made = report_checkpoint(str(output), path, data=data, baseline=model, **how)
    except InputError as error:
        again = f"mha2mla report {output} --data {data} --baseline {model}"
        raise InputError(f"the model is in {output}, without its report: {error}; try: {again}") from None
    return {"report": str(path), "quality": made.quality}


def _finish_conversion(
    output: Path, repository: str | None, result: dict[str, Any], report: Callable[[], dict[str, Any]]
) -> None:
    """Report, and send the model where it is to go."""
    from mha2mla_vlm.model.card import write_card
    from mha2mla_vlm.model.checkpoint import load_config
    from mha2mla_vlm.model.hub import push
    from mha2mla_vlm.model.origin import read_findings

    measured = report()
    if measured or repository is not None:  # which the card is to say
        known = {"findings": read_findings(output), "evaluation": measured.get("quality")}
        write_card(load_config(output), output, name=repository or output.resolve().name, **known)
    pushed = {} if repository is None else {"pushed": push(output, repository)}
    finish({"output": str(output), **result, **measured, **pushed})


@app.command()
@mirrored(FinetuneConfig)
def finetune(
    checkpoint: ModelArgument,
    data: DataOption,
    output: OutputOption,
    config: Annotated[
        Path | None, typer.Option(help="Recipe, YAML; the options below change it.", show_default=False)
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Chats to measure on; else some are held out.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Original to learn from; else the one it was converted from.", show_default=False),
    ] = None,
    **options: Any,
) -> None:
    """Train a converted model on chats; an interrupted run is resumed where it stopped.

    Run it under `accelerate launch` for many processes.
    """
    check_output(output)
    recipe = read_recipe(config, **options)
    from mha2mla_vlm.training.run import finetune as finetune_model
    from mha2mla_vlm.training.run import is_main_process

    result = finetune_model(checkpoint, data, output, recipe, eval_data=eval_data, baseline=baseline)
    if is_main_process():
        finish(result)


@app.command()
def bench(
    checkpoint: ModelArgument,
    baseline: Annotated[str, typer.Option(help="The original model.", show_default=False)],
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
) -> None:
    """Bytes, seconds and memory of a converted model beside its original; above 1 is a gain."""
    if output is not None:
        check_output(output)
    from mha2mla_vlm.bench.models import BATCHES, CONTEXTS, bench_models
    from mha2mla_vlm.bench.report import print_rows, write_report
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
        print_rows(result)
        if output is not None:
            write_report(result, output)
    finish(result)


@app.command("import-published")
def import_published(
    checkpoint: Annotated[
        Path, typer.Argument(help="A published stage 1 or stage 2 folder.", show_default=False)
    ],
    ranks: Annotated[Path, typer.Option(help="Its file of pair ranks, .pth.", show_default=False)],
    output: OutputOption,
    processor: Annotated[
        str | None, typer.Option(help="Model to take the processor from.  [default: the checkpoint's own]")
    ] = None,
) -> None:
    """Convert a checkpoint of the published MHA2MLA-VLM code into one of ours, without loss."""
    check_output(output)
    from mha2mla_vlm.conversion.import_published import has_processor, import_published
    from mha2mla_vlm.model.cache.latent import bytes_per_token
    from mha2mla_vlm.model.checkpoint import load_processor, save

    source = processor or (str(checkpoint) if has_processor(checkpoint) else None)
    with claimed(output):
        loaded = None if source is None else load_processor(source)
        model = import_published(checkpoint, ranks)
        save(model, loaded, output)
    mla = model.mla_config
    finish(
        {
            "output": str(output),
            "family": model.config.model_type.removesuffix("_mla"),
            "qk_rope_head_dim": mla.qk_rope_head_dim,
            "kv_lora_rank": mla.kv_lora_rank,
            "bytes_per_token": bytes_per_token(model.config, itemsize=model.dtype.itemsize),
            "processor": source,
        }
    )


def _is_of_the_system(error: Exception) -> bool:
    """Whether an error is none of the program: PyTorch has a `RuntimeError` for memory that is lacking."""
    lacking = ("out of memory", "can't allocate memory")
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in lacking)


def _set_up_logging() -> None:
    """Ours on standard error, without that of transformers."""
    from rich.logging import RichHandler
    from transformers.utils import logging as transformers_logging

    from mha2mla_vlm.utils.progress import console

    handler = RichHandler(console=console(), show_time=False, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("mha2mla_vlm").setLevel(logging.INFO)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it raises is our line
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is on disk
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def main() -> None:
    """Entry point: quiet libraries, messages on stderr, bad input as one line and exit code 2."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        _set_up_logging()
        app()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:  # what disks, files, network and memory can cause
        if "--debug" in sys.argv or not _is_of_the_system(error):
            raise
        print(f"error: {first_line(error)}; --debug shows where", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as interrupt:
        print(f"interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        sys.exit(130)
