"""Fine-tuning of a converted model, from a folder to a folder."""

import contextlib
import json
import logging
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from math import ceil, isnan
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerCallback

from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.data.records import Record
from mha2mla_vlm.data.sources import StoredRecords
from mha2mla_vlm.errors import InputError, reading, shown
from mha2mla_vlm.evaluation.answers import check_comparable
from mha2mla_vlm.model.checkpoint import load, load_config, load_processor, resolve
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.files import weights_digest
from mha2mla_vlm.model.origin import original_is_missing, original_of, shared_name
from mha2mla_vlm.training.config import FinetuneConfig
from mha2mla_vlm.training.freezing import set_trained, with_lora
from mha2mla_vlm.training.records import Chats, Chosen, Collator, choose
from mha2mla_vlm.training.result import RESULT, STATE, write_model, write_rest, write_trained_card
from mha2mla_vlm.training.trainer import RecoveryTrainer
from mha2mla_vlm.utils.compat import enable_checkpointing
from mha2mla_vlm.utils.distributed import claimed_by_first, shared_work
from mha2mla_vlm.utils.folders import check_output, discard, put_in_place, writing
from mha2mla_vlm.utils.progress import kept, status

logger = logging.getLogger(__name__)
MEASURES = ("exact_match", "kl", "cross_entropy")
Source = str | Path | Sequence[Record]


def finetune(
    checkpoint: str | Path,
    data: Source,
    output: str | Path,
    config: FinetuneConfig = FinetuneConfig(),
    *,
    eval_data: Source | None = None,
    baseline: str | Path | None = None,
) -> dict[str, Any]:
    """Train a checkpoint on chats and write one of the same kind; returns what it gained.

    `checkpoint` is a converted model (only partial RoPE, only latents, or both) or an original one;
    `baseline`, by default the model it was converted from, is the teacher, and what `kl` compares with.
    Works in `OUTPUT.partial`, from where an interrupted run with the same arguments is resumed, also under
    `accelerate launch`. Raises `InputError` for bad input before any work.
    """
    path = check_output(output)
    baseline = baseline or original_of(checkpoint)
    if baseline is None and config.needs_baseline:
        raise original_is_missing(
            checkpoint, "--baseline MODEL, or train on labels only with --distillation 0"
        )
    if baseline is None:
        logger.warning("the original of %s is not known: no KL is measured without --baseline", checkpoint)
    _processes()  # which meet, if there are several
    with contextlib.ExitStack() as claim:
        with shared_work():
            claim.enter_context(claimed_by_first(path))
        result = _finetune(checkpoint, data, path, config, eval_data, baseline)
    return {"output": str(output), **result}


def _finetune(
    checkpoint: str | Path,
    data: Source,
    path: Path,
    config: FinetuneConfig,
    eval_data: Source | None,
    baseline: str | Path | None,
) -> dict[str, Any]:
    """What `finetune` does once no other run may write to `path`."""
    records, eval_records = _records(data), None if eval_data is None else _records(eval_data)
    sources = {"checkpoint": checkpoint, "data": data, "eval_data": eval_data, "baseline": baseline}
    settings = {key: _name(source) for key, source in sources.items()} | asdict(config)
    folder = path.with_name(path.name + ".partial")
    settings |= {"weights": [_weights(checkpoint), _weights(baseline)]}
    _check_folder(folder)
    processor = load_processor(checkpoint)
    how = {"dtype": config.loaded_dtype, "attn_implementation": config.attn_implementation}
    model = load(checkpoint, **how)
    original = None if baseline is None else load(baseline, **how)
    if original is not None:
        check_comparable(model, original)
    stored = load_config(checkpoint).dtype or model.dtype
    dtype = stored if config.dtype == "auto" else model.dtype
    model = prepare(model, config)
    _arguments(config, folder, examples=1, hidden=AttentionSizes.of(model.config).hidden)
    on = "resume with the same command"
    with kept(folder, on), writing(folder, kept=f"; what is done is kept, {on}"):
        with _processes().main_process_first():
            chosen = _chosen(folder, settings, records, eval_records, processor, config)
        chats = Chats(records, chosen.train)
        held_out = Chats(records if eval_records is None else eval_records, chosen.held_out)
        with status("preparing to train"):  # and between its bars
            trainer = make_trainer(model, processor, chats, held_out, config, folder, original)
            result = _train(trainer, folder) | {"too_long": chosen.too_long, "unreadable": chosen.unreadable}
        with status("writing the model"):
            write_model(trainer, folder / RESULT, dtype)
        if trainer.is_world_process_zero():
            processor.save_pretrained(folder / RESULT)
            shown = {key: shared_name(settings[key]) if settings[key] else None for key in sources}
            write_rest(folder, settings | shown | {"result": result})
            write_trained_card(checkpoint, folder / RESULT, path.name, result)
            put_in_place(folder / RESULT, path)
    if trainer.is_world_process_zero():
        discard(folder, path)
    trainer.accelerator.wait_for_everyone()
    return result


