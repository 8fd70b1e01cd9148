"""The table and the picture of the rows of `frontier.py`."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import END, write_between

from mha2mla_vlm.model.shipped import ZOO_NAMES

Row = dict[str, Any]
MARK = "<!-- written by benchmarks/frontier.py -->"
INK = "#7d8087"  # read on white and on black alike
LEAST = 1e-6  # of KL, that float32 can tell from none
BUDGETS = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625, 0.04)
TICKS = (0.5, 0.25, 0.125, 0.0625, 0.04)
SMALLEST = {"write, 16 bits": 0.0625}  # one rotated unit and one latent unit of each layer
# colours of Okabe and Ito, for the colour-blind; ours in full lines
STYLES: dict[str, dict[str, Any]] = {
    "read, bits by channel": {"label": "ours, at read, by channel", "color": "#0072B2", "marker": "o"},
    "auto, bits by channel": {"label": "ours, auto, by channel", "color": "#009E73", "marker": "^"},
    "read, 16 bits": {"label": "ours, at read, 16 bits", "color": "#56B4E9", "marker": "s"},
    "write, bits by channel": {"label": "ours, at write, by channel", "color": "#E69F00", "marker": "v"},
    "write, 16 bits": {"label": "ours, at write, 16 bits", "color": "#CC79A7", "marker": "D"},
    "activation-svd, read, 16 bits": {"label": "CARE's factors, at read", "color": "#56B4E9", "marker": "x"},
    "published": {"label": "published", "color": "#D55E00", "marker": "P"},
    "SnapKV": {"label": "SnapKV", "color": INK, "marker": "<"},
    "ExpectedAttention": {"label": "ExpectedAttention", "color": INK, "marker": ">"},
    "KIVI-like": {"label": "KIVI-like", "color": "#D55E00", "marker": "*"},
    "hqq": {"label": "hqq", "color": "#E69F00", "marker": "1"},
    "quanto": {"label": "quanto", "color": "#CC79A7", "marker": "2"},
}
TITLES = {
    "original": "original",
    "published": "published: partial RoPE `mkl`, `md-svd`",
    "write, 16 bits": "ours, rotated at write, 16 bits",
    "write, bits by channel": "ours, rotated at write, bits by channel",
    "read, 16 bits": "ours, rotated at read, 16 bits",
    "read, bits by channel": "ours, rotated at read, bits by channel",
    "auto, bits by channel": "ours, `--rotate-at auto`, bits by channel",
    "activation-svd, read, 16 bits": "CARE's factors (`activation-svd`), rotated at read, 16 bits",
    "SnapKV": "SnapKV",
    "ExpectedAttention": "ExpectedAttention",
    "SnapKV, question later": "SnapKV, question later",
    "ExpectedAttention, question later": "ExpectedAttention, question later",
}
SCALES = (("kl", "KL, nats per answer token"), ("exact_match", "exact match"))
ALL = ", all tokens"  # of a quantised cache


def write_pages(rows: Sequence[Row], folder: Path) -> None:
    """Write the tables into `frontier.md`, between marks, and `frontier.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "frontier.md"
    if not page.exists():
        page.write_text(f"{MARK}\n{END}\n", encoding="utf-8")
    tables = ["## At equal bytes\n", grid(rows)]
    tables += ["## Quantised caches, at the bytes that they take\n", quantised(rows)]
    tables += ["## Every row, with 95% intervals\n", listed(rows)]
    write_between(page, MARK, "\n".join(tables))
    (folder / "frontier.svg").write_text(picture(rows), encoding="utf-8")


def first_seed(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The row of the first seed with these values, if there is one."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return min(found, key=lambda row: row["seed"]) if found else None


def cell(rows: Sequence[Row], name: str, method: str, budget: float) -> str:
    """KL and exact match, or why there are none."""
    if budget < SMALLEST.get(method, 0.0):
        return "has no such size"
    row = first_seed(rows, model=name, method=method, budget=budget)
    return "not measured" if row is None else f"{max(0.0, row['kl']):.4f}, {row['exact_match']:.1%}"


def span(row: Row, name: str, form: str) -> str:
    """A figure and its interval."""
    middle, low, high = (f"{max(0.0, row[name + end]):{form}}" for end in ("", "_low", "_high"))
    return f"{middle} ({low} to {high})"


def grid(rows: Sequence[Row]) -> str:
    """A line for each model and method, a column for each budget."""
    heads = ["model", "method", *(f"{100 * budget:g}%" for budget in BUDGETS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in ZOO_NAMES:
        original = first_seed(rows, model=name, method="original")
        if original is None:
            lines.append(f"| `zoo:{name}` | not measured |" + " |" * len(BUDGETS))
            continue
        whole = f"original, {original['bytes_per_token']:,.0f} B a token: {original['exact_match']:.1%}"
        lines.append(f"| `zoo:{name}` | {whole} |" + " |" * len(BUDGETS))
        for method in TITLES:
            if method != "original":
                cells = [cell(rows, name, method, budget) for budget in BUDGETS]
                lines.append(f"| | {TITLES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def quantised(rows: Sequence[Row]) -> str:
    """A line for each quantised cache."""
    lines = ["| model | cache | share | KL | exact match |", "|---|---|---|---|---|"]
    for name in ZOO_NAMES:
        for row in rows:
            if row["model"] == name and row["budget"] is None:
                cells = [f"`zoo:{name}`", row["method"], f"{row['share']:.1%}", span(row, "kl", ".4f")]
                lines.append(f"| {' | '.join(cells)} | {span(row, 'exact_match', '.1%')} |")
    return "\n".join(lines) + "\n"


def listed(rows: Sequence[Row]) -> str:
    """All rows with their intervals, and KL apart for chats with one and several images."""
    heads = ["model", "method", "budget", "seed", "bytes/token", "KL", "exact match"]
    heads += ["KL, one image", "several", "exact match, one token", "longer"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    order = [*TITLES, *dict.fromkeys(row["method"] for row in rows if row["budget"] is None)]
    known = [row for row in rows if row["method"] in order]
    for row in sorted(known, key=lambda row: (ZOO_NAMES.index(row["model"]), order.index(row["method"]))):
        cells = [f"`zoo:{row['model']}`", row["method"], f"{row['budget']:.4g}" if row["budget"] else ""]
        cells += [str(row["seed"] or ""), f"{row['bytes_per_token']:,.0f}"]
        cells += [span(row, "kl", ".5f"), span(row, "exact_match", ".1%")]
        cells += [
            f"{max(0.0, row[part]['kl']):.5f}" if part in row else ""
            for part in ("one image", "several images")
        ]
        cells += [
            f"{row[part]['exact_match']:.1%}" if part in row else "" for part in ("one token", "longer")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def line_of(rows: Sequence[Row], name: str, method: str) -> list[Row]:
    """The points of a line: its sizes, the largest first."""
    own = [row for row in rows if row["model"] == name and row["method"].split(",")[0] == method]
    if any(row["budget"] is None for row in own):  # quantised: those of all tokens, where there are both
        found = [row for row in own if row["method"].endswith(ALL)] or own
    else:
        pairs = (first_seed(rows, model=name, method=method, budget=budget) for budget in BUDGETS)
        found = [row for row in pairs if row is not None]
    return sorted(found, key=lambda row: -row["share"])


def picture(rows: Sequence[Row]) -> str:
    """Share of the cache against KL and exact match, a column for each model with rows, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color"), INK)
    style |= {"ytick.color": INK, "lines.linewidth": 1.6, "lines.markersize": 6, "axes.linewidth": 0.8}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 7.4), layout="constrained")
        names = [name for name in ZOO_NAMES if any(row["model"] == name for row in rows)]
        panels = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
        for column, name in zip(panels.T, names, strict=True):
            column[0].set_title(f"zoo:{name}")
            column[1].set_xlabel("share of the cache")
            for axes, (figure_name, _) in zip(column, SCALES, strict=True):
                draw(axes, rows, name, figure_name)
        for axes, (_, label) in zip(panels[:, 0], SCALES, strict=True):
            axes.set_ylabel(label)
        drawn = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
        labels = [look["label"] for look in STYLES.values() if look["label"] in drawn]
        handles = [drawn[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", file.getvalue(), flags=re.DOTALL)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # of a point


def draw(axes: Any, rows: Sequence[Row], name: str, figure_name: str) -> None:
    """One panel: a line for each method."""
    for method, look in STYLES.items():
        if not (points := line_of(rows, name, method)):
            continue
        values = [max(LEAST, row["kl"]) if figure_name == "kl" else row["exact_match"] for row in points]
        dashes = "-" if look["label"].startswith("ours") else "--"
        axes.plot([row["share"] for row in points], values, linestyle=dashes, **look)
    axes.set_xscale("log")
    axes.set_xlim(1.0, 0.032)  # the smaller the farther right
    axes.set_xticks(TICKS, [f"{100 * budget:g}%" for budget in TICKS])
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    if figure_name == "kl":
        axes.set_yscale("log")
    else:
        original = first_seed(rows, model=name, method="original")
        axes.axhline(original["exact_match"] if original else 1.0, color=INK, linewidth=0.8)
        axes.yaxis.set_major_formatter("{x:.0%}")
    axes.minorticks_off()
