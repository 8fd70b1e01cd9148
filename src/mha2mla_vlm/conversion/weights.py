"""A converted model made of an original one: parameters of its attention layers, all else as it was.

Shapes: H query heads, G KV heads, D head dim, P = D / 2 pairs, R rope dims kept, N = D - R,
O = G * (N + D), r latent dims.
"""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mha2mla_vlm.algorithms.bits import key_steps, with_latents
from mha2mla_vlm.algorithms.factorization.base import Factorization, Outputs
from mha2mla_vlm.algorithms.factorization.low_rank import Factors
from mha2mla_vlm.algorithms.folding import fold_keys
from mha2mla_vlm.algorithms.pair_selection.base import RopeSelection, split_dims
from mha2mla_vlm.algorithms.token_stats import TokenStats
from mha2mla_vlm.calibration.statistics import LayerStats
from mha2mla_vlm.config import SHARED, AttentionSizes, LayerSpec, MLAConfig
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.modeling import decoder_layers, layer_prefixes, mla_classes, text_model
from mha2mla_vlm.model.normed import is_normed, kept_children, key_scale
from mha2mla_vlm.utils.compat import attention_name, rotary_scaling, set_attention_name

logger = logging.getLogger(__name__)
REPLACED = ("k_proj.weight", "v_proj.weight")  # of `projections.Replaced`


def table_scale(model: PreTrainedModel) -> float:
    """What the rotary tables multiply logits by (longer-context variants of RoPE)."""
    return rotary_scaling(text_model(model).rotary_emb) ** 2


