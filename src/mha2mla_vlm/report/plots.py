"""Figures of a report as SVG, in the colour of the text around them, for wide and for narrow windows.

What lies under the pointer is said by marks: transparent shapes with a `<title>`, which the page also shows
for the keyboard and for fingers.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from mha2mla_vlm.report.gather import Layer, Report
from mha2mla_vlm.utils.shown import size_text

INK = "#010203"  # stands for the colour of the text
LAYER = "#0a0b{:02x}"  # stands for the colour of a layer, a variable of the page
ORIGINAL, CONVERTED, FOUR_BITS = "#858b96", "#2f7ed8", "#c7691b"  # stand out from white and from dark alike
DASHES = ("-", "--", ":")
CONTEXTS = [thousands * 1024 for thousands in (0, 32, 64, 96, 128)]
WIDTHS = {"broad": 6.4, "narrow": 3.6}  # inches
RAMPS = {"light": (0.0, 0.63), "dark": (0.5, 1.0)}  # parts of a colour map that stand out from the page
NAMED_LAYERS, LISTED_HEADS = 8, 8


class _Marks(list[str]):
    """What marks say, in the order in which they were set."""

    def set(self, artist: Any, text: str) -> None:
        artist.set_gid(f"mark{len(self)}")
        self.append(text)


Draw = Callable[[Any, _Marks, bool], None]  # on a figure, with marks, in a narrow window


def layer_colors(count: int) -> dict[str, list[str]]:
    """Colours of layers on a light and on a dark page; plasma, whose lightness alone tells them apart."""
    import matplotlib
    from matplotlib.colors import to_hex

    ramp, steps = matplotlib.colormaps["plasma"], max(1, count - 1)
    return {
        scheme: [to_hex(ramp(start + (end - start) * index / steps)) for index in range(count)]
        for scheme, (start, end) in RAMPS.items()
    }


def _figure(draw: Draw, height: float, label: str, narrow_height: float | None = None) -> str:
    """What `draw` puts on a figure of some inches of height, for both widths of windows."""
    heights = {"broad": height, "narrow": narrow_height or height}
    return "".join(_svg(draw, width, heights[name], label, name) for name, width in WIDTHS.items())


def _svg(draw: Draw, width: float, height: float, label: str, name: str) -> str:
    """One SVG of a class, with a label for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mha2mla",
        "font.size": 9,
        "axes.linewidth": 0.6,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK)
    style |= dict.fromkeys(("xtick.color", "ytick.color"), INK)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    marks = _Marks()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, marks, name == "narrow")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(LAYER[:5] + "([0-9a-f]{2})", lambda found: f"var(--layer-{int(found[1], 16)})", text)
    for number, said in enumerate(marks):
        begin = f'<g class="mark"><title>{html.escape(said)}</title>'
        text = text.replace(f'<g id="mark{number}">', begin)
    prefix = re.sub(r"[^a-z]", "", label.lower())[:12] + name[0]
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg class="{name}" role="img" aria-label="{label}" ', 1)


def cache_plot(report: Report) -> str:
    """Cache of one sequence over its length."""
    names = ("original", "converted", "converted, 4-bit")

    def draw(figure: Any, marks: _Marks, narrow: bool) -> None:
        axes, half = figure.subplots(), (CONTEXTS[1] - CONTEXTS[0]) / 2
        looks = zip(names, report.bytes_per_token, (ORIGINAL, CONVERTED, FOUR_BITS), DASHES, strict=True)
        for name, size, color, dashes in looks:
            values = [size * tokens / 1e6 for tokens in CONTEXTS]
            axes.plot(CONTEXTS, values, dashes, color=color, label=name, linewidth=2)
        for tokens in CONTEXTS[1:]:
            sizes = zip(names, report.bytes_per_token, strict=True)
            said = ", ".join(f"{name} {size_text(size * tokens)}" for name, size in sizes)
            end = min(tokens + half, CONTEXTS[-1])
            strip = axes.axvspan(tokens - half, end, color=INK, linewidth=0)
            marks.set(strip, f"{tokens:,} tokens: {said}")
        axes.set_xticks(CONTEXTS, [f"{tokens // 1024}k" for tokens in CONTEXTS])
        axes.set(xlabel="tokens", ylabel="MB", ylim=(0, None), xlim=(0, CONTEXTS[-1]))
        axes.legend(loc="upper left")

    return _figure(draw, 3.0, "Cache size by context length", 2.6)


