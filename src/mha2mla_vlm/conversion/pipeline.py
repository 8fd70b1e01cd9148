"""The conversion, without training: partial RoPE, then factors of keys and values.

Shapes: G KV heads, R rope dims kept, r latent dims.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from mha2mla_vlm.algorithms.budget import unit_dims
from mha2mla_vlm.config import (
    BLOCKS,
    CENTERED,
    DECOUPLED,
    OUTPUT_WEIGHTED,
    PER_MODALITY,
    SHARED,
    AttentionSizes,
    ConversionConfig,
    MLAConfig,
)
from mha2mla_vlm.conversion.layer import LayerwiseConversion
from mha2mla_vlm.conversion.profile import LayerwiseProfile, MemoryWork, Profile, allotted, budget_units
from mha2mla_vlm.conversion.weights import converted_config, rebuild
from mha2mla_vlm.data.records import Record, encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.card import by_layer
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.origin import shared_name
from mha2mla_vlm.utils.compat import is_plain_tensor
from mha2mla_vlm.utils.progress import Phases, console


def convert(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    config: ConversionConfig = ConversionConfig(),
    *,
    profile: Profile | None = None,
) -> PreTrainedModel:
    """Convert a model to latent attention, training-free; the model given is left as it is.

    It is an original one, or one converted to partial RoPE alone (and perhaps trained since), whose
    keys and values are then factorised, with all layers alike.

    `records` calibrate, a share of them measures the loss: `converted.mla_config.kl` holds the mean
    KL divergence to the original on held-out answers after each transform. A `profile` from an
    earlier call (`make_profile`) saves measuring again. Raises `InputError` for a model or sizes that
    cannot be converted, before any work.
    """
    check_model(model)
    mla = plan(model.config, config)
    calibration, held_out = encode_split(model, processor, records, config)
    if profile is not None:
        profile.check(config)
    if is_allotted(model.config, config):
        profile = profile or _measured(model, calibration, config)
        mla = allotted(mla, profile.losses, AttentionSizes.of(model.config), config)
    print_plan(model.config, mla)
    known = None if profile is None else profile.layers.__getitem__
    layers = AttentionSizes.of(model.config).layers
    with Phases("converting layers", layers) as phases:
        conversion = LayerwiseConversion(model, config, mla, device=model.device, phases=phases, known=known)
        conversion.begin(calibration, held_out)
        made = []
        for index in range(layers):
            made.append(conversion.layer(index))
            conversion.states.drop(index)
            phases.advance()
        kl = conversion.kl()
    print_losses(kl)
    small = rebuild(model, replace(mla, kl=kl), [layer.weights for layer in made])
    small.findings = findings(config, len(calibration), [layer.spectra for layer in made])
    return small


def findings(config: ConversionConfig, chats: int, spectra: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is worth knowing of a conversion beside the model's config; `conversion.json` in its folder."""
    return {"settings": config.to_dict(), "calibration_chats": chats, "spectra": list(spectra)}


def print_losses(kl: dict[str, float]) -> None:
    """What each transform costs, on standard error."""
    for name, value in kl.items():
        console().print(f"{name.replace('_', ' ')}: KL {value:.4f}")


def make_profile(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    config: ConversionConfig = ConversionConfig(),
) -> Profile:
    """What calibration tells, for several calls of `convert` with the same records and methods."""
    check_model(model)
    return _measured(model, encode_split(model, processor, records, config)[0], config)


def _measured(model: PreTrainedModel, batches: Sequence[BatchFeature], config: ConversionConfig) -> Profile:
    """The profile from chats to calibrate on."""
    mla, layers = plan(model.config, config), AttentionSizes.of(model.config).layers
    with Phases("measuring layers", 2 * layers) as phases:
        given = {"device": model.device, "phases": phases, "work": MemoryWork()}
        found = LayerwiseProfile(model, config, mla, **given)
        found.run(batches)
    return Profile(config=config, layers=[found.layer(i) for i in range(layers)], losses=found.losses())


def check_model(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model whose weights cannot be read as they are."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise InputError(
            f"the model lies on {', '.join(map(str, devices))}; load it on one device to convert it"
        )
    for layer in decoder_layers(model):
        for name, child in layer.self_attn.named_children():
            modules = child.values() if isinstance(child, nn.ModuleDict) else [child]
            wrong = [m for m in modules if any(True for _ in m.parameters()) and not _is_linear(m)]
            if wrong:
                raise InputError(
                    f"layer {layer.self_attn.layer_idx}: {name} ({type(wrong[0]).__name__}) is not a plain "
                    "linear layer; merge adapters first (merge_and_unload), load quantised models in bfloat16"
                )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and all(map(is_plain_tensor, module.parameters()))