def partial_rope_weights(
    attention: Any, selection: RopeSelection, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Parameters of `MLAAttention` for one layer: rows of q, k and v regrouped, dropped keys folded.

    `scale` is `table_scale`; logits of pairs that are not rotated any more get it through the query,
    unless a fold, fitted to logits that have it, brings it. Where keys are normed it is all in what makes
    latents of them: the rows that are regrouped are those of an identity.
    """
    if is_normed(attention):
        return _normed_weights(attention, selection, scale)
    pairs = selection.pairs.to(attention.k_proj.weight.device)
    rope, others = split_dims(pairs, attention.head_dim)  # all dims are rotated where there are no norms
    kv_heads, rope_dim = rope.shape
    order = torch.cat([rope, others], dim=1)
    weights = {"rope_pairs": selection.pairs}
    for kind in ("weight", "bias"):
        q, k, v = (getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv")
        if q is not None:
            q = q.detach().unflatten(0, (kv_heads, -1, attention.head_dim))
            q = torch.stack([head[:, rows] for head, rows in zip(q, order, strict=True)])
            factor = torch.ones(attention.head_dim, dtype=q.dtype, device=q.device)
            factor[rope_dim:] = scale if selection.fold is None else 1.0
            weights[f"q_proj.{kind}"] = (q * factor.view(-1, *[1] * (q.ndim - 3))).flatten(0, 2)
        if k is not None:
            k, v = (x.detach().unflatten(0, (kv_heads, attention.head_dim)) for x in (k, v))
            weights[f"k_rope_proj.{kind}"] = torch.cat(
                [head[rows] for head, rows in zip(k, rope, strict=True)]
            )
            if selection.fold is not None:
                k = fold_keys(k, selection.fold.to(pairs.device))
            both = [torch.cat([kh[rows], vh]) for kh, vh, rows in zip(k, v, others, strict=True)]
            weights[f"kv_a_proj.shared.{kind}"] = torch.cat(both)
    return weights


def _normed_weights(attention: Any, selection: RopeSelection, scale: float) -> dict[str, torch.Tensor]:
    """`partial_rope_weights` where keys are normed: `T` over `normed.latent_inputs`."""
    like, head_dim = attention.k_proj.weight, attention.head_dim
    pairs, sizes = selection.pairs.to(like.device), AttentionSizes.of_text(attention.config)
    rope, others = split_dims(pairs, head_dim, sizes.pair_stride)
    of_values, new = key_scale(attention), {"dtype": like.dtype, "device": like.device}
    if of_values is None:
        plain = torch.eye(2 * len(pairs) * head_dim, **new)
        keys, values = plain.unflatten(0, (len(pairs), 2, head_dim)).unbind(1)
    else:
        values = torch.eye(len(pairs) * head_dim, **new).unflatten(0, (len(pairs), head_dim))
        keys = values * of_values.to(like.dtype)[:, None]
    turned = torch.cat([head[rows] for head, rows in zip(keys, rope, strict=True)])
    if selection.fold is None:
        every = torch.arange(sizes.rotary_dim // 2, device=like.device)
        keys[:, torch.cat([every, every + sizes.pair_stride])] *= scale
    else:
        keys = fold_keys(keys, selection.fold.to(pairs.device), sizes.pair_stride)
    both = [torch.cat([kh[rows], vh]) for kh, vh, rows in zip(keys, values, others, strict=True)]
    return {
        "rope_pairs": selection.pairs,
        "k_rope_proj.weight": turned,
        "kv_a_proj.shared.weight": torch.cat(both),
    }


def rotated_at_read(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of one layer, from those after partial RoPE, whose rotated keys are not projected apart but
    with the other keys and the values: per KV head R rotated, N other key rows, D value rows.
    """
    kv_heads = len(whole["rope_pairs"])
    made = {k: v for k, v in whole.items() if not k.startswith("k_rope_proj.")}
    for kind in ("weight", "bias"):
        if f"k_rope_proj.{kind}" in whole:
            parts = (whole[f"{name}.{kind}"] for name in ("k_rope_proj", "kv_a_proj.shared"))
            both = torch.cat([part.unflatten(0, (kv_heads, -1)) for part in parts], dim=1)
            made[f"kv_a_proj.shared.{kind}"] = both.flatten(0, 1)
    return made


def keys_in_steps(
    whole: dict[str, torch.Tensor], tokens: TokenStats, *, head_dim: int
) -> dict[str, torch.Tensor]:
    """Parameters of one layer, from those after partial RoPE, whose rotated keys count in `bits.key_steps`,
    and its queries in what these leave.
    """
    kv_heads, half = whole["rope_pairs"].shape
    rows = {k: whole[f"k_rope_proj.{k}"].unflatten(0, (kv_heads, -1)) for k in ("weight", "bias")
            if f"k_rope_proj.{k}" in whole}  # fmt: skip
    steps = key_steps(rows["weight"], rows.get("bias"), tokens).repeat(1, 2)  # [G, R]
    made = dict(whole)
    for kind, keys in rows.items():
        scale = steps.view(kv_heads, 2 * half, *[1] * (keys.ndim - 2))
        made[f"k_rope_proj.{kind}"] = (keys.double() / scale).to(keys.dtype).flatten(0, 1)
    factors = torch.nn.functional.pad(steps, (0, head_dim - 2 * half), value=1.0)  # [G, D]
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in whole:
            queries = whole[f"q_proj.{kind}"].unflatten(0, (kv_heads, -1, head_dim))
            scale = factors.view(kv_heads, 1, head_dim, *[1] * (queries.ndim - 3))
            made[f"q_proj.{kind}"] = (queries.double() * scale).to(queries.dtype).flatten(0, 2)
    return made


def factored_weights(
    whole: dict[str, torch.Tensor], factors: Mapping[str, Factors]
) -> dict[str, torch.Tensor]:
    """Parameters of one layer with factors by modality, from those after partial RoPE."""
    source, bias = whole["kv_a_proj.shared.weight"], whole.get("kv_a_proj.shared.bias")
    made = {k: v for k, v in whole.items() if not k.startswith("kv_a_proj.")}
    for modality, factor in factors.items():
        made[f"kv_a_proj.{modality}.weight"] = factor.down.to(source.dtype)
        if factor.offset is not None:
            made[f"kv_a_proj.{modality}.bias"] = factor.offset.to(source.dtype)
        made[f"kv_b_proj.{modality}.weight"] = factor.up.to(source.dtype)
        found = [x.to(source.dtype) for x in (factor.shift, bias) if x is not None]
        if found:
            made[f"kv_b_proj.{modality}.bias"] = sum(found[1:], start=found[0].clone())
    return made


def layer_factors(
    whole: dict[str, torch.Tensor],
    stats: LayerStats,
    spec: LayerSpec,
    method: Factorization,
    *,
    head_dim: int,
    pair_stride: int | None = None,
    by_importance: bool = False,
    layer: int | None = None,
) -> dict[str, Factors]:
    """Factors of one layer's keys and values by modality, from its parameters after partial RoPE; with
    `by_importance` at full rank, as `bits.with_latents` orders them.

    A modality with fewer calibration tokens than input dims has no moment of full rank of its own:
    it gets the pooled one, with a warning that names the `layer`, if that is given.
    """
    assert method.factors is not None, "keys and values stay whole"
    assert spec.rank is not None, "keys and values stay whole"
    rope, others = split_dims(whole["rope_pairs"], head_dim, pair_stride)
    key_dims = torch.cat([rope, others], dim=1) if spec.at_read else others
    outputs = Outputs(whole["kv_a_proj.shared.weight"], key_dims, rope.shape[1] if spec.at_read else 0)
    rank, factors = min(outputs.weight.shape) if by_importance else spec.rank, {}
    for modality in spec.modalities:
        tokens = None
        if method.statistics != "nothing":
            tokens = _tokens(stats, modality, outputs.weight.shape[1], layer)
        factors[modality] = method.factors(outputs, tokens, rank)
        if by_importance:
            assert tokens is not None, "measured where bits are chosen"
            factors[modality] = with_latents(factors[modality], outputs, tokens)
    return factors


def _tokens(stats: LayerStats, modality: str, hidden: int, layer: int | None) -> TokenStats:
    """What calibration shows of a modality's tokens, or of all where those are too few."""
    if modality in SHARED:
        return stats.pooled()
    tokens = stats.tokens.get(modality)
    count = 0 if tokens is None else tokens.count
    if tokens is not None and count >= hidden:
        return tokens
    if layer is not None:
        logger.warning(
            "layer %d: %d %s tokens in calibration for %d input dims; using the statistics of all "
            "tokens", layer, count, modality, hidden,
        )  # fmt: skip
    return stats.pooled()


def partial_layer(source: nn.Module, selection: RopeSelection, spec: LayerSpec, scale: float) -> MLAAttention:
    """One layer's attention with partial RoPE only; `scale` is `table_scale`."""
    spec = LayerSpec(rope_dim=spec.rope_dim)
    return converted_layer(source, partial_rope_weights(source, selection, scale), spec)


def converted_layer(source: nn.Module, weights: dict[str, torch.Tensor], spec: LayerSpec) -> MLAAttention:
    """One layer's converted attention by itself, in the place of `source`."""
    module = MLAAttention(source, spec, empty=True)
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected, unexpected
    assert not set(missing) & module.new_weights().keys() - set(REPLACED), missing
    return module.eval()


def converted_config(config: Any, mla: MLAConfig) -> Any:
    """Config of the converted model, from that of an original or a converted one."""
    config_class = mla_classes(config.model_type)[0]
    values = config.to_dict() | {"model_type": config_class.model_type, "mla": mla.to_dict()}
    made = config_class(**values)
    set_attention_name(made, attention_name(config))
    return made


def kept_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Of `names` in a model's state, those that conversion leaves as they are: all beside attention, and of
    that `normed.kept_children`.
    """
    prefixes = _attention_prefixes(model)
    kept = tuple(
        f"{prefix}{child}."
        for index, prefix in prefixes.items()
        for child in kept_children(decoder_layers(model)[index].self_attn)
    )
    return [name for name in names if name.startswith(kept) or not name.startswith(tuple(prefixes.values()))]


def _attention_prefixes(model: PreTrainedModel) -> dict[int, str]:
    """Where the attention of each layer is that can be converted, by the layer's number."""
    places = layer_prefixes(model)
    return {index: places[index] + "self_attn." for index in AttentionSizes.of(model.config).growing}


def rebuild(
    model: PreTrainedModel, mla: MLAConfig, weights: Sequence[dict[str, torch.Tensor]]
) -> PreTrainedModel:
    """A converted model with `weights`, of each layer, in its attention and copies of all else in `model`."""
    config = converted_config(model.config, mla)
    prefixes = _attention_prefixes(model)
    plain = [prefixes[i] for i in prefixes if not is_normed(decoder_layers(model)[i].self_attn)]
    state = {prefix + key: torch.zeros(1) for prefix in plain for key in REPLACED}
    known = model.state_dict()
    state |= {key: known[key].clone() for key in kept_names(model, known)}
    for index, prefix in prefixes.items():
        state |= {prefix + key: value for key, value in weights[index].items()}
    model_class = mla_classes(model.config.model_type)[1]
    made_model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    made_model.generation_config = copy.deepcopy(model.generation_config)
    return made_model.to(model.device).eval()
