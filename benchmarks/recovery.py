"""What fine-tuning gives back: the published two stages and ours, example by example, on the zoo models.

    python benchmarks/recovery.py                      # all, two hours on two cores; resumes
    python benchmarks/recovery.py --models llava --budgets 0.25 -o /tmp/rows --work /tmp/runs

Recipes, each trained once for every number of examples, 16 to a step, on chats about training scans:
- ours: our conversion, then the default of `mha2mla finetune` (one stage, the same settings everywhere);
- published: partial RoPE (mkl), stage 1 on as many examples, MD-SVD, stage 2 on them again, labels only; its
  learning rate is the best of three for each stage and budget, by a pilot of 256 examples;
- variants: ours with one thing changed, on 1,024 examples at the smallest budget;
- control: the original, trained on labels, for a model can also gain from training by itself.

Measured on held-out chats about test scans. Rows go to `OUT/MODEL.jsonl`, the plot of all rows to `OUT`, and
their tables into `OUT/README.md`.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measured import DOCS, write_between
from transformers.utils import logging as transformers_logging

from mha2mla_vlm import ConversionConfig, convert, load, load_processor, save
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.pipeline import make_profile
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.training.config import FinetuneConfig
from mha2mla_vlm.training.run import finetune
from mha2mla_vlm.zoo.chats import zoo_records

MARK = "<!-- written by benchmarks/recovery.py -->"
BUDGETS = (0.375, 0.25, 0.1875)
UNIFORM = {0.375: (2, 4), 0.25: (4, 4), 0.1875: (4, 8)}  # head dim by R, by d_kv
EXAMPLES = (64, 256, 1024, 4096)
PILOT = 256
RATES = (1e-5, 1e-4, 1e-3)
RECIPES = ("ours", "published", "control", "variants")
VARIANTS: dict[str, dict[str, Any]] = {
    "the default": {},
    "labels only": {"distillation": 0.0},
    "half labels": {"distillation": 0.5},
    "answers only": {"attention_loss": 0.0},
    "ten times the weight of attention": {"attention_loss": 10.0},
    "half of the steps align layers first": {"alignment": 0.5},
    "all steps align layers": {"alignment": 1.0},
    "constant rate, decay over the last tenth": {"decay": 0.1},
    "a third of the rate": {"learning_rate": 0.05 / 256 / 3},
    "three times the rate": {"learning_rate": 0.05 / 256 * 3},
    "trains keys-and-values": {"trains": "keys-and-values"},
    "trains factors": {"trains": "factors"},
    "trains layers": {"trains": "layers"},
    "LoRA of rank 16, ten times the rate": {"lora_rank": 16, "learning_rate": 0.5 / 256},
}
KEPT = ("exact_match", "kl", "cross_entropy", "steps", "seconds_per_step", "peak_memory_bytes")
VARIED = (0.1875, 1024)  # budget, examples
COMMON: dict[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation": 2,
    "dtype": "float32",
    "attn_implementation": "eager",  # on a CPU faster than SDPA both ways, at these lengths
    "training_arguments": {"save_strategy": "no", "report_to": []},
}
LABELS = {"distillation": 0.0, "decay": 0.1}
STAGES: dict[int, dict[str, Any]] = {1: {"trains": "v4", **LABELS}, 2: {"trains": "v2", **LABELS}}


class Bench:
    """One model's conversions, examples and rows."""

    def __init__(self, name: str, folder: Path, work: Path, samples: int) -> None:
        self.name, self.work = f"zoo:{name}", work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.path, self.samples = folder / f"{name}.jsonl", samples
        self.processor = load_processor(self.name)
        self.calibration = zoo_records(name, split="train", samples=128, seed=1)
        self.held_out = zoo_records(name, split="test", samples=samples, seed=0)
        self.train = zoo_records(name, split="train", samples=max(EXAMPLES), seed=7)
        self.profiles: dict[str, Any] = {}

    def rows(self) -> list[dict[str, Any]]:
        """All that are measured."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, **row: Any) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"samples": self.samples, **row}) + "\n")

    def folder(self, title: str, make: Callable[[], Any]) -> Path:
        """A model's folder, made once."""
        path = self.work / title
        if not path.exists():
            save(make(), self.processor, path)
        return path

    def converted(self, title: str, config: ConversionConfig, key: str) -> Path:
        """The original converted, with one profile for all budgets."""

        def make() -> Any:
            model = load(self.name, dtype=torch.float32)
            if key not in self.profiles:
                self.profiles[key] = make_profile(model, self.processor, self.calibration, config)
            return convert(model, self.processor, self.calibration, config, profile=self.profiles[key])

        return self.folder(title, make)

    def tuned(self, checkpoint: Path | str, title: str, examples: int, **config: Any) -> dict[str, Any]:
        """A fine-tuning's result; its folder stays under `title`."""
        output = self.work / title
        for stale in (output, output.with_name(output.name + ".partial")):
            shutil.rmtree(stale, ignore_errors=True)
        recipe = FinetuneConfig(**COMMON | config)
        return finetune(
            checkpoint, self.train[:examples], output, recipe, eval_data=self.held_out, baseline=self.name
        )

    def best(self, checkpoint: Path, title: str, **config: Any) -> float:
        """The learning rate that a pilot finds to give the least cross-entropy."""
        path = self.work / f"{title}.json"
        if not path.exists():
            found = {
                rate: self.tuned(checkpoint, f"{title}-pilot", PILOT, learning_rate=rate, **config)[
                    "cross_entropy"
                ]
                for rate in RATES
            }
            path.write_text(json.dumps(min(found, key=lambda rate: found[rate])))
        return float(json.loads(path.read_text()))


