"""The model card of a converted model: what it is, what was measured, what it is not known to do."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mha2mla_vlm.config import CHANNEL_BITS, AttentionSizes, LayerSpec, MLAConfig
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.state import state_bytes_per_row
from mha2mla_vlm.model.families import get_family

TASK = "image-text-to-text"
TAGS = ["mha2mla-vlm", "mla", "multi-head-latent-attention", "kv-cache"]
STEPS = ("factorization", "partial_rope")  # of a conversion, the last one first
METRICS = {  # what an evaluation measures: the hub's name of the metric, and ours
    "exact_match": ("exact_match", "answers exactly right"),
    "agreement": ("agreement", "answers that equal the original's"),
    "kl": ("kl_divergence", "KL from the original, nats per answer token"),
    "cross_entropy": ("cross_entropy", "cross entropy of the answers, nats per token"),
}
CARD = """---
{{ card_data }}
---

# {{ name }}, with multi-head latent attention

Converted from {{ base }}
{%- if adapter %}, after the adapter `{{ adapter }}` was merged into it,{% endif %} with mha2mla-vlm
([the method](https://arxiv.org/abs/2601.11464)){{ ", then trained" if trained }}: the cache holds a
small latent for each token instead of keys and values.

| | |
|---|---|
{% for fact, value in facts.items() -%}
| {{ fact }} | {{ value }} |
{% endfor %}
KL is the mean divergence from the original{{ " with its adapter" if adapter }}, in nats per token of held-out
answers, measured by the conversion{{ ", before training" if trained }}.

## Use

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {{ name | tojson }}
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

content = [
    {"type": "image", "image": Image.open("picture.png")},
    {"type": "text", "text": "What does the picture show?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

This runs the Python files beside the weights, which need torch and transformers only; they were written
with transformers {{ version }}. Where the package is installed (`pip install mha2mla-vlm`) it is used
instead, with its kernels; its own `mha2mla_vlm.load` runs none of the files. A server for many users:
`vllm serve`, with `mha2mla-vlm[vllm]` installed.

## Data and limits

{{ calibration }}

Sizes and factors were chosen to keep the answers to those chats. Chats unlike them, of another kind, in
another language, longer, or with more images, may lose more than is measured here: measure on your own
before use, with `mha2mla evaluate {{ name }} --data CHATS --baseline ORIGINAL`.

Measured was {{ measured }}. Nothing else was: no public benchmark, no safety, no bias. What the original
does wrong this model does too.

## Licence

The weights derive from {{ base }}: its licence holds for them too. {{ licence }}
{%- if adapter %} What licence the adapter has is not recorded.{% endif %}

"""


def model_card(
    config: Any,
    *,
    name: str,
    findings: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    trained: bool = False,
) -> ModelCard:
    """The card of a converted model that is called `name`, a folder's or a repository's.

    `findings` are those of its conversion, `evaluation` what was measured later on held-out chats, by the
    names in `METRICS`, of these weights; `trained` says that they were trained after the conversion.
    """
    mla, family, found = MLAConfig.from_dict(config.mla), get_family(config.model_type), findings or {}
    source: dict[str, str] = found.get("source", {})
    origin = mla.original or source.get("merged_into")
    base = origin if origin and not Path(origin).is_absolute() else None
    hub = base if base and "/" in base else None
    results = _results(None if trained else mla.kl, evaluation or {})
    data = ModelCardData(
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=_link(source.get("license_link"), hub),
        base_model=hub or source.get("base_model"),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=TAGS,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=name,
        base=f"`{base}`" if base else f"a {family.model_type} model",
        adapter=source.get("adapter"),
        trained=trained,
        facts=_facts(config, mla, found),
        calibration=_calibration(found),
        measured=_measured(results),
        licence=_licence(source, family.licence),
        version=transformers.__version__,
    )


def _results(kl: dict[str, float] | None, evaluation: dict[str, Any]) -> list[EvalResult]:
    """The last KL of the conversion, and an evaluation, as the hub's model index has them."""
    found = []
    last = next((kl[step] for step in STEPS if step in kl), None) if kl else None
    if last is not None:
        found.append(_result("calibration-chats", "held-out share of the calibration chats", "kl", last))
    for key in METRICS:
        if evaluation.get(key) is not None:
            found.append(_result("held-out-chats", "held-out chats", key, evaluation[key]))
    return found


def _result(kind: str, chats: str, key: str, value: float) -> EvalResult:
    metric, title = METRICS[key]
    return EvalResult(
        task_type=TASK,
        dataset_type=kind,
        dataset_name=chats,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 6),
    )


def _measured(results: list[EvalResult]) -> str:
    """What was measured, in words."""
    said = [f"{each.metric_name} ({each.metric_value:.4f}, on the {each.dataset_name})" for each in results]
    return ", ".join(said) or "nothing that is recorded here"


def _calibration(findings: dict[str, Any]) -> str:
    """What it was calibrated on, in words."""
    count = findings.get("calibration_chats")
    if count is None:
        return "What it was calibrated on is not recorded."
    made, held_out = findings.get("random_chats", 0), findings.get("held_out_chats")
    parts = f", of which {made} are random tokens and pictures of noise" if made else ""
    rest = f" {held_out} more were held out to measure the KL." if held_out else ""
    return f"It was calibrated on {count} chats{parts}.{rest}"


def _link(link: str | None, hub: str | None) -> str | None:
    """The address of a licence that may be a file of the original's repository."""
    if link is None or "://" in link:
        return link
    return None if hub is None else f"https://huggingface.co/{hub}/blob/main/{link}"


def _licence(source: dict[str, str], of_family: str) -> str:
    """What is known of the licence."""
    stated = source.get("license_name") or source.get("license")
    return f"It is stated as `{stated}`. {of_family}" if stated else of_family


def _facts(config: Any, mla: MLAConfig, findings: dict[str, Any]) -> dict[str, str]:
    """Sizes, method and losses."""
    before, after = bytes_per_token(config, original=True), bytes_per_token(config)
    specs = mla.layers(sizes := AttentionSizes.of(config))
    facts = {
        "cache bytes per token (16 bits)": f"{before:,} to {after:,} ({after / before:.1%})",
        **_state(config),
        "rope dims per KV head (R), by layer": by_layer([spec and spec.rope_dim for spec in specs]),
        "latent dims (r), by layer": by_layer([spec and spec.rank for spec in specs]),
        "bits of latent dims": _bits(specs),
        **_choice(findings),
        "arithmetic of attention for each cached token, in that of the original": (
            f"{mla.decode_cost(sizes):.3g}"
        ),
        **method(mla),
    }
    losses, intervals = (mla.kl or {}).items(), findings.get("kl_interval", {})
    return facts | {
        f"KL after {step.replace('_', ' ')}": f"{kl:.4f}{_ends(intervals.get(step))} nats per answer token"
        for step, kl in losses
    }


def _ends(interval: list[float] | None) -> str:
    """The ends of a 95% interval, if it is known."""
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


def _choice(findings: dict[str, Any]) -> dict[str, str]:
    """Why latents are kept as they are, where that was chosen."""
    found = findings.get("latent_bits")
    return {"chosen": found["why"]} if found else {}


def _state(config: Any) -> dict[str, str]:
    """What layers that are not of full attention keep, if there are any."""
    found = state_bytes_per_row(config)
    return {"bytes a chat in layers left as they were (16 bits)": f"{found:,}, as before"} if found else {}


def _bits(specs: list[LayerSpec | None]) -> str:
    """How many latent dims have how many bits, in all layers together."""
    if not any(spec and spec.bits for spec in specs):
        return "16"
    counts = [sum(each) for each in zip(*(spec.bits for spec in specs if spec and spec.bits), strict=True)]
    listed = (f"{count} of {bits}" for count, bits in zip(counts, CHANNEL_BITS, strict=True))
    return f"{', '.join(listed)} bits, over all layers"


def method(mla: MLAConfig) -> dict[str, str]:
    """How a model was converted, in words."""
    listed = mla.rotate_at if isinstance(mla.rotate_at, list) else [mla.rotate_at]
    modes = [mode for mode in listed if mode is not None]
    kept = "all stay rotated" if "write" not in modes else "not recorded"
    counts = [f"{mode} in {modes.count(mode)} layers" for mode in sorted(set(modes))]
    return {
        "pairs chosen by": f"{mla.rope_selection or kept}{', folded' if mla.folded else ''}",
        "keys are rotated at": modes[0] if len(counts) == 1 else ", ".join(counts),
        "factorisation": f"{mla.factorization or 'none'}, for {' and '.join(mla.modalities)} tokens",
    }


def by_layer(values: list[Any]) -> str:
    """The one value that all layers have, or each layer's."""
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


def write_card(config: Any, folder: Path, **known: Any) -> None:
    """Write `README.md`, whole or not at all; `known` is what `model_card` takes."""
    path = folder / "README.md.partial"
    model_card(config, **known).save(path)
    path.replace(folder / "README.md")