def plan(model_config: Any, config: ConversionConfig) -> MLAConfig:
    """Sizes of the converted model; raises `InputError` for what cannot be converted."""
    _check_not_quantized(model_config)
    if getattr(model_config, "mla", None) is not None:
        return _plan_factors(model_config, config)
    family = get_family(model_config.model_type)
    text = model_config.get_text_config(decoder=True)
    if text.model_type not in family.text_model_types:
        raise InputError(
            f"language model {text.model_type!r} is not supported in {family.model_type}; "
            f"supported: {', '.join(family.text_model_types)}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()) or getattr(
        text, "sliding_window", None
    ):
        raise InputError(
            "sliding-window attention is not supported; supported is full attention in every layer"
        )
    sizes = AttentionSizes.of(model_config)
    rope_dim = sizes.head_dim // 2 if config.rope_dim is None else config.rope_dim
    d_kv = sizes.head_dim // 4 if config.d_kv is None else config.d_kv
    # of `only-key` and `only-value`, d_kv is the rank of the one that is factorised
    whole = {"only-key": sizes.head_dim, "only-value": sizes.head_dim - rope_dim}.get(config.factorization, 0)
    mla = MLAConfig(
        qk_rope_head_dim=rope_dim,
        kv_lora_rank=None if config.factorization == "none" else sizes.kv_heads * (d_kv + whole),
        modalities=DECOUPLED if config.factorization in PER_MODALITY else SHARED,
        rope_selection=config.rope_selection,
        factorization=config.factorization,
        folded=config.fold,
        kv_bias=config.factorization in CENTERED,
        original=shared_name(model_config.name_or_path) if model_config.name_or_path else None,
    )
    mla.check(sizes)
    if config.share is not None:
        _check_budget(sizes, config)
    return mla


def _check_not_quantized(model_config: Any) -> None:
    """Raise `InputError` for a model whose weights are stored quantised (AWQ, GPTQ, FP8, bitsandbytes)."""
    text = model_config.get_text_config(decoder=True)
    given = (getattr(each, "quantization_config", None) for each in (model_config, text))
    found = next((each for each in given if each is not None), None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise InputError(
        f"the model is quantised ({getattr(method, 'value', method) or 'by an unknown method'}); convert "
        "what it was made of, in bfloat16 or float32, and quantise the result"
    )


def is_allotted(model_config: Any, config: ConversionConfig) -> bool:
    """Whether the sizes of layers come from a budget, by what each is foretold to cost."""
    return config.share is not None and getattr(model_config, "mla", None) is None


def _plan_factors(model_config: Any, config: ConversionConfig) -> MLAConfig:
    """Sizes of a model whose RoPE is partial already and whose keys and values are now factorised."""
    mla, sizes = MLAConfig.from_dict(model_config.mla), AttentionSizes.of(model_config)
    if mla.kv_lora_rank is not None:
        raise InputError("the model is converted already; give the original, or one with partial RoPE alone")
    if config.factorization in ("none", *OUTPUT_WEIGHTED, *BLOCKS):
        raise InputError(
            f"factorization {config.factorization!r} does not go with a model that has partial RoPE already; "
            "give md-svd, centered, activation-svd or weight-svd"
        )
    if config.budget is not None or config.rope_dim not in (None, mla.qk_rope_head_dim):
        raise InputError(
            f"the model has partial RoPE already, R = {mla.qk_rope_head_dim}; give d_kv alone, no budget"
        )
    d_kv = sizes.head_dim // 4 if config.d_kv is None else config.d_kv
    mla = replace(
        mla,
        kv_lora_rank=sizes.kv_heads * d_kv,
        modalities=DECOUPLED if config.factorization in PER_MODALITY else SHARED,
        factorization=config.factorization,
        kv_bias=config.factorization in CENTERED,
    )
    mla.check(sizes)
    return mla


def _check_budget(sizes: AttentionSizes, config: ConversionConfig) -> None:
    """Raise `InputError` if the least sizes of a layer, or those given, are over the budget."""
    unit = unit_dims(sizes.head_dim)
    for name, value in (("rope_dim", config.rope_dim), ("d_kv", config.d_kv)):
        if value is not None and value % unit:
            raise InputError(f"{name} = {value}: with a budget give a multiple of {unit}")
    least = sizes.layers * ((config.rope_dim or unit) + (config.d_kv or unit)) // unit
    if budget_units(sizes, config) < least:
        share = least * unit / (2 * sizes.head_dim * sizes.layers)
        raise InputError(f"budget = {config.share}: the least for these sizes is {share:g}")


def print_plan(original: Any, mla: MLAConfig) -> None:
    """Say what was chosen, and what a token costs in the cache before and after (16 bits a number)."""
    sizes = AttentionSizes.of(original)
    before, after = bytes_per_token(original), bytes_per_token(converted_config(original, mla))
    specs = [spec for spec in mla.layers(sizes) if spec is not None]
    rope = by_layer([spec.rope_dim for spec in specs])
    latent = "keys and values whole"
    if mla.kv_lora_rank is not None:
        ranks = [cast(int, spec.rank) for spec in specs]
        per_head = by_layer([f"{rank / sizes.kv_heads:g}" for rank in ranks])
        latent = f"d_kv = {per_head} latent dims per KV head (r = {by_layer(ranks)} a token)"
    console().print(
        f"R = {rope} of {sizes.head_dim} rope dims, {latent}: "
        f"{before} to {after} cache bytes per token ({after / before:.1%})"
    )


def encode_split(
    model: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Record], config: ConversionConfig
) -> tuple[list[BatchFeature], list[BatchFeature]]:
    """Batches of one chat each, to calibrate on and held out to measure the loss on."""
    if len(records) < 2:
        raise InputError(f"{len(records)} record(s): give at least 2, one to calibrate on and one held out")
    records = records[: config.samples]
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    if silent := [record.source for record in records if not record.answers()]:
        raise InputError(f"{silent[0]}: no assistant message; give chats with answers, which the loss is of")
    batches = [encode_with_labels(processor, [record], visual) for record in records]
    count = min(len(batches) - 1, max(1, round(config.held_out * len(batches))))
    return batches[:-count], batches[-count:]
