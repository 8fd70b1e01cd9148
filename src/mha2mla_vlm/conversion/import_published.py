"""Import of checkpoints that the published MHA2MLA-VLM code wrote (arXiv 2601.11464).

They are folders of transformers 4.51 with `mha2mla` in the config and other weights in the attention
layers, after stage 1 (partial RoPE) or stage 2 (factors too). Which pairs are rotated is not in them
but in a rank file. Shapes: L layers, H query heads, G KV heads, D head dim, R rope dims, N = D - R.
"""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mha2mla_vlm.config import DECOUPLED, SHARED, AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.weights import rebuild
from mha2mla_vlm.errors import InputError, reading
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.files import check_files, weights_files
from mha2mla_vlm.model.soundness import check_config, check_stored

KNOWN_KEYS = {
    "partial_rope_version",
    "rope_dim_for_mla",
    "uniform_start_point",
    "qk_tensor_path",
    "svd_init_method",
    "low_rank",
    "is_gqa2mha2mla",
    "peft_train",
    "stage1_path",
    "svd_init_weight_path",
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MODALITY_NAMES = {"text": "kv_proj_text", "vision": "kv_proj_img"}  # ours -> theirs
_ATTENTION = re.compile(
    r"((?:.*\.)?model\.layers\.(\d+)\.self_attn\.)((?:q_proj|k_r_proj|kv_proj(?:_img|_text)?)\..*)"
)


def import_published(checkpoint: str | Path, ranks: str | Path) -> PreTrainedModel:
    """The converted model that a published stage 1 or stage 2 folder and its rank file stand for.

    Raises `InputError` for an unknown `mha2mla` key, a rank file that does not fit, and weights that
    are missing, misshaped or too many.
    """
    folder = Path(checkpoint)
    config, mla = read_config(folder)
    sizes = AttentionSizes.of(config)
    pairs = read_pairs(Path(ranks), sizes, cast(int, mla.qk_rope_head_dim))
    attention, rest = _split(read_weights(folder), sizes)
    layers = [
        layer_weights(weights, chosen, sizes, mla) for weights, chosen in zip(attention, pairs, strict=True)
    ]
    return rebuild(_original(config, rest), mla, layers)


def has_processor(folder: Path) -> bool:
    """Whether a folder holds a processor, so that the imported one can have it too."""
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def read_config(folder: Path) -> tuple[PreTrainedConfig, MLAConfig]:
    """Config of the original model and ours of its attention, from a published folder."""
    path = folder / "config.json"
    with reading(str(path)):
        values = json.loads(path.read_text(encoding="utf-8"))
    published = values.pop("mha2mla", None) if isinstance(values, dict) else None
    if not isinstance(published, dict):
        raise InputError(f"{path} has no 'mha2mla'; give a folder that the published code wrote")
    if unknown := sorted(set(published) - KNOWN_KEYS):
        raise InputError(
            f"unknown mha2mla key(s) {', '.join(unknown)} in {path}; known: {', '.join(sorted(KNOWN_KEYS))}"
        )
    if published.get("is_gqa2mha2mla"):
        raise InputError(
            f"{path}: is_gqa2mha2mla checkpoints are not supported; give one that keeps its KV heads"
        )
    rope_dim, d_kv = published.get("rope_dim_for_mla"), published.get("low_rank", 0)
    if type(rope_dim) is not int or type(d_kv) is not int:
        raise InputError(
            f"{path}: rope_dim_for_mla = {rope_dim!r} and low_rank = {d_kv!r} must be whole numbers"
        )
    check_stored(values)
    with reading(str(path)):
        config = AutoConfig.for_model(**values)
        check_config(config)
    sizes = AttentionSizes.of(config)
    mla = MLAConfig(
        qk_rope_head_dim=rope_dim,
        kv_lora_rank=d_kv * sizes.kv_heads or None,
        modalities=DECOUPLED if d_kv else SHARED,
        rope_selection=published.get("partial_rope_version"),
        factorization="md-svd" if d_kv else "none",
    )
    mla.check(sizes)
    return config, mla


def read_pairs(path: Path, sizes: AttentionSizes, rope_dim: int) -> list[torch.Tensor]:
    """Pairs that stay rotated, `[G, R/2]` a layer, from a uint8 tensor `[L, G, D]` of ranks.

    Both halves of D hold the same ranks, 0 for the most important pair.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"the rank file {path} is not a file")
    with reading(f"the rank file {path}"):
        ranks = torch.load(path, map_location="cpu", weights_only=True)
    shape = (sizes.layers, sizes.kv_heads, sizes.head_dim)
    if not isinstance(ranks, torch.Tensor) or ranks.dtype not in INTEGERS or tuple(ranks.shape) != shape:
        found = (
            f"{ranks.dtype} {list(ranks.shape)}" if isinstance(ranks, torch.Tensor) else type(ranks).__name__
        )
        raise InputError(
            f"rank file {path} holds {found}; this model needs whole numbers of shape {list(shape)}"
        )
    first, second = ranks.long().chunk(2, dim=-1)
    every = torch.arange(sizes.head_dim // 2).expand_as(first)
    if not torch.equal(first, second) or not torch.equal(first.sort(dim=-1).values, every):
        raise InputError(f"rank file {path} does not rank each pair of a head once, alike in both halves")
    order = first.argsort(dim=-1)[..., : rope_dim // 2].sort(dim=-1).values
    return list(order)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder: one safetensors file, or shards and their index."""
    check_files(folder)
    state: dict[str, torch.Tensor] = {}
    for file in weights_files(folder):
        with reading(f"the weights in {file}"):
            state |= load_file(file)
    return state


def _split(
    state: dict[str, torch.Tensor], sizes: AttentionSizes
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Weights that the published code changed, by layer, and all others under their own names.

    Zeros stand among the others for the original projections of keys and values, and of queries.
    """
    attention: list[dict[str, torch.Tensor]] = [{} for _ in range(sizes.layers)]
    rest = {}
    kv_rows = sizes.kv_heads * sizes.head_dim
    rows = {"q_proj": sizes.heads * sizes.head_dim, "k_proj": kv_rows, "v_proj": kv_rows}
    for name, tensor in state.items():
        match = _ATTENTION.fullmatch(name)
        if match is None:
            rest[name] = tensor
            continue
        prefix, layer, inner = match.groups()
        if int(layer) >= sizes.layers:
            raise InputError(f"extra weight {name}; the config has {sizes.layers} layers")
        attention[int(layer)][inner] = tensor
        if inner.startswith("q_proj."):
            shape = tensor.shape[1:]
            rest |= {
                f"{prefix}{x}.{inner.removeprefix('q_proj.')}": tensor.new_zeros(1).expand(n, *shape)
                for x, n in rows.items()
            }
    return attention, rest


def layer_weights(
    published: dict[str, torch.Tensor], pairs: torch.Tensor, sizes: AttentionSizes, mla: MLAConfig
) -> dict[str, torch.Tensor]:
    """Parameters of `MLAAttention` for one layer, from its published weights.

    Theirs hold the query's rope rows of all heads first and then the others; ours hold them head by
    head. Keys and values of one KV head lie together in ours.
    """
    rope, rank = cast(int, mla.qk_rope_head_dim), mla.kv_lora_rank
    groups, nope = sizes.kv_heads, sizes.head_dim - rope
    left = dict(published)

    def take(name: str, rows: int, columns: int | None) -> torch.Tensor:
        shape = (rows,) if columns is None else (rows, columns)
        tensor = left.pop(name, None)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise InputError(f"published weight self_attn.{name} is {found}; needed is shape {list(shape)}")
        return tensor

    made = {"rope_pairs": pairs}
    modalities = MODALITY_NAMES if rank else {"shared": "kv_proj"}
    ours = "kv_b_proj" if rank else "kv_a_proj"
    for kind in ("weight", "bias"):
        if kind == "bias" and "q_proj.bias" not in left:
            continue
        hidden = sizes.hidden if kind == "weight" else None
        q_rope, q_nope = take(f"q_proj.{kind}", sizes.heads * sizes.head_dim, hidden).split(
            [sizes.heads * rope, sizes.heads * nope]
        )
        by_head = [q_rope.unflatten(0, (sizes.heads, -1)), q_nope.unflatten(0, (sizes.heads, -1))]
        made[f"q_proj.{kind}"] = torch.cat(by_head, dim=1).flatten(0, 1)
        made[f"k_rope_proj.{kind}"] = take(f"k_r_proj.{kind}", groups * rope, hidden)
        inner = cast(int | None, rank or hidden) if kind == "weight" else None
        for modality, name in modalities.items():
            up = [
                take(f"{name}.{part}.{kind}", groups * rows, inner).unflatten(0, (groups, rows))
                for part, rows in (("up_k", nope), ("up_v", sizes.head_dim))
                if rows
            ]
            made[f"{ours}.{modality}.{kind}"] = torch.cat(up, dim=1).flatten(0, 1)
            if rank and kind == "weight":
                made[f"kv_a_proj.{modality}.weight"] = take(f"{name}.down_kv.weight", cast(int, rank), hidden)
    if left:
        raise InputError(f"extra published weight(s) in an attention layer: {', '.join(sorted(left)[:5])}")
    return made


def _original(config: Any, rest: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The original model with all weights but those that the published code changed."""
    model_class = getattr(transformers, get_family(config.model_type).model_class)
    dtype = next(iter(rest.values()), torch.empty(0)).dtype
    with reading("the published weights"):
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=rest, dtype=dtype, output_loading_info=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise InputError(f"missing or extra published weight(s): {', '.join(sorted(map(str, wrong))[:5])}")
    return model
