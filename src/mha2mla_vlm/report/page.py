"""The page: one HTML file that needs nothing else."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mha2mla_vlm.evaluation.intervals import sign_test
from mha2mla_vlm.model.card import method
from mha2mla_vlm.report.gather import Report
from mha2mla_vlm.report.plots import cache_plot, losses_plot, pairs_plot, spectra_plot
from mha2mla_vlm.utils.folders import new_file
from mha2mla_vlm.utils.progress import status

LARGEST_SIDE = 384  # pixels of an image that is shown
CLEAR = 0.05  # of a sign test: a change that is less likely by chance is one
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
    environment.filters |= {"percent": _percent, "size": _size, "data_url": _data_url, "change": _change}
    before, after, coded = report.bytes_per_token
    return environment.get_template("page.html.j2").render(
        report=report,
        share=after / before,
        tokens=SHOWN_TOKENS,
        caches=[("original", before), ("converted", after), ("converted, 4-bit", coded)],
        facts=_facts(report),
        verdict=_verdict(report.quality),
        cache=cache_plot(report),
        pairs=pairs_plot(report),
        spectra=spectra_plot(report),
        losses=losses_plot(report),
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
    chance = f"a change like this comes by chance {sign_test(worse, better):.1%} of the time"
    found = {
        "": f"These answers show no difference from the original: {counts} ({chance}).",
        "loss": f"It answers worse than the original: {counts} ({chance}).",
        "gain": f"It answers better than the original: {counts} ({chance}).",
    }
    return found[_change(quality)]


def _range(values: list[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}, by layer"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _size(value: float) -> str:
    """Bytes in a fitting unit."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def _data_url(image: Image.Image) -> Any:
    """An image as a `data:` URL."""
    small = image.copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
