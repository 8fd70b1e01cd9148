"""transformers' trainer with our loss: labels, the original's answers, its layers' attention.

Shapes: B batch, T tokens, K columns that predict answers, V vocabulary.
"""

import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from mha2mla_vlm.data.records import IGNORE_INDEX
from mha2mla_vlm.evaluation.answers import all_right
from mha2mla_vlm.model.modeling import text_model
from mha2mla_vlm.model.offload import logits_of
from mha2mla_vlm.training.config import FinetuneConfig
from mha2mla_vlm.training.distillation import (
    answer_columns,
    attention_outputs,
    cross_entropy_sum,
    divergence,
    fed,
    language_inputs,
    layer_inputs,
    relative_errors,
    same_inputs,
    share_frozen,
)
from mha2mla_vlm.utils.compat import prepare_inputs
from mha2mla_vlm.utils.progress import console, displayed

LOG = "training_log.jsonl"


class RecoveryTrainer(Trainer):
    """Trains a converted model on answers' tokens, with or without its original as `teacher`."""

    def __init__(
        self, *args: Any, recipe: FinetuneConfig, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, compute_metrics=metrics, **kwargs)
        self.recipe, self.teacher = recipe, teacher
        self.bar = ProgressBar(Path(self.args.output_dir) / LOG)
        self.add_callback(self.bar)
        self.remove_callback(PrinterCallback)  # it writes to standard output
        self.model_accepts_loss_kwargs = True  # so that the answers' tokens of a whole step are counted
        self.can_return_loss = True
        if teacher is not None:
            teacher.to(self.args.device).requires_grad_(False)
            if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # whose parameters are shards
                share_frozen(teacher, self._converted())
            self._same_inputs = same_inputs(teacher, self._converted())

    def _converted(self) -> PreTrainedModel:
        """The model without what accelerate and peft put around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def aligning(self) -> bool:
        """Whether this step is one of those that align the layers."""
        return self.state.global_step < round(self.recipe.alignment * self.state.max_steps)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Forward and backward; hooks stay for both, for activations may be computed again."""
        if not self.aligning:
            return super().training_step(model, inputs, *args, **kwargs)
        student = self._converted()
        batch = prepare_inputs(self, {k: v for k, v in inputs.items() if k != "labels"})
        with attention_outputs(self._teacher) as wanted, layer_inputs(self._teacher) as given:
            self._teacher_logits(batch, 1)
        self._wanted = wanted
        with fed(student, given):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean over the answer tokens of a whole step, in all processes."""
        labels = inputs.pop("labels")
        columns, targets = answer_columns(labels)
        student = self._converted()
        with language_inputs(student) as given, attention_outputs(student) as found:
            logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        is_answer = targets != IGNORE_INDEX
        if self.aligning:
            error = relative_errors(found, self._wanted, inputs["attention_mask"].bool())
            loss = error * is_answer.sum() + 0.0 * logits.sum()
        else:
            share = self.recipe.distillation
            loss = (1 - share) * cross_entropy_sum(logits, targets)
            if share > 0:
                loss = loss + share * self._distillation_loss(
                    inputs, given, found, logits, columns, is_answer
                )
        if num_items_in_batch is None:
            num_items_in_batch = is_answer.sum().clamp(min=1)
        loss = loss / num_items_in_batch
        if self.args.average_tokens_across_devices:  # then the tokens are those of all processes
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def _distillation_loss(
        self,
        inputs: dict[str, Any],
        given: dict[str, Any],
        found: dict[int, torch.Tensor],
        logits: torch.Tensor,
        columns: torch.Tensor,
        is_answer: torch.Tensor,
    ) -> torch.Tensor:
        """KL to the teacher's answers, and the error of what the layers' attention `found`."""
        with attention_outputs(self._teacher) as wanted:
            teacher = self._teacher_logits(inputs, columns, given)
        loss = divergence(logits[is_answer], teacher[is_answer]).sum()
        if self.recipe.attention_loss > 0:
            error = relative_errors(found, wanted, inputs["attention_mask"].bool())
            loss = loss + self.recipe.attention_loss * error * is_answer.sum()
        return loss

    @property
    def _teacher(self) -> PreTrainedModel:
        assert self.teacher is not None, "a recipe that needs the original is refused without it"
        return self.teacher

    @torch.no_grad()
    def _teacher_logits(
        self, inputs: dict[str, Any], columns: Any, given: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """`[B, K, V]`; from what the student's language model was `given`, if it would get the same."""
        teacher = self._teacher
        with self.accelerator.autocast():
            if given is None or not self._same_inputs:
                return teacher(**inputs, use_cache=False, logits_to_keep=columns).logits
            hidden = text_model(teacher)(**given).last_hidden_state
            return logits_of(teacher, hidden[:, columns])

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums by chat, `[B, 5]`: tokens, cross-entropy, KL, answers, right answers."""
        inputs = prepare_inputs(self, inputs)
        labels = inputs.pop("labels")
        columns, targets = answer_columns(labels)
        with self.accelerator.autocast(), language_inputs(self._converted()) as given:
            logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        teacher = None if self.teacher is None else self._teacher_logits(inputs, columns, given)
        rows = [
            chat_sums(logits[b], targets[b], columns, None if teacher is None else teacher[b])
            for b in range(len(labels))
        ]
        sums = torch.stack(rows)
        return sums[:, 1].sum() / sums[:, 0].sum(), sums, labels.new_zeros(len(labels))


def chat_sums(
    logits: torch.Tensor, targets: torch.Tensor, columns: torch.Tensor, teacher: torch.Tensor | None
) -> torch.Tensor:
    """Of one chat: answer tokens, their cross-entropy and KL (nan without a teacher), answers, right ones."""
    inside = targets != IGNORE_INDEX
    wanted = targets[inside]
    marks = all_right(columns[inside], logits[inside].argmax(-1) == wanted)
    kl = torch.nan if teacher is None else float(divergence(logits[inside], teacher[inside]).sum())
    loss = float(cross_entropy_sum(logits[inside][None], wanted[None]))
    return torch.tensor([len(wanted), loss, kl, len(marks), sum(marks)], device=logits.device)


def metrics(prediction: Any) -> dict[str, float]:
    """Of the sums of all chats."""
    tokens, loss, kl, answers, right = prediction.predictions.astype("float64").sum(0)
    return {"cross_entropy": loss / tokens, "kl": max(kl / tokens, 0.0), "exact_match": right / answers}


def _is_before(line: str, step: int) -> bool:
    """Whether a line of the log is whole, and of a step up to this one but not of the end of training."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row["step"] <= step and "train_runtime" not in row


class ProgressBar(TrainerCallback):
    """A bar on standard error, and each report of the trainer as a line of a file, from one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack = contextlib.ExitStack()
        self.bar: Progress | None = None
        self.steps, self.seconds = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        if not state.is_world_process_zero:
            return
        self._cut_log(-1 if args.eval_on_start else state.global_step)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self.bar = self.stack.enter_context(displayed(Progress(*columns, console=console(), transient=True)))
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="")

    def _cut_log(self, step: int) -> None:
        """Leave out what a run that was killed wrote after the checkpoint from which this one resumes."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = list(itertools.takewhile(lambda line: _is_before(line, step), lines))
        if len(kept) < len(lines):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)

    @property
    def seconds_per_step(self) -> float:
        """Of the steps of this process."""
        return self.seconds / max(1, self.steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self.begin = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.steps, self.seconds = self.steps + 1, self.seconds + time.monotonic() - self.begin
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the report, and show its loss."""
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **logs}
        row.pop("train_loss", None)  # a sum over the steps since a resume, divided by the number of all
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if "loss" in logs and self.bar is not None:
            self.bar.update(self.task, loss=f"loss {logs['loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.stack.close()
