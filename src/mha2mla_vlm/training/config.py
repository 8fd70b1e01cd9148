"""What a fine-tuning does, as a recipe file or the command line says it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from mha2mla_vlm.config import OnBadRecord, Strict
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.training.policies import find_policy

_POSITIVE = (
    "learning_rate",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "max_length",
    "lora_rank",
    "eval_records",
    "evaluate_every",
    "save_every",
)
RATE = 0.05  # learning rate times width
DTYPES = ("auto", "float32", "bfloat16")


def option(default: Any, text: str) -> Any:
    """A field with its line of help, which the command line shows too."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Strict):
    """One stage of training. Without a file, the defaults are our single stage.

    `training_arguments` go to `transformers.TrainingArguments` as they are, over what is set here.
    """

    trains: str = option("attention-and-norms", "What trains: a policy, by name or published alias.")
    distillation: float = option(1.0, "Share of the original in the loss; 0 is labels alone.")
    attention_loss: float = option(1.0, "Weight of its attention outputs beside the KL to its answers.")
    alignment: float = option(0.0, "Share of the steps that first align the layers' attention outputs.")
    learning_rate: float | None = option(None, "Peak learning rate; else 0.05 over the hidden size.")
    warmup: float = option(0.1, "Share of the steps over which the learning rate grows, linearly.")
    decay: float = option(0.9, "Share of the steps, the last, over which it falls to 0, as 1 - sqrt.")
    weight_decay: float = option(0.0, "Of AdamW.")
    epochs: float = option(1.0, "Passes over the data.")
    max_steps: int | None = option(None, "Optimiser steps, instead of epochs.")
    batch_size: int = option(1, "Chats per forward pass and process.")
    gradient_accumulation: int = option(16, "Forward passes per optimiser step.")
    max_length: int = option(4096, "Tokens; longer chats are dropped and counted, never cut.")
    shuffle: bool = option(True, "Draw chats in random order.")
    seed: int = option(0, "Of the order, of the chats held out, and of LoRA's weights.")
    lora_rank: int | None = option(None, "Train LoRA adapters of this rank and merge them at the end.")
    dtype: str = option("auto", "Number format of frozen weights; what trains is float32.")
    bf16: bool = option(True, "Compute in bfloat16 (autocast).")
    attn_implementation: str | None = option(
        None, "sdpa, eager, flash_attention_2; else transformers' choice."
    )
    gradient_checkpointing: bool = option(False, "Compute activations again instead of storing them.")
    eval_records: int = option(128, "Chats held out from the data to measure on, unless some are given.")
    evaluate_every: int | None = option(None, "Steps between measurements; else before and after alone.")
    save_every: int | None = option(None, "Steps between checkpoints; else ten in a run.")
    workers: int = option(0, "Processes a GPU that read and prepare chats.")
    on_bad_record: str = option("fail", "fail, or skip and count, for chats that cannot be read.")
    training_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, item.type, getattr(self, item.name))
        find_policy(self.trains)
        for name, known in (("dtype", DTYPES), ("on_bad_record", get_args(OnBadRecord))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} = {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("distillation", "alignment", "warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} = {getattr(self, name)}: give a share from 0 to 1")
        if self.warmup + self.decay > 1:
            raise InputError("warmup and decay together are more than all steps")
        if not self.bf16 and self.dtype not in ("auto", "float32"):
            raise InputError(
                f"bf16 = False with dtype = {self.dtype}: what trains is float32, and without autocast all "
                "must be; leave dtype out, or bf16 on"
            )
        if self.attention_loss < 0:
            raise InputError(f"attention_loss = {self.attention_loss}: give a weight of 0 or more")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} = {value}: give a number above 0")

    def rate(self, hidden: int) -> float:
        """The peak learning rate for a model of this width.

        What suits the zoo (width 256, docs/finetuning.md), and less the wider a model is, as steps of
        AdamW in all entries of a matrix add up over its width: 1.2e-5 at 4,096.
        """
        return RATE / hidden if self.learning_rate is None else self.learning_rate

    @property
    def loaded_dtype(self) -> str:
        """Number format to load models in: without autocast all is float32."""
        return self.dtype if self.bf16 else "float32"

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the original model."""
        return self.distillation > 0 or self.alignment > 0


def _check_type(name: str, declared: Any, value: Any) -> None:
    """YAML reads `1e-5` as text and `yes` as true: say so instead of failing later."""
    origin = get_origin(declared)
    accepted = get_args(declared) if origin is UnionType else (origin or declared,)
    numbers = (*accepted, int) if float in accepted else accepted
    if isinstance(value, numbers) and (bool in accepted or not isinstance(value, bool)):
        return
    wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in accepted)
    hint = "; write 1.0e-5 for 1e-5" if float in accepted and isinstance(value, str) else ""
    raise InputError(f"{name} = {value!r}: give {wanted}{hint}")


def read_recipe(path: str | Path | None, **given: Any) -> FinetuneConfig:
    """A recipe file's configuration with the values that are `given` (not None) over it."""
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise InputError(f"the recipe {path} must hold `key: value` lines")
    return FinetuneConfig.from_dict(
        values | {key: value for key, value in given.items() if value is not None}
    )