def ours(bench: Bench, budget: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Our conversion and our default, for each number of examples."""
    start = bench.converted(
        f"ours-{budget}", ConversionConfig(rotate_at="write", budget=budget, latent_bits="16"), "ours"
    )
    for count in EXAMPLES:
        yield count, bench.tuned(start, "ours-tuned", count)


def published(bench: Bench, budget: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """The published conversion and its two stages; both rates are in the result."""
    head_dim = AttentionSizes.of(load(bench.name).config).head_dim
    rope_dim, d_kv = (head_dim // share for share in UNIFORM[budget])
    how: dict[str, Any] = {"rope_selection": "mkl", "fold": False}
    partial = ConversionConfig(qk_rope_head_dim=rope_dim, factorization="none", **how)
    start = bench.converted(f"partial-{rope_dim}", partial, "published")
    first = bench.best(start, f"stage1-{rope_dim}", **STAGES[1])
    second = None
    for count in (PILOT, *EXAMPLES):  # the pilot of stage 2 starts from stage 1 on as many
        title = f"stage1-{rope_dim}-{count}"
        if not (bench.work / title).exists():
            bench.tuned(start, title, count, learning_rate=first, **STAGES[1])

        def factored(title: str = title) -> Any:
            model = load(bench.work / title)
            config = ConversionConfig(d_kv=d_kv, factorization="md-svd")
            return convert(model, bench.processor, bench.calibration, config)

        latent = bench.folder(f"latent-{budget}-{count}", factored)
        if second is None:
            second = bench.best(latent, f"stage2-{budget}", **STAGES[2])
            continue
        result = bench.tuned(latent, "stage2-tuned", count, learning_rate=second, **STAGES[2])
        yield count, result | {"learning_rates": [first, second]}


def published_start(bench: Bench, budget: float) -> dict[str, Any]:
    """The published conversion before any training."""
    head_dim = AttentionSizes.of(load(bench.name).config).head_dim
    rope_dim, d_kv = (head_dim // share for share in UNIFORM[budget])
    config = ConversionConfig(
        qk_rope_head_dim=rope_dim, d_kv=d_kv, rope_selection="mkl", fold=False, factorization="md-svd"
    )
    start = bench.converted(f"published-{budget}", config, "md-svd")
    return bench.tuned(start, "start", 16, learning_rate=1e-5, distillation=0.0)


def control(bench: Bench) -> Iterator[tuple[int, dict[str, Any]]]:
    """The original, trained on labels."""
    for count in EXAMPLES:
        yield count, bench.tuned(bench.name, "control-tuned", count, distillation=0.0)


def variants(bench: Bench) -> None:
    """Rows of ours with one thing changed."""
    budget, count = VARIED
    start = bench.converted(
        f"ours-{budget}", ConversionConfig(rotate_at="write", budget=budget, latent_bits="16"), "ours"
    )
    done = {row["recipe"] for row in bench.rows()}
    for name, change in VARIANTS.items():
        if name not in done:
            result = bench.tuned(start, "variant-tuned", count, **change)
            kept = ("exact_match_before", "kl_before", *KEPT)
            bench.add(recipe=name, budget=budget, examples=count, **{k: result[k] for k in kept})


def run(bench: Bench, budgets: list[float], recipes: list[str]) -> None:
    """All rows of one model that are not yet in its file."""
    runs = [("control", 1.0)] if "control" in recipes else []
    runs += [(r, budget) for budget in budgets for r in recipes if r in ("ours", "published")]
    for recipe, budget in runs:
        done = {(row["recipe"], row["budget"], row["examples"]) for row in bench.rows()}
        if all((recipe, budget, count) in done for count in (0, *EXAMPLES)):
            continue
        made = {
            "ours": lambda b=budget: ours(bench, b),
            "published": lambda b=budget: published(bench, b),
            "control": lambda: control(bench),
        }[recipe]()
        for count, result in made:
            if (recipe, budget, 0) not in done:
                first = published_start(bench, budget) if recipe == "published" else result
                measured = {name: first[f"{name}_before"] for name in ("exact_match", "kl", "cross_entropy")}
                bench.add(recipe=recipe, budget=budget, examples=0, **measured)
                done.add((recipe, budget, 0))
            if (recipe, budget, count) not in done:
                row = {name: result[name] for name in (*KEPT, "learning_rates") if name in result}
                bench.add(recipe=recipe, budget=budget, examples=count, **row)


def table(rows_of: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each model, budget and recipe; exact match and KL by number of examples."""
    counts = (0, *EXAMPLES)
    head = [f"{count:,} examples" if count else "untrained" for count in counts]
    lines = ["| model | cache | recipe | " + " | ".join(head) + " |", "|---" * (3 + len(counts)) + "|"]
    for name, rows in rows_of.items():
        for budget in (1.0, *BUDGETS):
            for recipe in RECIPES:
                found = {r["examples"]: r for r in rows if (r["recipe"], r["budget"]) == (recipe, budget)}
                if found:
                    cells = [
                        f"{found[c]['exact_match']:.1%}, {found[c]['kl']:.4f}" if c in found else ""
                        for c in counts
                    ]
                    title = "original (control)" if recipe == "control" else recipe
                    lines.append(f"| `zoo:{name}` | {budget:.4g} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def variants_table(rows_of: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each variant and model."""
    budget, count = VARIED
    lines = [
        f"Ours with one thing changed, {budget:.4g} of the cache, {count:,} examples:",
        "",
        "| model | variant | exact match | KL | seconds a step |",
        "|---|---|---|---|---|",
    ]
    for name, rows in rows_of.items():
        found = [row for row in rows if row["recipe"] in VARIANTS]
        if found:
            before = found[0]["exact_match_before"], found[0]["kl_before"]
            lines.append(f"| `zoo:{name}` | untrained | {before[0]:.1%} | {before[1]:.4f} | |")
        lines += [
            f"| `zoo:{name}` | {row['recipe']} | {row['exact_match']:.1%} | {row['kl']:.4f} "
            f"| {row['seconds_per_step']:.2f} |"
            for row in found
        ]
    return "\n".join(lines) + "\n"


def plot(rows_of: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Examples against exact match, a panel for each model and budget, a line for each recipe."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(BUDGETS), len(rows_of), figsize=(3.6 * len(rows_of), 7), sharex=True, squeeze=False
    )
    styles = {"ours": ("tab:blue", "o-"), "published": ("tab:red", "s-"), "control": ("tab:gray", "--")}
    for column, (name, rows) in enumerate(rows_of.items()):
        for line, budget in enumerate(BUDGETS):
            axis = axes[line][column]
            for recipe, (color, style) in styles.items():
                wanted = (recipe, 1.0 if recipe == "control" else budget)
                points = sorted(
                    (r["examples"], r["exact_match"]) for r in rows if (r["recipe"], r["budget"]) == wanted
                )
                label = "original, trained on" if recipe == "control" else recipe
                axis.plot(
                    [max(16, n) for n, _ in points], [m for _, m in points], style, color=color, label=label
                )
            axis.set_xscale("log", base=4)
            axis.set_xticks([16, *EXAMPLES], ["0", *map(str, EXAMPLES)])
            axis.set_title(f"{name}, {budget:.4g} of the cache", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("examples")
    figure.supylabel("exact match on held-out chats")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=DOCS / "recovery", help="folder of rows")
    parser.add_argument("--work", type=Path, default=Path("recovery-runs"), help="folder of checkpoints")
    parser.add_argument("--models", nargs="+", choices=ZOO_NAMES, default=ZOO_NAMES)
    parser.add_argument("--budgets", nargs="*", type=float, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--samples", type=int, default=128, help="held-out chats")
    parser.add_argument("--table", action="store_true", help="write table and plot of the rows there are")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in () if options.table else options.models:
        bench = Bench(name, options.output, options.work, options.samples)
        run(bench, options.budgets, options.recipes)
        if "variants" in options.recipes:
            variants(bench)
    rows_of = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name in ZOO_NAMES
        if (path := options.output / f"{name}.jsonl").exists()
    }
    plot(rows_of, options.output / "recovery.svg")
    write_between(options.output / "README.md", MARK, f"{table(rows_of)}\n{variants_table(rows_of)}")
    print(json.dumps({"output": str(options.output), "models": list(rows_of)}))


if __name__ == "__main__":
    main()
