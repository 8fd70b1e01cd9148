"""What a fine-tuning does, as a recipe file or the command line says it."""

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, get_args

import yaml

from mha2mla_vlm.config import OnBadRecord
from mha2mla_vlm.errors import InputError, reading, shown, shown_path
from mha2mla_vlm.strict import Strict, check_types, option
from mha2mla_vlm.training.policies import ALIASES, POLICIES, find_policy
from mha2mla_vlm.training.recipes import find_recipe

_POSITIVE = (
    "learning_rate",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "max_length",
    "lora_rank",
    "eval_samples",
    "evaluate_every",
    "save_every",
)
OURS = {  # of the training arguments: what the recipe's other keys set, and what resuming and the loss need
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "warmup_steps", "bf16", "seed",
    "save_strategy", "resume_from_checkpoint", "remove_unused_columns", "label_names", "eval_strategy",
    "eval_steps", "dataloader_num_workers", "load_best_model_at_end", "push_to_hub", "do_eval",
    "gradient_checkpointing", "use_cpu", "disable_tqdm",
}  # fmt: skip
MAX_WORKERS = 64
MAX_RECIPE = 2**20  # bytes
_LARGEST = 2**31
RATE = 0.05  # learning rate times width
DTYPES = ("auto", "float32", "bfloat16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Strict):
    """One stage of training. Without a file, the defaults are our single stage.

    `training_arguments` go to `transformers.TrainingArguments` as they are, over what is set here.
    """

    trains: str = option(
        "attention-and-norms", "What trains: a policy, by name or published alias.", (*POLICIES, *ALIASES)
    )
    distillation: float = option(1.0, "Share of the original in the loss; 0 is labels only.")
    attention_loss: float = option(
        1.0, "Weight of the original's attention outputs beside the KL to its answers."
    )
    alignment: float = option(0.0, "Share of the steps that first align the layers' attention outputs.")
    learning_rate: float | None = option(None, "Peak learning rate; else 0.05 over the hidden size.")
    warmup: float = option(0.1, "Share of the steps over which the learning rate grows, linearly.")
    decay: float = option(0.9, "Share of the steps, at the end, over which it falls to 0, as 1 - sqrt.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    epochs: float = option(1.0, "Passes over the data.")
    max_steps: int | None = option(None, "Optimiser steps, instead of epochs.")
    batch_size: int = option(1, "Chats per forward pass and process.")
    gradient_accumulation: int = option(16, "Forward passes per optimiser step.")
    max_length: int = option(4096, "Tokens; longer chats are dropped and counted, never cut.")
    shuffle: bool = option(True, "Draw chats in random order.")
    seed: int = option(0, "Seed of the order, the held-out chats, and LoRA's weights.")
    lora_rank: int | None = option(None, "Train LoRA adapters of this rank and merge them at the end.")
    dtype: str = option("auto", "Data type of frozen weights; what trains is float32.", DTYPES)
    bf16: bool = option(True, "Compute in bfloat16 (autocast).")
    attn_implementation: str | None = option(
        None, "sdpa, eager, flash_attention_2; else transformers' choice.", ATTENTION
    )
    gradient_checkpointing: bool = option(False, "Compute activations again instead of storing them.")
    eval_samples: int = option(128, "Chats held out from the data to measure on, unless some are given.")
    evaluate_every: int | None = option(None, "Steps between measurements; else only before and after.")
    save_every: int | None = option(None, "Steps between checkpoints; else ten per run.")
    workers: int = option(0, "Processes per GPU that read and prepare chats.")
    on_bad_record: str = option(
        "fail", "fail, or skip and count, for chats that cannot be read.", get_args(OnBadRecord)
    )
    training_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        find_policy(self.trains)
        for name, known in (("dtype", DTYPES), ("on_bad_record", get_args(OnBadRecord))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} = {shown(getattr(self, name))}; known: {', '.join(known)}")
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
        for name in ("attention_loss", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise InputError(f"{name} = {getattr(self, name)}: give a number of 0 or more")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < _LARGEST:
                raise InputError(f"{name} = {value}: give a number above 0 and below {_LARGEST}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed = {self.seed}: give a whole number from 0 to {2**32 - 1}")
        if not 0 <= self.workers <= MAX_WORKERS:
            raise InputError(f"workers = {self.workers}: give a number from 0 to {MAX_WORKERS}")
        for name, value in self.training_arguments.items():
            if (isinstance(value, float) and not 0 <= value < inf) or (isinstance(value, int) and value < 0):
                raise InputError(f"training_arguments: {name} = {value}: give a number of 0 or more")
        if taken := sorted(OURS & self.training_arguments.keys()):
            raise InputError(
                f"training_arguments cannot set {', '.join(taken)}: "
                "set by the recipe's other keys, or needed as it is"
            )

    def rate(self, hidden: int) -> float:
        """The peak learning rate for a model of this width.

        What suits the zoo (width 256, docs/finetuning.md), and less the wider a model is, as steps of
        AdamW in all entries of a matrix add up over its width: 1.2e-5 at 4,096.
        """
        return RATE / hidden if self.learning_rate is None else self.learning_rate

    @property
    def loaded_dtype(self) -> str:
        """Data type to load models in: without autocast all is float32."""
        return self.dtype if self.bf16 else "float32"

    @property
    def needs_baseline(self) -> bool:
        """Whether the loss compares with the original model."""
        return self.distillation > 0 or self.alignment > 0


class _RecipeLoader(yaml.SafeLoader):
    """Plain YAML without aliases, which can stand for more than fits in memory, and with each key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError("aliases (*name) are not accepted in a recipe; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise InputError(f"the recipe has {', '.join(sorted(twice))} twice; leave one out")
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path | None, **given: Any) -> FinetuneConfig:
    """The configuration of a recipe, a file or one that ships (`zoo/single_stage`), with the values that are
    `given` (not None) over it.

    Raises `InputError` for a file that is no plain YAML mapping, and for unknown keys and bad values.
    """
    values = {} if path is None else _recipe(path)
    return FinetuneConfig.from_dict(
        values | {key: value for key, value in given.items() if value is not None}
    )


def _recipe(name: str | Path) -> dict[str, Any]:
    with reading(f"the recipe {shown_path(name)}"):
        path = find_recipe(name)
        if not path.is_file():
            raise InputError(f"the recipe {path} is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE + 1)
        if len(content) > MAX_RECIPE:
            raise InputError(f"the recipe {path} is too large: give at most {MAX_RECIPE:,} bytes")
        values = yaml.load(content.decode(), Loader=_RecipeLoader) or {}
    if not isinstance(values, dict):
        raise InputError(f"the recipe {path} must hold `key: value` lines")
    return values
