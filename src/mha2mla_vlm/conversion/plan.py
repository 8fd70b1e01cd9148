"""What a model will be converted to, and what cannot be: found before any work."""

import contextlib
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from mha2mla_vlm.algorithms.budget import unit_dims
from mha2mla_vlm.algorithms.factorization import FACTORIZATIONS, factorization
from mha2mla_vlm.algorithms.factorization.base import Factorization
from mha2mla_vlm.algorithms.factorization.blocks import block_ranks
from mha2mla_vlm.config import DECOUPLED, FULL, SHARED, AttentionSizes, LayerSpec, MLAConfig
from mha2mla_vlm.conversion.allocation import budget_units, dims_in_unit, least_decode_cost
from mha2mla_vlm.conversion.config import AUTO, BY_CHANNEL, SIXTEEN, ConversionConfig
from mha2mla_vlm.conversion.weights import converted_config
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.state import state_bytes_per_row
from mha2mla_vlm.model.card import by_layer
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.families.base import Family
from mha2mla_vlm.model.modeling import attention_of, decoder_layers
from mha2mla_vlm.model.normed import NORMS, PROJECTIONS, VALUE_NORM, is_normed
from mha2mla_vlm.model.origin import shared_name
from mha2mla_vlm.utils.compat import is_plain_tensor
from mha2mla_vlm.utils.progress import console


def check_model(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model whose weights cannot be read as they are."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise InputError(
            f"the model lies on {', '.join(map(str, devices))}; load it on one device to convert it"
        )
    check_attention(model)
    for index in AttentionSizes.of(model.config).growing:
        layer = decoder_layers(model)[index]
        for name, child in layer.self_attn.named_children():
            if name in (*NORMS, VALUE_NORM):
                continue
            modules = child.values() if isinstance(child, nn.ModuleDict) else [child]
            wrong = [m for m in modules if any(True for _ in m.parameters()) and not _is_linear(m)]
            if wrong:
                raise InputError(
                    f"layer {index}: {name} ({type(wrong[0]).__name__}) is not a plain "
                    "linear layer; merge adapters first (merge_and_unload), load quantised models in bfloat16"
                )


def check_attention(model: PreTrainedModel) -> None:
    """Raise `InputError` unless attention of an original model is causal, of four projections and of the
    norms and the gate that its family has: what else a module does would be lost without a word. Layers that
    stay as they are may hold anything.
    """
    family, sizes = get_family(model.config.model_type), AttentionSizes.of(model.config)
    norms = family.norms
    for index in sizes.growing:
        attention = attention_of(decoder_layers(model)[index])
        if isinstance(attention, MLAAttention):
            continue
        if attention is None:
            raise InputError(f"layer {index}: no attention, though the config says {FULL}")
        children = dict(attention.named_children())
        own = [name for name, _ in attention.named_parameters(recurse=False)]
        unknown = [name for name in (*children, *own) if name not in (*PROJECTIONS, *norms)]
        needed = [name for name in PROJECTIONS if name != "v_proj" or not family.values_of_keys]
        missing = [name for name in needed if name not in children]
        found = [name for name in norms if name in children]
        sizes_of = [tuple(weight.shape) for name in found for weight in children[name].parameters()]
        of_heads = all(size == (attention.head_dim,) for size in sizes_of)
        if unknown or missing or len(found) not in (0, len(norms)) or not of_heads:
            raise InputError(
                f"layer {index}: attention ({type(attention).__name__}) has {', '.join((*children, *own))}; "
                f"supported is {', '.join(PROJECTIONS)}"
                + (f", with or without {' and '.join(norms)} over a head" if norms else "")
            )
        _check_queries(attention, family, sizes, index)
        if getattr(attention, "attn_logit_softcapping", None) is not None:
            raise InputError(f"layer {index}: attn_logit_softcapping is not supported; supported is null")
        if not getattr(attention, "is_causal", True):
            raise InputError(f"layer {index}: attention is not causal; supported is causal attention")


def _check_queries(attention: Any, family: Family, sizes: AttentionSizes, index: int) -> None:
    """Raise `InputError` unless queries have a gate where the family says so, which goes with norms here."""
    numbers, queries = attention.q_proj.out_features, sizes.heads * sizes.head_dim
    plain = not is_normed(attention)
    if numbers != queries * (2 if family.gated else 1) or (plain and (family.gated or family.partial_rotary)):
        raise InputError(
            f"layer {index}: attention ({type(attention).__name__}) projects to {numbers} numbers of "
            f"queries, {'without' if plain else 'with'} norms; supported in {family.model_type} are {queries}"
            + (" and as many of a gate, with norms" if family.gated else "")
        )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and all(map(is_plain_tensor, module.parameters()))


