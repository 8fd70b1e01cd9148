"""How the zoo models are trained from nothing: first to see single digits, then to read and answer.

A language model that starts together with an untrained tower never learns to look, so a warm-up
names the digit under each visual token. Then everything trains together on chats whose pages grow
to 4 x 4 digits, and once more at half the learning rate: counting comes late. Answers by themselves teach
slowly where to look, so over the first three fifths of each of these phases two guides help: what
lies under each image token, and which tokens show an answer (`zoo.guides`).
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from mha2mla_vlm.data.records import Record, encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.answers import answer_log_probs, answers_right
from mha2mla_vlm.model.checkpoint import pick_device
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.utils.progress import console, displayed
from mha2mla_vlm.zoo.architectures import LAYERS, PATCH, new_model
from mha2mla_vlm.zoo.chats import (
    MAX_SIDE,
    PAGE_MULTIPLE,
    VISUAL_TOKENS,
    Chat,
    Page,
    make_chat,
    make_page,
    sample_chats,
)
from mha2mla_vlm.zoo.digits import CELL, Split
from mha2mla_vlm.zoo.guides import answer_sources, own_tokens, token_targets

LOG = "training_log.jsonl"
SAVE_EVERY = 120.0  # seconds between resumable states


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of one training run. A phase ends at its number of steps or its share of `minutes`."""

    seed: int = 0
    warmup_steps: int = 1500
    steps: int = 6000
    refining_steps: int = 3000
    minutes: float | None = None  # time for all phases together
    warmup_share: float = 0.06  # of the minutes
    refining_share: float = 0.3
    warmup_pages: int = 32  # per step
    tokens: int = 1300  # per step, about
    learning_rate: float = 1e-3  # half of it in the last phase
    weight_decay: float = 0.05
    evaluate_every: int = 250  # steps
    held_out: int = 500  # chats of the final measurement


