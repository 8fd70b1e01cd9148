"""The model card of a converted model, and its way to the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mha2mla_vlm.config import CHANNEL_BITS, AttentionSizes, LayerSpec, MLAConfig
from mha2mla_vlm.errors import InputError, first_line
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.state import state_bytes_per_row
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.utils.remote import HUB_ERRORS, unreachable

CARD = """---
{metadata}
---

# {name} with multi-head latent attention

Converted from {base} with mha2mla-vlm ([the method](https://arxiv.org/abs/2601.11464)): the cache holds a
small latent for each token instead of keys and values.

| | |
|---|---|
{rows}

KL is the mean divergence from the original, in nats per token of held-out answers, measured by the
conversion.

## Use

```python
from mha2mla_vlm import load, load_processor  # pip install mha2mla-vlm

model, processor = load("THIS FOLDER"), load_processor("THIS FOLDER")
```

Or `AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)`, with mha2mla-vlm installed.
A server for many users: `vllm serve`, with `mha2mla-vlm[vllm]` installed.

## Licence

The weights derive from {name}: its licence holds for them too. {licence}
"""
TAGS = ["mha2mla-vlm", "mla", "multi-head-latent-attention", "kv-cache"]


def model_card(config: Any) -> str:
    """A card in Markdown with the hub's metadata, from the config of a converted model."""
    mla, family = MLAConfig.from_dict(config.mla), get_family(config.model_type)
    base = mla.original if mla.original and not Path(mla.original).is_absolute() else None
    data = ModelCardData(
        base_model=base if base and "/" in base else None,  # else of the zoo, or of a folder
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=TAGS,
    )
    return CARD.format(
        metadata=data.to_yaml(),
        name=base or f"a {family.model_type} model",
        base=f"`{base}`" if base else "its original",
        rows="\n".join(f"| {name} | {value} |" for name, value in _facts(config, mla).items()),
        licence=family.licence,
    )


def _facts(config: Any, mla: MLAConfig) -> dict[str, str]:
    """Sizes, method and losses."""
    before, after = bytes_per_token(config, original=True), bytes_per_token(config)
    specs = mla.layers(sizes := AttentionSizes.of(config))
    facts = {
        "cache bytes per token (16 bits)": f"{before:,} to {after:,} ({after / before:.1%})",
        **_state(config),
        "rope dims per KV head (R), by layer": by_layer([spec and spec.rope_dim for spec in specs]),
        "latent dims (r), by layer": by_layer([spec and spec.rank for spec in specs]),
        "bits of latent dims": _bits(specs),
        "arithmetic of attention for each cached token, in that of the original": (
            f"{mla.decode_cost(sizes):.3g}"
        ),
        **method(mla),
    }
    losses = (mla.kl or {}).items()
    return facts | {
        f"KL after {step.replace('_', ' ')}": f"{kl:.4f} nats per answer token" for step, kl in losses
    }


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


def write_card(config: Any, folder: Path) -> None:
    """Write `README.md`."""
    (folder / "README.md").write_text(model_card(config), encoding="utf-8")


def check_repository(repository: str | None) -> None:
    """Raise `InputError` if nothing could be sent there: a bad name, or no token that may write."""
    if repository is None:
        return
    try:
        validate_repo_id(repository)
        if away := unreachable():
            raise InputError(f"--push-to-hub {repository}: {away}; leave it out, and send the result later")
        HfApi().repo_exists(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repository!r}: {error}") from None
    except (LocalTokenNotFoundError, *HUB_ERRORS) as error:
        reason = first_line(error)
        raise InputError(f"--push-to-hub {repository}: {reason}; log in with: hf auth login") from None


def push(folder: Path, repository: str) -> str:
    """Send a folder to a model repository of the hub, made if it is not there; returns its address."""
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise InputError(
            f"the model is in {folder}, but cannot be sent to {repository}: {reason}; "
            f"send it with: hf upload {repository} {folder}"
        ) from error
    return str(address)
