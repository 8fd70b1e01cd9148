"""Figures of a report as SVG, in the colour of the text around them."""

import io
import re
from collections.abc import Callable
from typing import Any

from mha2mla_vlm.report.gather import Report

INK = "#010203"  # stands for the colour of the text
ORIGINAL, CONVERTED, FOUR_BITS = "#8a8f98", "#2f7ed8", "#e0862b"
CONTEXTS = [thousands * 1024 for thousands in (0, 32, 64, 96, 128)]


def _figure(draw: Callable[[Any], None], width: float, height: float, label: str) -> str:
    """What `draw` puts on a matplotlib figure of so many inches, with a label for those who cannot see it."""
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
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^a-z]', '', label.lower())[:12]}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def cache_plot(report: Report) -> str:
    """Cache of one sequence over its length."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = ("original", "converted", "converted, 4-bit")
        colors = (ORIGINAL, CONVERTED, FOUR_BITS)
        for name, size, color in zip(names, report.bytes_per_token, colors, strict=True):
            axes.plot(CONTEXTS, [size * tokens / 1e6 for tokens in CONTEXTS], color=color, label=name)
        axes.set_xticks(CONTEXTS, [f"{tokens // 1024}k" for tokens in CONTEXTS])
        axes.set(xlabel="tokens", ylabel="MB", ylim=(0, None), xlim=(0, CONTEXTS[-1]))
        axes.legend()

    return _figure(draw, 6.4, 3.0, "Cache size by context length")


def pairs_plot(report: Report) -> str:
    """Which frequency pairs stay rotated, a row for each KV head of each layer."""
    pairs = report.sizes.rotary_dim // 2
    layers = [(index, layer) for index, layer in enumerate(report.layers) if layer.pairs]
    heads = [set(head) for _, layer in layers for head in layer.pairs]
    kept = [[float(pair in head) for pair in range(pairs)] for head in heads]

    def draw(figure: Any) -> None:
        from matplotlib.colors import ListedColormap

        axes, count = figure.subplots(), len(layers[0][1].pairs)
        axes.imshow(kept, aspect="auto", interpolation="none", cmap=ListedColormap(["#8a8f9833", CONVERTED]))
        axes.set_yticks(
            [place * count + (count - 1) / 2 for place in range(len(layers))],
            [str(index) for index, _ in layers],
        )
        for index in range(1, len(layers)):
            axes.axhline(index * count - 0.5, color=INK, linewidth=0.6)
        axes.set(xlabel="frequency pair, the fastest first", ylabel="layer")

    return _figure(draw, 6.4, max(2.0, min(9.0, 0.9 + 0.13 * len(kept))), "Pairs that stay rotated")


def spectra_plot(report: Report) -> str | None:
    """What latent directions carry, by modality; a dot where each layer is cut. None if it is not known."""
    modalities = sorted({name for layer in report.layers for name in layer.spectra})
    if not modalities:
        return None

    def draw(figure: Any) -> None:
        import matplotlib

        colors = matplotlib.colormaps["viridis"].resampled(max(2, len(report.layers)))
        for axes, modality in zip(
            figure.subplots(1, len(modalities), sharey=True, squeeze=False)[0], modalities, strict=True
        ):
            for index, layer in enumerate(report.layers):
                if modality not in layer.spectra:  # of a layer left as it was
                    continue
                places, values = zip(*layer.spectra[modality], strict=True)
                axes.plot(places, values, color=colors(index), linewidth=1.0, label=f"layer {index}")
                cut = [point for point in layer.spectra[modality] if point[0] <= (layer.rank or 0)]
                if cut:
                    axes.plot(*cut[-1], "o", color=colors(index), markersize=3.5)
            axes.set(title=modality, xlabel="direction", xscale="log", yscale="log", ylim=(1e-7, 1.5))
        figure.axes[0].set_ylabel("share of the first")
        figure.axes[-1].legend(ncols=1 + len(report.layers) // 9, fontsize=7)

    return _figure(draw, 6.4, 3.0, "Spectra of keys and values")


def losses_plot(report: Report) -> str | None:
    """KL of converting only one layer, predicted and measured; None if neither is known."""
    series = {
        "predicted": ([layer.predicted for layer in report.layers], ORIGINAL),
        "measured": ([layer.measured for layer in report.layers], CONVERTED),
    }
    known = {name: pair for name, pair in series.items() if None not in pair[0]}
    if not known:
        return None

    def draw(figure: Any) -> None:
        axes, width = figure.subplots(), 0.8 / len(known)
        for number, (name, (values, color)) in enumerate(known.items()):
            places = [index - 0.4 + width * (number + 0.5) for index in range(len(values))]
            axes.bar(places, values, width=width, color=color, label=name)
        axes.set(xlabel="layer", ylabel="KL, nats per token", xticks=range(len(report.layers)))
        axes.legend()

    return _figure(draw, 6.4, 2.6, "KL of converting only one layer")
