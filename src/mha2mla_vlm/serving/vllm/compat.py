"""All that is taken from vLLM (0.30 and up), in one place: what moves between its releases is mended here."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer
from vllm.utils import torch_utils
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AutoWeightsLoader",
    "ColumnParallelLinear",
    "CommonAttentionMetadata",
    "FullAttentionSpec",
    "KVCacheSpec",
    "ModelRegistry",
    "PPMissingLayer",
    "VllmConfig",
    "attend",
    "get_current_vllm_config",
    "parallel_place",
    "sequence_lengths",
    "split_decodes_and_prefills",
    "stock_class",
]


def stock_class(name: str) -> type[Any]:
    """vLLM's own class of an architecture."""
    return ModelRegistry.models[name].load_model_cls()


def parallel_place() -> tuple[int, int]:
    """This process's rank among those that share a layer, and their number."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def attend(
    query: torch.Tensor, rows: torch.Tensor, visual: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """vLLM's attention operator, at which it splits compiled graphs: calls the layer's `impl.forward`."""
    encode = getattr(torch_utils, "_encode_layer_name", None)
    name = layer_name if encode is None else encode(layer_name)
    torch.ops.vllm.unified_attention_with_output(query, rows, visual, output, name)


def sequence_lengths(common: CommonAttentionMetadata) -> list[int]:
    """Tokens of each request so far, new ones included; exact for requests that are prefilled."""
    known = getattr(common, "seq_lens_cpu_upper_bound", None)
    return (common.seq_lens if known is None else known).tolist()
