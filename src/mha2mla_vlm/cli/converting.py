"""The commands that make converted models: of an original, and of a published checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mha2mla_vlm.cli.options import (
    AdapterOption,
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
    mirrored,
)
from mha2mla_vlm.cli.results import Result
from mha2mla_vlm.cli.starting import starting
from mha2mla_vlm.conversion.config import AUTO, ConversionConfig
from mha2mla_vlm.errors import InputError, need
from mha2mla_vlm.utils.folders import check_output, claimed
from mha2mla_vlm.utils.progress import console


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
) -> Result | None:
    """Convert a model without training; a fifth of the chats is held out to measure the KL.

    One layer at a time is in memory, and an interrupted run can be resumed.
    """
    check_output(output)
    if eval_data is not None:
        need("matplotlib", "report", "--eval-data")
    with starting():
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
        return _estimate(model, records, config, dtype, target)
    streamed = {"resume": resume, "spill": spill, "dtype": dtype.value, "device": target}
    how: dict[str, Any] = {"dtype": dtype.value, "device": device}
    with shared_work(), claimed_by_first(output):
        return _convert(
            (model, adapter, records, output, config),
            streamed,
            lambda source, result: _finish_conversion(
                output, push_to_hub, result, lambda: _report(eval_data, source, output, how)
            ),
        )


def _estimate(model: str, records: Any, config: Any, dtype: DType, device: Any) -> Result:
    with starting():
        from mha2mla_vlm.conversion.estimate import predict, prediction_table

    if config.rotate_at == AUTO:
        console().print("modes and sizes are chosen by measuring; the estimate is for all layers at read")
    if config.latent_bits == AUTO:
        console().print("bits of latents, too: the time is for both ways, if calibration allows for a choice")
    prediction = predict(model, records, config, dtype=dtype.value, device=device)
    return Result(prediction.to_dict(), prediction_table(prediction))


def _convert(
    given: tuple[str, str | None, Any, Path, Any],
    options: dict[str, Any],
    then: Callable[[str, dict[str, Any]], Result],
) -> Result | None:
    """Convert with an adapter merged in, if there is one; the first of several processes does the rest."""
    with starting():
        from mha2mla_vlm.conversion.adapters import merged
        from mha2mla_vlm.conversion.on_disk import convert_checkpoint
        from mha2mla_vlm.utils.distributed import process_index, shared_work

    model, adapter, records, output, config = given
    with merged(model, adapter, output, resume=options["resume"]) as (name, source):
        converted = convert_checkpoint(name, records, output, config, source=source, **options)
        if process_index() != 0:
            return None
        with shared_work(False):
            return then(name, converted.to_dict())


def _report(data: str | None, model: str, output: Path, how: dict[str, Any]) -> dict[str, Any]:
    if data is None:
        return {}
    with starting():
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
) -> Result:
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
    return Result({"output": str(output), **result, **measured, **pushed})


def import_published(
    checkpoint: Annotated[
        Path, typer.Argument(help="A published stage 1 or stage 2 folder.", show_default=False)
    ],
    ranks: Annotated[Path, typer.Option(help="Its file of pair ranks, .pth.", show_default=False)],
    output: OutputOption,
    processor: Annotated[
        str | None, typer.Option(help="Model to take the processor from.  [default: the checkpoint's own]")
    ] = None,
) -> Result:
    """Convert a checkpoint of the published MHA2MLA-VLM code into one of ours, without loss."""
    check_output(output)
    with starting():
        from mha2mla_vlm.conversion.import_published import has_processor, import_published
        from mha2mla_vlm.model.cache.latent import bytes_per_token
        from mha2mla_vlm.model.checkpoint import load_processor, save

    source = processor or (str(checkpoint) if has_processor(checkpoint) else None)
    with claimed(output):
        loaded = None if source is None else load_processor(source)
        model = import_published(checkpoint, ranks)
        save(model, loaded, output)
    mla = model.mla_config
    return Result(
        {
            "output": str(output),
            "family": model.config.model_type.removesuffix("_mla"),
            "qk_rope_head_dim": mla.qk_rope_head_dim,
            "kv_lora_rank": mla.kv_lora_rank,
            "bytes_per_token": bytes_per_token(model.config, itemsize=model.dtype.itemsize),
            "processor": source,
        }
    )
