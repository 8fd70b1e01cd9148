"""A table and a plot of what was measured."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from mha2mla_vlm.utils.folders import new_folder

RATIOS = ("cache", "attention", "layer", "step", "prefill")


def rows_table(result: dict[str, Any]) -> Table:
    """Sizes, times and ratios of all rows."""
    table = Table(title=f"original / converted, {result['dtype']}, {result['device']}; above 1 is a gain")
    names = [name for name in RATIOS if any(f"{name}_ratio" in row for row in result["rows"])]
    for column in ("batch", "context", "cache MB", "attention ms", *names):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['attention_seconds'][0] * 1e3:.3f}",
            *(as_ratio(row.get(f"{name}_ratio")) for name in names),
        )
    return table


def as_ratio(value: float | None) -> str:
    """Two places, or a dash where it was not measured."""
    return "-" if value is None else f"{value:.2f}"


def plot_rows(result: dict[str, Any], path: Path) -> None:
    """Cache bytes and seconds of attention over the context, a line for each batch size and model."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for batch, style in zip(sorted({row["batch"] for row in result["rows"]}), ("-", "--", ":"), strict=False):
        rows = sorted((r for r in result["rows"] if r["batch"] == batch), key=lambda row: row["context"])
        contexts = [row["context"] for row in rows]
        best = [row["attention_seconds_original"][row["attention_baseline"]][0] for row in rows]
        lines = {
            "original": ("tab:gray", [row["cache_bytes_original"] for row in rows], best),
            "converted": (
                "tab:blue",
                [row["cache_bytes"] for row in rows],
                [row["attention_seconds"][0] for row in rows],
            ),
        }
        for name, (color, sizes, seconds) in lines.items():
            label = f"{name}, batch {batch}"
            axes[0].plot(contexts, [s / 1e6 for s in sizes], f"{style}o", color=color, label=label)
            axes[1].plot(contexts, [1e3 * s for s in seconds], f"{style}o", color=color, label=label)
    for axis, title in zip(axes, ("cache, MB", "attention of a layer, ms"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write_report(result: dict[str, Any], output: Path) -> None:
    """Write `bench.json` and, if matplotlib is installed, `bench.svg` to a new folder."""
    with new_folder(output) as folder:
        (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if find_spec("matplotlib"):
            plot_rows(result, folder / "bench.svg")