def plan(model_config: Any, config: ConversionConfig) -> MLAConfig:
    """Sizes of the converted model; raises `InputError` for what cannot be converted.

    Where modes are chosen by measuring it is planned as if all layers were rotated at read; where bits of
    latents are, in 16, or, where these have no sizes as small, by channel.
    """
    if config.latent_bits == AUTO:
        with contextlib.suppress(InputError):
            return plan(model_config, config.keeping(SIXTEEN))
        return plan(model_config, config.keeping(BY_CHANNEL))
    _check_not_quantized(model_config)
    if getattr(model_config, "mla", None) is not None:
        return _plan_factors(model_config, config)
    if config.rotate_at == AUTO:
        mla = plan(model_config, config.of("read"))
        _check_decode_cost(mla, AttentionSizes.of(model_config), config)
        return mla
    family = get_family(model_config.model_type)
    text = model_config.get_text_config(decoder=True)
    if text.model_type not in family.text_model_types:
        raise InputError(
            f"language model {text.model_type!r} is not supported in {family.model_type}; "
            f"supported: {', '.join(family.text_model_types)}"
        )
    _check_layer_types(text, family)
    method, sizes = factorization(config.factorization), AttentionSizes.of(model_config)
    whole = sizes.rotary_dim if config.at_read else min(sizes.head_dim // 2, sizes.rotary_dim)
    rope_dim = whole if config.qk_rope_head_dim is None else config.qk_rope_head_dim
    mla = MLAConfig(
        qk_rope_head_dim=rope_dim,
        kv_lora_rank=_rank(method, sizes, rope_dim, config),
        modalities=DECOUPLED if method.per_modality else SHARED,
        rotate_at=config.rotate_at,
        rope_selection=config.rope_selection if config.drops_pairs else None,
        factorization=config.factorization,
        folded=config.fold and config.drops_pairs,
        kv_bias=method.centered,
        original=shared_name(model_config.name_or_path) if model_config.name_or_path else None,
    )
    _check_sizes(mla, method, sizes)
    if config.share is not None:
        _check_budget(sizes, config)
    return mla.over_all(sizes)


def _check_layer_types(text: Any, family: Family) -> None:
    """Raise `InputError` for layers that are neither of full attention nor of a type that stays in the
    family.
    """
    kinds, left = set(getattr(text, "layer_types", None) or ()), family.left_layers
    if shared := getattr(text, "num_kv_shared_layers", 0):
        raise InputError(
            f"num_kv_shared_layers = {shared}: layers that reuse keys and values of others, as Gemma 4 E2B "
            "and E4B have, are not supported; supported is 0, as Gemma 4 12B, 26B-A4B and 31B have"
        )
    if "sliding_attention" not in left and (
        "sliding_attention" in kinds or getattr(text, "sliding_window", None)
    ):
        raise InputError(
            "sliding-window attention is not supported; supported is full attention in every layer"
        )
    if unknown := sorted(kinds - {FULL, *left}):
        raise InputError(
            f"layers of {', '.join(map(str, unknown))} are not supported in {family.model_type}; supported: "
            f"{', '.join((FULL, *left))}"
        )


def _rank(
    method: Factorization, sizes: AttentionSizes, rope_dim: int, config: ConversionConfig
) -> int | None:
    """Latent dims of a layer, None where keys and values stay whole."""
    if method.factors is None:
        return None
    # where one of both stays whole, d_kv is the rank of the other
    whole = {None: 0, "values": sizes.head_dim, "keys": sizes.head_dim - rope_dim}[method.whole]
    d_kv = sizes.head_dim // 4 if config.d_kv is None else config.d_kv
    return sizes.kv_heads * (d_kv + whole)


def _check_sizes(mla: MLAConfig, method: Factorization, sizes: AttentionSizes) -> None:
    """Raise `InputError` for sizes that the model or the method cannot have; they are the same by layer."""
    replace(mla, kv_lora_rank=None, rotate_at="write").over_all(sizes).check(sizes)
    rope, rank = cast(int, mla.qk_rope_head_dim), cast(int | None, mla.kv_lora_rank)
    if rank is None:
        return
    keys, values = sizes.kv_heads * (sizes.head_dim - rope), sizes.kv_heads * sizes.head_dim
    at_read = mla.rotate_at == "read"
    largest = min(sizes.most_latent_dims, 2 * values if at_read else keys + values)
    if method.apart:
        parts = block_ranks(rank, keys, values, method.whole)
        if not (1 <= parts[0] <= keys and 1 <= parts[1] <= values):
            raise InputError(
                f"factorization {mla.factorization!r} gives keys rank {parts[0]} of {keys} and "
                f"values {parts[1]} of {values} at R = {rope}; each needs at least 1 and at most all"
            )
    elif not 1 <= rank <= largest:
        raise InputError(
            f"kv_lora_rank {rank}: give 1 to {largest}, that is d_kv up to {largest // sizes.kv_heads} "
            f"per KV head at R = {rope}"
        )


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


def is_allocated(model_config: Any, config: ConversionConfig) -> bool:
    """Whether the sizes of layers come from a budget, by what each is predicted to cost."""
    return config.share is not None and getattr(model_config, "mla", None) is None


def _plan_factors(model_config: Any, config: ConversionConfig) -> MLAConfig:
    """Sizes of a model whose RoPE is partial already and whose keys and values are now factorised."""
    mla, sizes = MLAConfig.from_dict(model_config.mla), AttentionSizes.of(model_config)
    if mla.kv_lora_rank is not None:
        raise InputError("the model is converted already; give the original, or one with only partial RoPE")
    method = factorization(config.factorization)
    if "read" in config.modes:
        raise InputError(
            f"the model has partial RoPE already; --rotate-at {config.rotate_at} starts from the original: "
            "give --d-kv, or --rotate-at write"
        )
    if not method.after_partial_rope:
        known = [name for name in FACTORIZATIONS if factorization(name).after_partial_rope]
        raise InputError(
            f"factorization {config.factorization!r} does not go with a model that has partial RoPE already; "
            f"known: {', '.join(known)}"
        )
    rope_dim = cast(LayerSpec, mla.layer(sizes.growing[0])).rope_dim  # the same in all that are converted
    if config.budget is not None or config.qk_rope_head_dim not in (None, rope_dim):
        raise InputError(f"the model has partial RoPE already, R = {rope_dim}; give only d_kv, no budget")
    mla = replace(
        mla,
        qk_rope_head_dim=rope_dim,
        kv_lora_rank=_rank(method, sizes, rope_dim, config),
        modalities=DECOUPLED if method.per_modality else SHARED,
        factorization=config.factorization,
        kv_bias=method.centered,
    )
    _check_sizes(mla, method, sizes)
    return mla.over_all(sizes)


def _check_budget(sizes: AttentionSizes, config: ConversionConfig) -> None:
    """Raise `InputError` if the least sizes of a layer, or those given, are over the budget."""
    unit, coarse = dims_in_unit(sizes, config), unit_dims(sizes.head_dim)
    given = None if config.at_read else config.qk_rope_head_dim
    for name, value, step in (("qk_rope_head_dim", given, coarse), ("d_kv", config.d_kv, unit)):
        if value is not None and value % step:
            raise InputError(f"{name} = {value}: with a budget give a multiple of {step}")
    rope = 0 if config.at_read else (given or coarse) // coarse
    layers = len(sizes.growing)
    least = layers * (rope + (config.d_kv or unit) // unit)
    if budget_units(sizes, config) < least:
        share = least * unit / (2 * sizes.head_dim * layers)  # positions at read come on top
        raise InputError(f"budget = {config.share}: the least for these sizes is {share:g}")


def _check_decode_cost(mla: MLAConfig, sizes: AttentionSizes, config: ConversionConfig) -> None:
    """Raise `InputError` if no sizes within the budget take as little arithmetic as `config` says."""
    least, most = least_decode_cost(mla, sizes, config), cast(float, config.max_decode_cost)
    if least > most:
        raise InputError(
            f"max_decode_cost = {most:g}: the least for {config.share:.4g} of the cache is {least:.3g}"
        )


def print_plan(original: Any, mla: MLAConfig) -> None:
    """Say what was chosen, and what a token costs in the cache before and after (16 bits a number)."""
    sizes = AttentionSizes.of(original)
    before, after = bytes_per_token(original), bytes_per_token(converted_config(original, mla))
    specs = [spec for spec in mla.layers(sizes) if spec is not None]
    rope = by_layer([spec.rope_dim for spec in specs])
    modes = [spec.rotate_at for spec in specs]
    when = f", rotated at {by_layer(modes)}" if "read" in modes else ""
    latent, bits = "keys and values whole", "" if mla.latent_bits is None else " in 16, 8, 4 and 2 bits"
    if mla.kv_lora_rank is not None:
        ranks = [cast(int, spec.rank) for spec in specs]
        per_head = by_layer([f"{rank / sizes.kv_heads:g}" for rank in ranks])
        latent = f"d_kv = {per_head} latent dims per KV head (r = {by_layer(ranks)} a token){bits}"
    console().print(
        f"R = {rope} of {sizes.head_dim} rope dims{when}, {latent}: "
        f"{before} to {after} cache bytes per token ({after / before:.1%}), "
        f"{mla.decode_cost(sizes):.3g} times the arithmetic for each when decoding"
    )
    if sizes.left:
        console().print(
            f"{len(sizes.left)} of {sizes.layers} layers are not {FULL} and stay as they are; they keep "
            f"{state_bytes_per_row(original):,} bytes for each chat, however long"
        )
