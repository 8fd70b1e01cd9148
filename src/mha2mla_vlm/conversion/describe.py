"""What a converted checkpoint holds: sizes, kept pairs and bytes, read without loading the model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import safe_open

from mha2mla_vlm.config import CHANNEL_BITS, AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.weights import converted_config
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.state import state_bytes_per_row
from mha2mla_vlm.model.checkpoint import load_config, resolve
from mha2mla_vlm.model.files import check_weights, weights_files
from mha2mla_vlm.model.origin import read_findings
from mha2mla_vlm.utils.remote import remote_tensors


def describe(name: str) -> dict[str, Any]:
    """Layers, sizes, kept pairs and bytes per token (16 bits an element) of a converted checkpoint.

    `pairs` lists, for each layer and KV head, the frequency pairs that stay rotated, none for a layer left as
    it was; of a checkpoint on the hub only they are read. `predicted_kl` is, for each layer, the KL
    that converting only this layer was predicted to cost, by which sizes were allocated. `decode_cost` is the
    arithmetic of attention for each cached token, in that of the original (`MLAConfig.decode_cost`).
    `rotary_dim` is how many dims of a head the original rotates, `state_bytes_per_row` what layers that are
    not of full attention keep besides, before and after (`cache.state.state_bytes_per_row`). A folder with
    `conversion.json` says `kl_interval`, and `latent_bits_choice`, why latents are kept as they are.
    """
    config = load_config(name)
    if getattr(config, "mla", None) is None:
        raise InputError(f"{name!r} is not a converted model; make one with: mha2mla convert")
    mla = MLAConfig.from_dict(config.mla)
    sizes, findings = AttentionSizes.of(config), read_findings(name)
    return {
        "family": config.model_type.removesuffix("_mla"),
        "layers": sizes.layers,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "kv_lora_rank": mla.kv_lora_rank,
        "rotate_at": mla.rotate_at,
        "rotary_dim": sizes.rotary_dim,
        "latent_bits": mla.latent_bits,
        "latent_bits_choice": _choice(findings),
        "decode_cost": mla.decode_cost(sizes),
        "modalities": list(mla.modalities),
        "bytes_per_token": bytes_per_token(config),
        "bytes_per_token_original": bytes_per_token(config, original=True),
        "state_bytes_per_row": state_bytes_per_row(config),
        "rope_selection": mla.rope_selection,
        "factorization": mla.factorization,
        "folded": mla.folded,
        "kl": mla.kl,
        "kl_interval": findings.get("kl_interval"),
        "predicted_kl": mla.predicted_kl,
        "pairs": _pairs(resolve(name), sizes.layers),
    }


def conversion_summary(
    original: Any, mla: MLAConfig, dtype: torch.dtype, findings: dict[str, Any]
) -> dict[str, Any]:
    """What a conversion made of a model with the config `original`; bytes in its dtype."""
    converted = converted_config(original, mla)
    return {
        "family": original.model_type.removesuffix("_mla"),
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "kv_lora_rank": mla.kv_lora_rank,
        "rotate_at": mla.rotate_at,
        "latent_bits": mla.latent_bits,
        "decode_cost": mla.decode_cost(AttentionSizes.of(original)),
        "bytes_per_token": bytes_per_token(converted, itemsize=dtype.itemsize),
        "bytes_per_token_original": bytes_per_token(original, itemsize=dtype.itemsize),
        "latent_bits_choice": _choice(findings),
        "kl": None if not mla.kl else list(mla.kl.values())[-1],
        "kl_interval": None if not mla.kl else findings["kl_interval"][list(mla.kl)[-1]],
        "kl_by_step": mla.kl,
        "predicted_kl": mla.predicted_kl,
    }


def _choice(findings: dict[str, Any]) -> str | None:
    """Why latents are kept as they are, where that was chosen."""
    return findings.get("latent_bits", {}).get("why")


def _pairs(source: str, layers: int) -> list[list[list[int]]]:
    tensors = _local_pairs(Path(source)) if Path(source).is_dir() else remote_tensors(source, _holds_pairs)
    found = {int(key.split(".layers.")[1].split(".")[0]): pairs.tolist() for key, pairs in tensors}
    return [found.get(layer, []) for layer in range(layers)]


def _holds_pairs(key: str) -> bool:
    return key.endswith("self_attn.rope_pairs")


def _local_pairs(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    check_weights(folder)
    for path in weights_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in filter(_holds_pairs, file.keys()):
                yield key, file.get_tensor(key)


def layers_table(description: dict[str, Any]) -> Table:
    """A table of the layers."""
    ratio = description["bytes_per_token"] / description["bytes_per_token_original"]
    size = description["bytes_per_token"]
    title = f"{description['family']}: {size:,} cache bytes per token, {ratio:.1%} of the original"
    if state := description["state_bytes_per_row"]:
        title += f"; and {state:,} bytes a chat in layers left as they were, as in the original"
    table = Table(title=title, caption=description["latent_bits_choice"])
    bits = f"r in {', '.join(map(str, CHANNEL_BITS))} bits"
    for column in ("layer", "R", "r", bits, "rotated at", "predicted KL", "pairs that stay rotated"):
        table.add_column(column)
    predicted = description["predicted_kl"] or []
    names = ("qk_rope_head_dim", "kv_lora_rank", "rotate_at", "latent_bits")
    mla = MLAConfig(**{name: description[name] for name in names})
    for layer in range(description["layers"]):
        spec = mla.layer(layer)
        pairs = description["pairs"][layer] if description["pairs"] else []
        shown = "\n".join(" ".join(map(str, head)) for head in pairs)
        cost = f"{predicted[layer]:.4f}" if predicted else "-"
        sizes = ["as it was", "-", "-", "-"]
        if spec is not None:
            counts = "all in 16" if spec.bits is None else ", ".join(map(str, spec.bits))
            sizes = [str(spec.rope_dim), str(spec.rank or "-"), counts, spec.rotate_at]
            if pairs and spec.rope_dim == description["rotary_dim"]:
                shown = "all"
        table.add_row(str(layer), *sizes, cost, shown)
    return table
