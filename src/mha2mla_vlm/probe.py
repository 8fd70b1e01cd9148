"""What a converted layer costs at the model's output, measured with layers swapped in a context.

An error in one layer grows on its way through the layers above it, and no formula over the layer
alone foresees that. Shapes: T tokens, A answer tokens, C hidden, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.attention import MLAAttention
from mha2mla_vlm.cache import TokenModality
from mha2mla_vlm.calibration import visual_mask
from mha2mla_vlm.evaluation import predicted
from mha2mla_vlm.modeling import decoder_layers


class Probe:
    """Single chats, held before the language model of an original model: vision is done once."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, batches: Sequence[BatchFeature], visual_token_ids: Sequence[int]
    ) -> None:
        self.model = model
        batches = [batch.to(model.device) for batch in batches]
        with _observed(model.model.language_model) as calls:
            for batch in batches:
                model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False, logits_to_keep=1)
        self.inputs = [inputs for inputs, _ in calls]
        self.answers = [predicted(batch)[0] for batch in batches]
        self.modality = [
            TokenModality.from_mask(visual_mask(batch, visual_token_ids)[None]) for batch in batches
        ]
        # hidden states `[A, C]` that tell the answers: to keep distributions takes V / C as much
        self.expected = [
            output.last_hidden_state[0, :-1][at] for (_, output), at in zip(calls, self.answers, strict=True)
        ]

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log probabilities of answer tokens, `[A, C]` to `[A, V]`."""
        return self.model.lm_head(hidden).float().log_softmax(-1)

    def loss(self, layers: Mapping[int, MLAAttention]) -> float:
        """Mean KL divergence of answer tokens from the original with some layers converted, in nats."""
        return max(0.0, sum(self.losses(layers)) / sum(map(len, self.expected)))

    @torch.no_grad()
    def losses(self, layers: Mapping[int, MLAAttention]) -> list[float]:
        """The divergence of each chat, summed over its answer tokens."""
        found = []
        for index, expected in enumerate(self.expected):
            with swapped(self.model, layers, self.modality[index]):
                output = self.model.model.language_model(**self.inputs[index])
            hidden = output.last_hidden_state[0, :-1][self.answers[index]]
            pair = self.log_probs(hidden), self.log_probs(expected)
            found.append(float(nn.functional.kl_div(*pair, reduction="sum", log_target=True)))
        return found

    def keep_hardest(self, layers: Mapping[int, MLAAttention], count: int) -> None:
        """Keep the `count` chats that suffer most. A mean of divergences is mostly a few chats'."""
        losses = self.losses(layers)
        hardest = sorted(range(len(losses)), key=lambda index: -losses[index])[:count]
        for name in ("inputs", "answers", "modality", "expected"):
            values = getattr(self, name)
            setattr(self, name, [values[index] for index in sorted(hardest)])


@contextlib.contextmanager
def _observed(module: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Within the context, the keyword arguments and the output of each call of `module` are kept."""
    calls: list[tuple[dict[str, Any], Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((kwargs, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def swapped(
    model: PreTrainedModel, layers: Mapping[int, MLAAttention], modality: TokenModality
) -> Iterator[None]:
    """Within the context, these layers of an original model attend by converted modules."""

    def inform(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"token_modality": modality}

    decoder = decoder_layers(model)
    originals = {index: decoder[index].self_attn for index in layers}
    handles = []
    try:
        for index, module in layers.items():
            handles.append(module.register_forward_pre_hook(inform, with_kwargs=True))
            decoder[index].self_attn = module
        yield
    finally:
        for handle in handles:
            handle.remove()
        for index, original in originals.items():
            decoder[index].self_attn = original
