"""What vLLM asks of an attention backend: a batch described for latent attention, and its arithmetic.

Shapes: T new tokens of all requests together, C = r + G * R numbers of a row of the cache, or r where keys
are rotated at read, H query heads, D head dim, n requests, P pages of the longest and S tokens in them, A
numbers in a position, B pages in all, N tokens of a page, W numbers of a row that hold a position.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.cache.pages import (
    Paged,
    is_visual,
    read_positions,
    store,
    store_bytes,
    store_positions,
)
from mha2mla_vlm.model.paged import decode, prefill
from mha2mla_vlm.model.rebuilt import Angles
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
    `places [B, N, W]` are the positions in all pages, once the layer that holds them has stored the new ones,
    and `angles_of` the rotary tables of the requests that some layer has asked for.
    """

    tokens: int
    decodes: int
    starts: list[int]
    lengths: list[int]
    device_lengths: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    visual: torch.Tensor | None = None
    places: torch.Tensor | None = None
    angles_of: dict[int, Angles] = field(default_factory=dict)

    def table(self, first: int, last: int, size: int) -> torch.Tensor:
        """Pages `[n, P]`, each of `size` tokens, of the requests from `first` to `last`."""
        return self.block_table[first:last, : -(-max(self.lengths[first:last]) // size)]

    def positions(self, first: int, last: int) -> torch.Tensor:
        """Positions `[A, n, S]` of all tokens of the requests from `first` to `last`."""
        if self.places is None:
            raise InputError(
                "vLLM keeps this layer in other pages than the one that has the positions of tokens; "
                "convert all layers, or with --rotate-at write"
            )
        found = read_positions(self.places, self.table(first, last, self.places.shape[1]))
        unused = torch.arange(found.shape[-1], device=found.device) >= self.device_lengths[first:last, None]
        return found.masked_fill(unused, 0)  # whatever is there, tables have a row 0

    def angles(self, layer: Any, first: int, last: int) -> Angles | None:
        """Those of all tokens of these requests, where a layer rotates at read; tables serve all layers, and
        so does what is made of them where all pairs are rotated, which then are in order.
        """
        if not layer.at_read:
            return None
        if first not in self.angles_of:
            cos, sin = layer.tables(self.positions(first, last))
            pairs = torch.arange(cos.shape[-1], device=cos.device).expand(layer.kv_heads, -1)
            self.angles_of[first] = Angles(cos, sin, pairs, shared={})
        known = self.angles_of[first]
        return known if layer.rope_dim == layer.head_dim else replace(known, pairs=layer.rope_pairs)


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Requests that decode come first. vLLM has a builder for each size of layers; they share their work."""

    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.shared: Any = layers[layer_names[0]].tokens

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
        if layer.packed is None:
            store(pages, step.slots[: step.tokens], key[: step.tokens], visual, layer.rank)
        else:
            store_bytes(pages, step.slots[: step.tokens], key[: step.tokens])
        if layer.position_axes:
            step.places = pages[..., layer.row_width(pages.dtype) :]
            store_positions(step.places, step.slots[: step.tokens], layer.tokens.positions[:, : step.tokens])
        if step.decodes:
            self._decode(layer, query[: step.decodes], pages, step, output[: step.decodes])
        for request in range(step.decodes, len(step.starts) - 1):
            self._prefill(layer, request, query, key, visual, pages, step, output)
        return output

    def _decode(
        self, layer: Any, query: torch.Tensor, pages: torch.Tensor, step: LatentMetadata, output: torch.Tensor
    ) -> None:
        table, lengths = step.table(0, step.decodes, pages.shape[1]), step.device_lengths[: step.decodes]
        stored = Paged(pages, table, lengths, layer.rank, layer.kv_heads, layer.packed)
        if layer.decoupled and step.visual is None:
            step.visual = stored.visual()
        angles = step.angles(layer, 0, step.decodes)
        output.copy_(decode(query, stored, step.visual, layer.ups(), self.scale, angles))

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
            table = step.table(request, request + 1, pages.shape[1])[0]
            rows = (pages if layer.packed is None else pages.view(torch.uint8))[table].flatten(0, 1)[:total]
        if layer.packed is not None:
            rows, found = layer.packed.unpack(rows, pages.dtype)
            which = None if visual is None else found
        elif total > stop - start and visual is not None:
            which = is_visual(rows, layer.rank)
        angles = step.angles(layer, request, request + 1)
        output[start:stop] = prefill(query[start:stop], rows, which, layer.ups(), self.scale, angles)


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
