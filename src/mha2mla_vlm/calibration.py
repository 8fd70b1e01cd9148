"""What calibration chats tell about each layer's attention: hooks in a context, nothing left behind.

Shapes: B batch (1 here, so nothing is padded), T tokens, G KV heads, P = D / 2 pairs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.modeling import decoder_layers
from mha2mla_vlm.progress import track
from mha2mla_vlm.rope import masking_kl_scores, one_table, rotate, two_norm_scores

# observer(layer index, attention module, hidden states [B, T, hidden], (cos, sin))
Observer = Callable[[int, nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]


@dataclass
class LayerStats:
    """Per modality, the second moment of a layer's attention input and the number of tokens in it."""

    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, modality: str, inputs: torch.Tensor) -> None:
        """Add inputs `[tokens, hidden]`, accumulated in float32 or better."""
        inputs = inputs.float()
        moment = (inputs.T @ inputs).double()
        self.moments[modality] = self.moments.get(modality, torch.zeros_like(moment)) + moment
        self.counts[modality] = self.counts.get(modality, 0) + len(inputs)

    def pooled(self) -> torch.Tensor:
        """The moment over all modalities."""
        return torch.stack(list(self.moments.values())).sum(0)


@contextlib.contextmanager
def observed_attention(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within the context, `observer` sees what goes into every layer's attention."""
    handles = []
    for index, layer in enumerate(decoder_layers(model)):

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index
        ) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            observer(index, module, hidden, kwargs["position_embeddings"])

        handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(
    model: PreTrainedModel, batches: Sequence[BatchFeature], observer: Observer, title: str
) -> Iterator[BatchFeature]:
    for batch in track(batches, title):
        yield batch
        with observed_attention(model, observer):
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False, logits_to_keep=1)


def collect_moments(
    model: PreTrainedModel, batches: Sequence[BatchFeature], visual_token_ids: Sequence[int]
) -> list[LayerStats]:
    """Moments of every layer's attention input over single chats, apart for text and vision."""
    stats = [LayerStats() for _ in decoder_layers(model)]
    masks: dict[str, torch.Tensor] = {}

    def observe(index: int, module: nn.Module, hidden: torch.Tensor, _: Any) -> None:
        for modality, mask in masks.items():
            stats[index].add(modality, hidden[0][mask.to(hidden.device)])

    for batch in _run(model, batches, observe, "collecting moments"):
        ids = batch["input_ids"][0]
        visual = torch.isin(ids, torch.tensor(list(visual_token_ids), device=ids.device))
        masks.update(text=~visual, vision=visual)
    return stats


def collect_pair_scores(
    model: PreTrainedModel, batches: Sequence[BatchFeature], method: str
) -> list[torch.Tensor]:
    """Scores `[G, P]` of every layer's pairs by `2-norm` or `mkl`, averaged over single chats."""
    scores: list[Any] = [0.0] * len(decoder_layers(model))

    def observe(
        index: int, module: Any, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Add one chat's scores of a layer."""

        def heads(projection: nn.Module) -> torch.Tensor:
            return projection(hidden)[0].float().unflatten(-1, (-1, module.head_dim)).transpose(0, 1)

        queries, keys = heads(module.q_proj), heads(module.k_proj)
        if method == "mkl":
            half = module.head_dim // 2  # the other half of a table is the same
            cos, sin = (one_table(table, module.config)[0, :, :half].float() for table in tables)
            score = masking_kl_scores(rotate(queries, cos, sin), rotate(keys, cos, sin), module.scaling)
        else:
            score = two_norm_scores(queries, keys)
        scores[index] = scores[index] + score / len(batches)

    for _ in _run(model, batches, observe, f"scoring pairs ({method})"):
        pass
    return scores