def pairs_plot(report: Report) -> str | None:
    """Which frequency pairs stay rotated, a row for each KV head of each layer; None if all of them do."""
    pairs = report.sizes.rotary_dim // 2
    layers = [(index, layer) for index, layer in enumerate(report.layers) if layer.pairs]
    heads = [set(head) for _, layer in layers for head in layer.pairs]
    kept = [[float(pair in head) for pair in range(pairs)] for head in heads]
    if all(map(all, kept)):
        return None

    def draw(figure: Any, marks: _Marks, narrow: bool) -> None:
        from matplotlib.colors import ListedColormap

        axes, count = figure.subplots(), len(layers[0][1].pairs)
        colors = ListedColormap([f"{ORIGINAL}33", CONVERTED])
        axes.imshow(kept, aspect="auto", interpolation="none", cmap=colors, vmin=0, vmax=1)
        named = range(0, len(layers), -(-len(layers) // 40))
        axes.set_yticks(
            [place * count + (count - 1) / 2 for place in named], [str(layers[place][0]) for place in named]
        )
        for place, (index, layer) in enumerate(layers):
            if place:
                axes.axhline(place * count - 0.5, color=INK, linewidth=0.6)
            strip = axes.axhspan(place * count - 0.5, (place + 1) * count - 0.5, color=INK, linewidth=0)
            marks.set(strip, f"layer {index}: {_pairs_text(layer, pairs)}")
        axes.set(xlabel="frequency pair, the fastest first", ylabel="layer")

    return _figure(draw, max(2.0, min(9.0, 0.9 + 0.13 * len(kept))), "Pairs that stay rotated")


def _pairs_text(layer: Layer, pairs: int) -> str:
    """Pairs of a layer that stay rotated, by head where there are few."""
    count = len(layer.pairs[0])
    if count in (0, pairs):
        return f"{'all' if count else 'none'} of {pairs} pairs"
    if len(layer.pairs) > LISTED_HEADS:
        return f"{count} of {pairs} pairs of each KV head"
    heads = [f"KV head {head}: {_ranges(kept)}" for head, kept in enumerate(layer.pairs)]
    return f"{count} of {pairs} pairs; {'; '.join(heads)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in words, neighbours as a range."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def spectra_plot(report: Report) -> str | None:
    """What latent directions carry, by modality; a dot where each layer is cut. None if it is not known."""
    modalities = sorted({name for layer in report.layers for name in layer.spectra})
    if not modalities:
        return None
    named = range(0, len(report.layers), -(-len(report.layers) // NAMED_LAYERS))

    def draw(figure: Any, marks: _Marks, narrow: bool) -> None:
        grid = (len(modalities), 1) if narrow else (1, len(modalities))
        places = figure.subplots(*grid, sharex=True, sharey=True, squeeze=False).flat
        for axes, modality in zip(places, modalities, strict=True):
            for index, layer in enumerate(report.layers):
                _spectrum(axes, marks, index, layer, modality, index in named)
            axes.set(title=modality, xscale="log", yscale="log", ylim=(1e-7, 1.5))
            axes.label_outer()
        figure.supxlabel("direction", fontsize=9)
        figure.supylabel("share of the first", fontsize=9)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        columns = 4 if narrow else 8
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=7.5)

    return _figure(draw, 3.2, "Spectra of keys and values", 2.2 * len(modalities) + 0.8)


def _spectrum(axes: Any, marks: _Marks, index: int, layer: Layer, modality: str, named: bool) -> None:
    """A line, a dot where it is cut, and its mark."""
    if modality not in layer.spectra:  # a layer left as it was
        return
    places, values = zip(*layer.spectra[modality], strict=True)
    color = LAYER.format(index)
    axes.plot(places, values, color=color, linewidth=1.4, label=f"layer {index}" if named else None)
    said = f"layer {index}, {modality}"
    if cut := [point for point in layer.spectra[modality] if point[0] <= (layer.rank or 0)]:
        axes.plot(*cut[-1], "o", color=color, markersize=4)
        said += f": the latent keeps {layer.rank} directions; the last carries {cut[-1][1]:.1g} of the first"
    marks.set(axes.plot(places, values, color=color, linewidth=8, zorder=5)[0], said)


def losses_plot(report: Report) -> str | None:
    """KL of converting only one layer, predicted and measured; None if neither is known."""
    series = {
        "predicted": ([layer.predicted for layer in report.layers], ORIGINAL),
        "measured": ([layer.measured for layer in report.layers], CONVERTED),
    }
    known = {name: pair for name, pair in series.items() if None not in pair[0]}
    if not known:
        return None
    count = len(report.layers)

    def draw(figure: Any, marks: _Marks, narrow: bool) -> None:
        axes, width = figure.subplots(), 0.8 / len(known)
        for number, (name, (values, color)) in enumerate(known.items()):
            places = [index - 0.4 + width * (number + 0.5) for index in range(count)]
            axes.bar(places, values, width=width, color=color, label=name)
        for index in range(count):
            found = [f"{name} {values[index]:.5f}" for name, (values, _) in known.items()]
            strip = axes.axvspan(index - 0.5, index + 0.5, color=INK, linewidth=0)
            marks.set(strip, f"layer {index}: {', '.join(found)}")
        ticks = range(0, count, -(-count // (8 if narrow else 24)))
        axes.set(xlabel="layer", ylabel="KL, nats per token", xticks=ticks, xlim=(-0.6, count - 0.4))
        figure.legend(loc="outside upper center", ncols=len(known))

    return _figure(draw, 2.6, "KL of converting only one layer")