@dataclass
class Clock:
    """How far a phase is, from 0 to 1, by steps or by time, whichever is further."""

    steps: int
    seconds: float
    step: int = 0
    elapsed: float = 0.0

    @property
    def progress(self) -> float:
        return min(1.0, max(self.step / self.steps, self.elapsed / self.seconds))


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 3%, then a cosine down to 1% of the peak."""
    if progress < 0.03:
        return peak * (progress + 0.001) / 0.031
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def build(name: str, output: Path, recipe: Recipe) -> dict[str, Any]:
    """Train a zoo model and write its folder; returns its measured accuracy on held-out scans.

    Resumes from `output/state.pt` if a run was interrupted there.
    """
    torch.manual_seed(recipe.seed)
    model, processor = new_model(name)
    model.set_attn_implementation("eager")  # on a CPU faster than SDPA both ways, at these lengths
    hidden = model.config.text_config.hidden_size
    head = nn.Linear(hidden, 10)
    locator = nn.Linear(hidden, 10 + 2 * MAX_SIDE)
    seconds = math.inf if recipe.minutes is None else 60 * recipe.minutes
    output.mkdir(parents=True, exist_ok=True)
    modules = nn.ModuleDict({"model": model, "head": head, "locator": locator}).to(pick_device("auto"))
    run = _Run(output, modules, recipe)
    run.phase(
        "vision warm-up",
        Clock(recipe.warmup_steps, seconds * recipe.warmup_share),
        recipe.learning_rate,
        lambda rng, _: warmup_loss(name, model, processor, head, rng, recipe.warmup_pages),
        lambda: {"digit_accuracy": digit_accuracy(name, model, processor, head)},
    )
    reading = seconds * (1 - recipe.warmup_share - recipe.refining_share)
    for title, clock, rate in (
        ("reading", Clock(recipe.steps, reading), recipe.learning_rate),
        ("refining", Clock(recipe.refining_steps, seconds * recipe.refining_share), recipe.learning_rate / 2),
    ):
        run.phase(
            title,
            clock,
            rate,
            lambda rng, progress: chat_loss(name, model, processor, locator, rng, progress, recipe.tokens),
            lambda: answer_accuracy(name, model, processor, count=60, seed=1),
        )
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    accuracy = answer_accuracy(name, model, processor, count=recipe.held_out, seed=0)
    (output / "state.pt").unlink(missing_ok=True)
    return {"parameters": model.num_parameters(), **accuracy}


def check_begun(folder: Path) -> None:
    """Raise `InputError` if there is anything but a training that was interrupted."""
    begun = folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOG, "state.tmp"}
    if folder.exists() and not begun and not (folder / "state.pt").is_file():
        raise InputError(f"{folder} is there and holds no unfinished run; choose another output, or move it")


class _Run:
    """The phases of one training: optimiser, log, and a state to resume from."""

    def __init__(self, output: Path, modules: nn.ModuleDict, recipe: Recipe) -> None:
        self.output, self.modules, self.recipe = output, modules, recipe
        self.state: dict[str, Any] = {}
        if (output / "state.pt").is_file():
            self.state = torch.load(output / "state.pt", weights_only=True)
            modules.load_state_dict(self.state["modules"])

    def phase(
        self,
        title: str,
        clock: Clock,
        rate: float,
        loss_of: Callable[[random.Random, float], torch.Tensor],
        evaluate: Callable[[], dict[str, Any]],
    ) -> None:
        """Train until `clock` is at its end, from where an interrupted run of the phase stopped."""
        done: list[str] = self.state.setdefault("done", [])
        if title in done:
            return
        optimizer = make_optimizer(self.modules, self.recipe)
        if self.state.get("phase") == title:
            optimizer.load_state_dict(self.state["optimizer"])
            clock.step, clock.elapsed = self.state["step"], self.state["elapsed"]
        for step, losses in self._steps(title, clock, rate, optimizer, loss_of):
            if step % self.recipe.evaluate_every == 0 or clock.progress >= 1:
                self._log({"phase": title, **asdict(clock), "loss": sum(losses) / len(losses), **evaluate()})
                losses.clear()
        done.append(title)
        self._save(title, clock, optimizer)

    def _steps(
        self,
        title: str,
        clock: Clock,
        rate: float,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[random.Random, float], torch.Tensor],
    ) -> Iterator[tuple[int, list[float]]]:
        start, saved, losses = time.monotonic() - clock.elapsed, time.monotonic(), []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with displayed(Progress(*columns, console=console())) as bar:
            task = bar.add_task(title, total=1.0, loss="")
            while clock.progress < 1:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(rate, clock.progress)
                rng = random.Random(f"{title}/{self.recipe.seed}/{clock.step}")
                with torch.autocast(self.modules["model"].device.type, torch.bfloat16):
                    loss = loss_of(rng, clock.progress)
                loss.backward()
                nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                clock.step, clock.elapsed = clock.step + 1, time.monotonic() - start
                bar.update(task, completed=clock.progress, loss=f"loss {loss.item():.3f}")
                yield clock.step, losses
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save(title, clock, optimizer)
                    saved = time.monotonic()

    def _save(self, phase: str, clock: Clock, optimizer: torch.optim.Optimizer) -> None:
        self.state |= {
            "phase": phase,
            "step": clock.step,
            "elapsed": clock.elapsed,
            "modules": self.modules.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(self.state, self.output / "state.tmp")
        (self.output / "state.tmp").replace(self.output / "state.pt")

    def _log(self, row: dict[str, Any]) -> None:
        with (self.output / LOG).open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}) + "\n"
            )


def make_optimizer(modules: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for n, p in modules.named_parameters() if p.ndim >= 2 and "embed" not in n]
    others = [p for n, p in modules.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def page_features(
    name: str, model: PreTrainedModel, processor: ProcessorMixin, pages: list[Page]
) -> torch.Tensor:
    """Visual tokens of pages of one size as the language model gets them, `[B, rows, columns, C]`."""
    inputs = processor.image_processor([page.image for page in pages], return_tensors="pt").to(model.device)
    tokens = torch.stack(list(model.model.get_image_features(**inputs).pooler_output))
    width, height = pages[0].image.size
    return tokens[:, own_tokens(name, pages[0])].unflatten(1, (height // PATCH, width // PATCH))


def digit_logits(
    name: str, model: PreTrainedModel, processor: ProcessorMixin, head: nn.Module, pages: list[Page]
) -> torch.Tensor:
    """Logits of the digit under each visual token, `[B, rows, columns, tokens of a cell, 10]`."""
    logits = head(page_features(name, model, processor, pages)).float()
    cells = pages[0].image.height // CELL
    per_side = logits.shape[1] // cells
    return logits.unfold(1, per_side, per_side).unfold(2, per_side, per_side).flatten(-2).transpose(-1, -2)


def _warmup_side(name: str) -> int:
    """Digits a side of the least page that is full."""
    return max(PAGE_MULTIPLE[name] // CELL, 2)


def _warmup_pages(name: str, rng: random.Random, *, split: Split, count: int, augment: bool) -> list[Page]:
    side = _warmup_side(name)
    return [
        make_page(rng, split=split, multiple=CELL, rows=side, columns=side, augment=augment)
        for _ in range(count)
    ]


def warmup_loss(
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    head: nn.Module,
    rng: random.Random,
    count: int,
) -> torch.Tensor:
    """Cross-entropy of naming the digit under each visual token, over full pages."""
    count = max(1, 4 * count // _warmup_side(name) ** 2)  # as many digits whatever a page holds
    pages = _warmup_pages(name, rng, split="train", count=count, augment=True)
    logits = digit_logits(name, model, processor, head, pages)
    target = (
        torch.tensor([page.digits for page in pages], device=logits.device)
        .unsqueeze(-1)
        .expand(logits.shape[:-1])
    )
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


@torch.no_grad()
def digit_accuracy(name: str, model: PreTrainedModel, processor: ProcessorMixin, head: nn.Module) -> float:
    """Share of held-out digits whose tokens together name them right."""
    pages = _warmup_pages(name, random.Random("accuracy"), split="test", count=128, augment=False)
    named = digit_logits(name, model, processor, head, pages).log_softmax(-1).mean(-2).argmax(-1)
    return (named.cpu() == torch.tensor([page.digits for page in pages])).float().mean().item()


def training_chats(name: str, rng: random.Random, progress: float, tokens: int) -> list[Chat]:
    """Chats of one step: all with pages of the same sizes, so that nothing is padded."""
    side = min(MAX_SIDE, 2 + int(10 * progress))  # 4 x 4 from a fifth of the way
    pages = 2 if rng.random() < 0.12 else 1
    sides = [(rng.randint(1, side), rng.randint(1, side)) for _ in range(pages)]
    turns = rng.randint(3, 9)
    per_cell, per_page = VISUAL_TOKENS[name]
    visual = per_cell * sum(r * c for r, c in sides) + per_page * pages
    count = max(4, min(48, tokens // (visual + 20 * turns)))
    weights = (1, 2, 1, 1)  # counting is the hardest
    page: dict[str, Any] = {"split": "train", "multiple": PAGE_MULTIPLE[name], "augment": True}
    return [make_chat(rng, sides=sides, turns=turns, weights=weights, **page) for _ in range(count)]


def chat_loss(
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    locator: nn.Module,
    rng: random.Random,
    progress: float,
    tokens: int,
) -> torch.Tensor:
    """Cross-entropy of the answers' tokens of one step's chats, and early on two guides.

    The guides fade out between two and three fifths of the phase: the middle layer has to name
    digit, row and column under each image token, and one head of the next layer to look at the
    tokens that show an answer's digit.
    """
    visual = get_family(name).visual_token_ids(model.config)
    chats = training_chats(name, rng, progress, tokens)
    records = [Record(messages=chat.messages, images=chat.images) for chat in chats]
    batch = encode_with_labels(processor, records, visual).to(model.device)
    share = min(1.0, max(0.0, 3 - 5 * progress))
    output = model(**batch, use_cache=False, output_hidden_states=share > 0, output_attentions=share > 0)
    if not share:
        return output.loss
    is_image = batch["input_ids"] == model.config.image_token_id
    found = locator(output.hidden_states[LAYERS // 2][is_image]).float()
    targets = token_targets(name, chats).to(model.device)
    parts = zip(found.split([10, MAX_SIDE, MAX_SIDE], dim=-1), targets.unbind(-1), strict=True)
    located = sum(nn.functional.cross_entropy(part, target, ignore_index=-1) for part, target in parts)
    digits = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789")))
    rows, positions, mask = answer_sources(name, chats, is_image, batch["labels"], digits)
    looks = output.attentions[LAYERS // 2][rows, 0, positions].float()
    looked = -((looks * mask.to(looks.device)).sum(-1) + 1e-4).log().mean()
    return output.loss + share * (located + 0.5 * looked)


@torch.no_grad()
def answer_accuracy(
    name: str, model: PreTrainedModel, processor: ProcessorMixin, *, count: int, seed: int
) -> dict[str, Any]:
    """Share of held-out answers that greedy decoding gets exactly right, by kind and together."""
    visual = get_family(name).visual_token_ids(model.config)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    model.eval()
    for chat in sample_chats(name, split="test", samples=count, seed=seed):
        record = Record(messages=chat.messages, images=chat.images)
        batch = encode_with_labels(processor, [record], visual).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            guesses = answer_log_probs(model, batch).argmax(-1)
        for index, is_right in zip(record.answers(), answers_right(guesses, batch), strict=True):
            kind = chat.messages[index]["kind"]
            asked[kind] += 1
            right[kind] += is_right
    model.train()
    return {"exact_match": right.total() / asked.total()} | {
        kind: right[kind] / asked[kind] for kind in sorted(asked)
    }
