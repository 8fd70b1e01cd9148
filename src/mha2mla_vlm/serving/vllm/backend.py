"""What vLLM asks of an attention backend: a batch described for latent attention, and its arithmetic.

Shapes: T new tokens of all requests together, C = r + G * R numbers of a row of the cache, H query heads, D
head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mha2mla_vlm.model.cache.pages import Paged, is_visual, store
from mha2mla_vlm.model.paged import decode, prefill
from mha2mla_vlm.serving.vllm.compat import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    sequence_lengths,
    split_decodes_and_prefills,
)


@dataclass
class LatentMetadata:
    """One step's requests: first the `decodes`, which have one new token each, then those with more.

    The new tokens of request i are those from `starts[i]` to `starts[i + 1]`, its pages `block_table[i]`.
    `visual` is the modality of the decoding requests' tokens, once the first layer has read it.
    """

    tokens: int
    decodes: int
    starts: list[int]
    lengths: list[int]
    longest: int
    device_lengths: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    visual: torch.Tensor | None = None


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Requests that decode come first. vLLM has a builder for each size of layers; they share their work."""

    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.shared: Any = layers[layer_names[0]].modality

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        """Describe one step."""
        known = self.shared.step
        if known is None or known[0] is not common_attn_metadata:
            known = self.shared.step = (common_attn_metadata, _described(common_attn_metadata))
        return known[1]


def _described(common: CommonAttentionMetadata) -> LatentMetadata:
    _, _, decodes, _ = split_decodes_and_prefills(common)  # tokens: one for each such request
    return LatentMetadata(
        tokens=common.num_actual_tokens,
        decodes=decodes,
        starts=common.query_start_loc_cpu.tolist(),
        lengths=sequence_lengths(common),
        longest=common.max_seq_len,
        device_lengths=common.seq_lens,
        block_table=common.block_table_tensor,
        slots=common.slot_mapping,
    )


class LatentImpl(AttentionImpl[LatentMetadata]):
    """Writes the new rows of a layer, then attends; the layer itself has the weights that this needs."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **kwargs: Any) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = 1, "auto"

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LatentMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output [T, H, D]` for `query [T, H, D]`, rows `key [T, C]` and their modality `value [T]`."""
        if attn_metadata is None:  # a run to see how much memory is needed
            return output.zero_()
        step, pages = attn_metadata, kv_cache[:, 0]
        visual = value[: step.tokens] if layer.decoupled else None
        store(pages, step.slots[: step.tokens], key[: step.tokens], visual, layer.rank)
        if step.decodes:
            self._decode(layer, query[: step.decodes], pages, step, output[: step.decodes])
        for request in range(step.decodes, len(step.starts) - 1):
            self._prefill(layer, request, query, key, visual, pages, step, output)
        return output

    def _decode(
        self, layer: Any, query: torch.Tensor, pages: torch.Tensor, step: LatentMetadata, output: torch.Tensor
    ) -> None:
        used = -(-step.longest // pages.shape[1])
        table, lengths = step.block_table[: step.decodes, :used], step.device_lengths[: step.decodes]
        stored = Paged(pages, table, lengths, layer.rank, layer.kv_heads)
        if layer.decoupled and step.visual is None:
            step.visual = stored.visual()
        output.copy_(decode(query, stored, step.visual, layer.ups(), self.scale))

    def _prefill(
        self,
        layer: Any,
        request: int,
        query: torch.Tensor,
        key: torch.Tensor,
        visual: torch.Tensor | None,
        pages: torch.Tensor,
        step: LatentMetadata,
        output: torch.Tensor,
    ) -> None:
        start, stop = step.starts[request : request + 2]
        if start == stop:  # padding
            return
        total, rows = step.lengths[request], key[start:stop]
        which = None if visual is None else visual[start:stop].bool()
        if total > stop - start:  # others are in the cache, from an earlier chunk or another request's prefix
            used = -(-total // pages.shape[1])
            rows = pages[step.block_table[request, :used]].flatten(0, 1)[:total]
            which = None if visual is None else is_visual(rows, layer.rank)
        output[start:stop] = prefill(query[start:stop], rows, which, layer.ups(), self.scale)


class LatentBackend(AttentionBackend):
    """Pages of rows, one head of which is all that a token has."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "MHA2MLA_LATENT"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder
