"""The page: one HTML file that needs nothing else."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mha2mla_vlm.data.records import open_image
from mha2mla_vlm.evaluation.intervals import sign_test
from mha2mla_vlm.model.card import method
from mha2mla_vlm.report.gather import Example, Report
from mha2mla_vlm.report.plots import cache_plot, layer_colors, losses_plot, pairs_plot, spectra_plot
from mha2mla_vlm.utils.folders import new_file
from mha2mla_vlm.utils.progress import status
from mha2mla_vlm.utils.shown import data_url, size_text

LARGEST_SIDE = 384  # pixels of an image that is shown
CLEAR = 0.05  # of a sign test: a change that is less likely by chance is one
# what examples can be filtered by
CHOICES = {"": "all", "differs": "differing", "worse": "became wrong", "better": "became right"}
SHOWN_TOKENS = 32_768  # of the caches that the head of the page compares


def render(report: Report) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("mha2mla_vlm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "size": size_text, "seconds": _seconds, "change": _change}
    environment.filters |= {"data_url": lambda image: data_url(open_image(image, "example"), LARGEST_SIDE)}
    environment.filters |= {"change_text": _change_text, "colors": _colors}
    before, after, coded = report.bytes_per_token
    return environment.get_template("page.html.j2").render(
        report=report,
        share=after / before,
        tokens=SHOWN_TOKENS,
        caches=[("original", before), ("converted", after), ("converted, 4-bit", coded)],
        speeds=list(zip(("original", "converted"), report.speed.first, report.speed.later, strict=True)),
        choices=_choices(report),
        examples_text=_examples_text(report),
        facts=_facts(report),
        verdict=_verdict(report.quality),
        cache=cache_plot(report),
        pairs=pairs_plot(report),
        spectra=spectra_plot(report),
        losses=losses_plot(report),
        layers=layer_colors(len(report.layers)),
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    with status("drawing the page"):
        text = render(report)
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _facts(report: Report) -> dict[str, str]:
    """What was converted, and how."""
    mla, sizes = report.mla, report.sizes
    latents = [layer.rank for layer in report.layers if layer.rank is not None]
    facts = {
        "original": mla.original or "not recorded",
        "family": report.family,
        "decoder layers": str(sizes.layers),
        "heads": f"{sizes.heads} for queries, {sizes.kv_heads} for keys and values, of {sizes.head_dim} dims",
        **method(mla),
        "rope dims per KV head (R)": _range([layer.rope_dim for layer in report.layers if layer.rope_dim]),
        "latent dims per token (r)": _range(latents) if latents else "keys and values whole",
    }
    if report.settings:
        facts["budget"] = _percent(report.settings["budget"]) if report.settings.get("budget") else "none"
        facts["calibration chats, at most"] = str(report.settings["samples"])
    steps = {f"KL after {step.replace('_', ' ')}": f"{kl:.4f}" for step, kl in (mla.kl or {}).items()}
    return facts | steps


def _change(quality: dict[str, Any]) -> str:
    """Whether answers got clearly worse ("loss") or better ("gain"); empty for what chance may bring."""
    worse, better = quality["worse"], quality["better"]
    if sign_test(worse, better) >= CLEAR:
        return ""
    return "loss" if worse > better else "gain"


def _verdict(quality: dict[str, Any]) -> str:
    """What the answers show, in words."""
    worse, better = quality["worse"], quality["better"]
    counts = f"{worse:,} became wrong, {better:,} became right"
    chance = f"a change like this comes by chance {_share(sign_test(worse, better))} of the time"
    found = {
        "": f"These answers show no difference from the original: {counts} ({chance}).",
        "loss": f"It answers worse than the original: {counts} ({chance}).",
        "gain": f"It answers better than the original: {counts} ({chance}).",
    }
    return found[_change(quality)]


def _range(values: list[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}, by layer"


def _share(value: float) -> str:
    return "less than 0.1%" if value < 0.001 else f"{value:.1%}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.{1 if value < 0.1 else 0}f} ms"


def _colors(colors: list[str]) -> str:
    """Colours of layers as variables."""
    return " ".join(f"--layer-{index}: {color};" for index, color in enumerate(colors))


def _examples_text(report: Report) -> str:
    """Which answers are shown."""
    shown, answers, differing = len(report.examples), report.quality["answers"], report.differing
    found = sum(not example.agree for example in report.examples)
    which = f"All {answers:,} answers" if shown == answers else f"{shown:,} of {answers:,} answers"
    if not differing:
        return f"{which}. No answer differs from the original's."
    here = "" if found == differing else f", {found:,} of them here"
    return (
        f"{which}. {differing:,} differ{'s' * (differing == 1)} from the original's{here}; such come first."
    )


def _choices(report: Report) -> dict[str, str]:
    """What the examples can be filtered by, and how many there are of each."""
    counts = {
        "": len(report.examples),
        "differs": sum(not example.agree for example in report.examples),
        **{change: sum(e.change == change for e in report.examples) for change in ("worse", "better")},
    }
    return {value: f"{name} ({counts[value]})" for value, name in CHOICES.items()}


def _change_text(example: Example) -> str:
    """What became of an answer."""
    if example.change:
        return f"became {'wrong' if example.change == 'worse' else 'right'}"
    return "the same answer" if example.agree else "another answer, both wrong"