def _processes() -> PartialState:
    """The processes that train together: this one, or those that a launcher started."""
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main_process() -> bool:
    """Whether this process is the one that reports."""
    return _processes().is_main_process


def prepare(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """Freeze all but what a recipe trains, or put adapters around it."""
    if config.lora_rank is None:
        set_trained(model, config.trains)
    else:
        model = with_lora(model, config.trains, config.lora_rank)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def make_trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chats: Chats,
    held_out: Chats,
    config: FinetuneConfig,
    folder: Path,
    teacher: PreTrainedModel | None = None,
) -> RecoveryTrainer:
    """transformers' trainer for a recipe and a model that is prepared for it."""
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    return RecoveryTrainer(
        model,
        _arguments(config, folder, len(chats), AttentionSizes.of(model.config).hidden),
        data_collator=Collator(processor=processor, visual_token_ids=visual),
        train_dataset=chats,
        eval_dataset=held_out,
        recipe=config,
        teacher=teacher,
    )


def _arguments(config: FinetuneConfig, folder: Path, examples: int, hidden: int) -> TrainingArguments:
    """A recipe as transformers says it; raises `InputError` for what transformers refuses."""
    per_step = config.batch_size * config.gradient_accumulation * _processes().num_processes
    steps = config.max_steps or ceil(config.epochs * ceil(examples / per_step))
    warmup = round(config.warmup * steps)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.rate(hidden),
        "weight_decay": config.weight_decay,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": {
            "num_decay_steps": min(round(config.decay * steps), steps - warmup),
            "decay_type": "1-sqrt",
        },
        "bf16": config.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": max(1, steps // 100),
        "eval_strategy": "no" if config.evaluate_every is None else "steps",
        "eval_steps": config.evaluate_every,
        "save_steps": config.save_every or max(1, steps // 10),
        "save_total_limit": 2,
        "seed": config.seed,
        "dataloader_num_workers": config.workers,
        "train_sampling_strategy": "random" if config.shuffle else "sequential",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else [],
    }
    _check_numbers(config.training_arguments)
    with reading("training_arguments"):
        arguments = TrainingArguments(**(values | config.training_arguments))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # one that is not installed would fail in the trainer, after the work folder is made
    if arguments.n_gpu > 1:  # the trainer would copy the model to all of them in every step
        raise InputError(
            f"{arguments.n_gpu} GPUs are visible to one process; run under accelerate launch, "
            "or leave one visible (CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments


def _check_numbers(arguments: dict[str, Any]) -> None:
    """Raise `InputError` for text where transformers' own default is a number: it would fail much later."""
    for item in fields(TrainingArguments):
        value = arguments.get(item.name, item.default)
        if type(item.default) in (int, float) and type(value) not in (int, float):
            raise InputError(f"training_arguments: {item.name} = {shown(value)}: give a number")
        if item.name in ("adam_beta1", "adam_beta2") and value >= 1:
            raise InputError(f"training_arguments: {item.name} = {value}: give a number below 1")


def _train(trainer: RecoveryTrainer, folder: Path) -> dict[str, Any]:
    """Measure, train from the last checkpoint there is, measure again."""
    first = _First(folder / STATE)
    trainer.args.eval_on_start = first.measures is None
    trainer.add_callback(first)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    after = trainer.evaluate()
    return {
        "steps": trainer.state.global_step,
        "examples": round((trainer.state.epoch or 0) * len(trainer.train_dataset)),
        **{f"{name}_before": _number(value) for name, value in (first.measures or {}).items()},
        **{name: _number(after[f"eval_{name}"]) for name in MEASURES},
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "seconds_per_step": trainer.bar.seconds_per_step,
        "peak_memory_bytes": _peak_memory(),
    }


class _First(TrainerCallback):
    """Keeps what was measured before the first step, in the state file for a run that is resumed.

    Measuring is left to `eval_on_start`: a trainer that evaluates before it trains does not wrap its
    model for several processes any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measures: dict[str, float] | None = json.loads(path.read_text()).get("before")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Keep the first."""
        if self.measures is None and metrics is not None:
            self.measures = {name: metrics[f"eval_{name}"] for name in MEASURES}
            if state.is_world_process_zero:
                _write(self.path, json.loads(self.path.read_text()) | {"before": self.measures})


def _number(value: float) -> float | None:
    """JSON has no nan, which is the KL without a teacher."""
    return None if isnan(value) else value


def _peak_memory() -> int:
    """Bytes at most in use: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint; one that was being written when the run was killed is removed."""
    numbered = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if _is_readable(path / "trainer_state.json")]  # written last
    if _processes().is_main_process:
        for path in set(found) - set(whole):
            shutil.rmtree(path)
    return str(whole[-1]) if whole else None


