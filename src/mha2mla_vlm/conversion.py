"""The conversion, without training: partial RoPE, then factors of keys and values.

Shapes: G KV heads, D head dim, R rope dims kept, N = D - R, O = G * (N + D), r latent dims.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from mha2mla_vlm.cache import bytes_per_token
from mha2mla_vlm.calibration import LayerStats, collect_moments, collect_pair_scores
from mha2mla_vlm.config import BLOCKS, DECOUPLED, SHARED, AttentionSizes, ConversionConfig, MLAConfig
from mha2mla_vlm.data import Record, encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation import answer_log_probs, mean_kl
from mha2mla_vlm.factorize import Factors, block_factors, pca_factors
from mha2mla_vlm.families import get_family
from mha2mla_vlm.modeling import decoder_layers, mla_classes
from mha2mla_vlm.progress import console
from mha2mla_vlm.rope import fixed_pairs, split_dims, top_pairs

logger = logging.getLogger(__name__)


def convert(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[Record],
    config: ConversionConfig = ConversionConfig(),
) -> PreTrainedModel:
    """Convert an original model to latent attention, training-free; the original is left as it is.

    `records` calibrate, a share of them measures the loss: `converted.mla_config.kl` holds the mean
    KL divergence to the original on held-out answers after each transform. Raises `InputError` for
    a model or sizes that cannot be converted, before any work.
    """
    _check_placement(model)
    mla = plan(model.config, config)
    _print_plan(model.config, mla)
    calibration, held_out = encode_split(model, processor, records, config)
    original = [answer_log_probs(model, batch) for batch in held_out]

    pairs = select_pairs(model, calibration, mla, config)
    converted = with_partial_rope(model, pairs, mla)
    kl = {"partial_rope": mean_kl(converted, held_out, original)}
    console().print(f"partial RoPE ({config.rope_selection}): KL {kl['partial_rope']:.4f}")

    if config.factorization != "none":
        stats = collect_moments(converted, calibration, converted.visual_token_ids)
        converted = with_factors(converted, stats, mla)
        kl["factorization"] = mean_kl(converted, held_out, original)
        console().print(f"factorization ({config.factorization}): KL {kl['factorization']:.4f}")
    set_mla(converted, replace(cast(MLAConfig, converted.mla_config), kl=kl))
    return converted


def _check_placement(model: PreTrainedModel) -> None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise InputError(
            f"the model lies on {', '.join(map(str, devices))}; load it on one device to convert it"
        )


def plan(model_config: Any, config: ConversionConfig) -> MLAConfig:
    """Sizes of the converted model; raises `InputError` for what cannot be converted."""
    if getattr(model_config, "mla", None) is not None:
        raise InputError("the model is converted already; give the original")
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
        modalities=DECOUPLED if config.factorization == "md-svd" else SHARED,
        rope_selection=config.rope_selection,
        factorization=config.factorization,
    )
    mla.check(sizes)
    return mla


def _print_plan(original: Any, mla: MLAConfig) -> None:
    """Say what was chosen, and what a token costs in the cache before and after (16 bits a number)."""
    sizes, rank = AttentionSizes.of(original), mla.kv_lora_rank
    before, after = bytes_per_token(original), bytes_per_token(converted_config(original, mla))
    latent = "keys and values whole"
    if isinstance(rank, int):
        latent = f"d_kv = {rank / sizes.kv_heads:g} latent dims per KV head (r = {rank} a token)"
    console().print(
        f"R = {mla.qk_rope_head_dim} of {sizes.head_dim} rope dims, {latent}: "
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
    batches = [encode_with_labels(processor, [record], visual).to(model.device) for record in records]
    count = min(len(batches) - 1, max(1, round(config.held_out * len(batches))))
    return batches[:-count], batches[-count:]


def select_pairs(
    model: PreTrainedModel, batches: Sequence[BatchFeature], mla: MLAConfig, config: ConversionConfig
) -> list[torch.Tensor]:
    """The pairs that stay rotated, `[G, R/2]` a layer."""
    sizes = AttentionSizes.of(model.config)
    rope_dims = [mla.layer(index)[0] for index in range(sizes.layers)]
    if config.rope_selection in ("2-norm", "mkl"):
        scores = collect_pair_scores(model, batches, config.rope_selection)
        return [top_pairs(score, size) for score, size in zip(scores, rope_dims, strict=True)]
    kind: Any = config.rope_selection
    head = {"kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    return [fixed_pairs(kind, rope_dim=size, **head) for size in rope_dims]


def with_partial_rope(model: PreTrainedModel, pairs: list[torch.Tensor], mla: MLAConfig) -> PreTrainedModel:
    """The model with only `pairs` rotated, and keys and values not yet factorised."""
    scale = float(getattr(model.model.language_model.rotary_emb, "attention_scaling", 1.0)) ** 2
    weights = [
        partial_rope_weights(layer.self_attn, chosen, scale)
        for layer, chosen in zip(decoder_layers(model), pairs, strict=True)
    ]
    return _rebuild(model, replace(mla, kv_lora_rank=None, modalities=SHARED), weights)


def partial_rope_weights(attention: Any, pairs: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Parameters of `MLAAttention` for one layer: rows of q, k and v regrouped, none changed.

    `scale` is what the rotary tables multiply rotated logits by (longer-context variants of RoPE);
    logits of pairs that are not rotated any more get it through the query.
    """
    rope, others = split_dims(pairs.to(attention.k_proj.weight.device), attention.head_dim)
    kv_heads, rope_dim = rope.shape
    groups = attention.q_proj.out_features // attention.head_dim // kv_heads
    weights = {"rope_pairs": pairs}
    for kind in ("weight", "bias"):
        q, k, v = (getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv")
        if q is not None:
            q = q.detach().unflatten(0, (kv_heads, groups, attention.head_dim))
            order = torch.cat([rope, others], dim=1)
            q = torch.stack([head[:, rows] for head, rows in zip(q, order, strict=True)])
            factor = torch.full((attention.head_dim,), scale, dtype=q.dtype, device=q.device)
            factor[:rope_dim] = 1.0
            weights[f"q_proj.{kind}"] = (q * factor.view(-1, *[1] * (q.ndim - 3))).flatten(0, 2)
        if k is not None:
            k, v = (x.detach().unflatten(0, (kv_heads, attention.head_dim)) for x in (k, v))
            weights[f"k_rope_proj.{kind}"] = torch.cat(
                [head[rows] for head, rows in zip(k, rope, strict=True)]
            )
            both = [torch.cat([kh[rows], vh]) for kh, vh, rows in zip(k, v, others, strict=True)]
            weights[f"kv_a_proj.shared.{kind}"] = torch.cat(both)
    return weights


def with_factors(model: PreTrainedModel, stats: list[LayerStats], mla: MLAConfig) -> PreTrainedModel:
    """The model after partial RoPE with its keys and values factorised as `mla` says."""
    weights = []
    for index, layer in enumerate(decoder_layers(model)):
        attention: Any = layer.self_attn
        source = attention.kv_a_proj["shared"]
        is_key = (
            torch.arange(source.out_features) % (attention.nope_dim + attention.head_dim) < attention.nope_dim
        )
        factors = layer_factors(source.weight.detach(), is_key, stats[index], mla, index)
        made = {}
        for modality, factor in factors.items():
            made[f"kv_a_proj.{modality}.weight"] = factor.down.to(source.weight.dtype)
            made[f"kv_b_proj.{modality}.weight"] = factor.up.to(source.weight.dtype)
            if source.bias is not None:
                made[f"kv_b_proj.{modality}.bias"] = source.bias.detach().clone()
        weights.append(made)
    return _rebuild(model, mla, weights)


def layer_factors(
    weight: torch.Tensor, is_key: torch.Tensor, stats: LayerStats, mla: MLAConfig, layer: int
) -> dict[str, Factors]:
    """Factors of one layer's `weight [O, hidden]` by modality.

    A modality with fewer calibration tokens than input dims has no moment of full rank of its own:
    it gets the pooled one, with a warning.
    """
    rank = cast(int, mla.layer(layer)[1])
    if mla.factorization in BLOCKS:
        return {"shared": block_factors(weight, is_key.to(weight.device), rank, mla.factorization)}
    if mla.factorization == "weight-svd":
        return {"shared": pca_factors(weight, torch.eye(weight.shape[1], device=weight.device), rank)}
    if mla.factorization == "activation-svd":
        return {"shared": pca_factors(weight, stats.pooled(), rank)}
    factors = {}
    for modality in mla.modalities:
        count, hidden = stats.counts.get(modality, 0), weight.shape[1]
        moment = stats.moments.get(modality)
        if moment is None or count < hidden:
            logger.warning(
                "layer %d: %d %s tokens in calibration for %d input dims; using the statistics of all tokens",
                layer, count, modality, hidden,
            )  # fmt: skip
            moment = stats.pooled()
        factors[modality] = pca_factors(weight, moment, rank)
    return factors


def set_mla(model: PreTrainedModel, mla: MLAConfig) -> None:
    """Record `mla` on a converted model."""
    model.mla_config = mla
    model.config.mla = mla.to_dict()


def converted_config(config: Any, mla: MLAConfig) -> Any:
    """Config of the converted model, from that of an original or a converted one."""
    config_class = mla_classes(config.model_type)[0]
    values = config.to_dict() | {"model_type": config_class.model_type, "mla": mla.to_dict()}
    made = config_class(**values)
    made._attn_implementation = config._attn_implementation
    return made


def _rebuild(
    model: PreTrainedModel, mla: MLAConfig, weights: list[dict[str, torch.Tensor]]
) -> PreTrainedModel:
    """A converted model with `weights` in its attention layers and all else as in `model`."""
    first = getattr(model.config, "mla", None) is None
    config = converted_config(model.config, mla)
    model_class = mla_classes(model.config.model_type)[1]
    # A first conversion copies, for the original must stay as it is; later ones take the weights over.
    state = {key: value.clone() if first else value for key, value in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    for layer, made in zip(decoder_layers(model), weights, strict=True):
        prefix = names[id(layer.self_attn)] + "."
        replaced = (
            ("q_proj", "k_proj", "v_proj", "kv_a_proj", "kv_b_proj")
            if "q_proj.weight" in made
            else ("kv_a_proj",)
        )
        for key in [key for key in state if key.startswith(tuple(prefix + part for part in replaced))]:
            del state[key]
        state |= {prefix + key: value for key, value in made.items()}
    made_model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    made_model.generation_config = copy.deepcopy(model.generation_config)
    return made_model.to(model.device).eval()