def _is_readable(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_state(path: Path) -> bool:
    """Whether a file is what `_chosen` writes."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        Chosen(**state["chosen"])
        return isinstance(state["settings"], dict)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _weights(name: str | Path | None) -> dict[str, str] | None:
    """What the weights of a model in a folder are; None for one of the hub, which its name identifies."""
    folder = None if name is None else Path(resolve(name))
    return weights_digest(folder) if folder is not None and folder.is_dir() else None


def _check_folder(folder: Path) -> None:
    """Raise `InputError` if the work folder holds anything but an unfinished run."""
    if not folder.exists():
        return
    begun = folder.is_dir() and {path.name for path in folder.iterdir()} <= {"state.tmp"}
    if not begun and not _is_state(folder / STATE):
        raise InputError(f"{folder} is there and holds no unfinished run; choose another output, or move it")


def _name(source: Source | None) -> str | None:
    """How a source is identified; for records, how many."""
    if source is None or isinstance(source, (str, Path)):
        return None if source is None else str(source)
    return f"{len(source)} records"


def _records(source: Source) -> Sequence[Record]:
    return StoredRecords(source) if isinstance(source, (str, Path)) else source


def _chosen(
    folder: Path,
    settings: dict[str, Any],
    records: Sequence[Record],
    eval_records: Sequence[Record] | None,
    processor: ProcessorMixin,
    config: FinetuneConfig,
) -> Chosen:
    """The chats of a run; an interrupted run keeps those it started with."""
    path = folder / STATE
    if path.is_file():
        state = json.loads(path.read_text())
        if state["settings"] != json.loads(json.dumps(settings)):
            changed = [key for key in settings if settings[key] != state["settings"].get(key)]
            raise InputError(
                f"{folder} holds an unfinished run with other settings ({', '.join(changed)}); "
                "give the same ones to resume, or remove the folder"
            )
        return Chosen(**state["chosen"])
    how: dict[str, Any] = {
        "max_length": config.max_length,
        "seed": config.seed,
        "on_bad_record": config.on_bad_record,
        "workers": config.workers,
    }
    chosen = choose(records, processor, held_out=0 if eval_records else config.eval_samples, **how)
    if eval_records is not None:
        others = choose(eval_records, processor, held_out=0, **how)
        chosen = Chosen(**chosen.to_dict() | {"held_out": others.train})
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, {"settings": settings, "chosen": chosen.to_dict()})
    return chosen


def _write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(path)
