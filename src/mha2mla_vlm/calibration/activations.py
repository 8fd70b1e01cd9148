"""Chats on their way through a decoder, a layer at a time.

Shapes: T tokens, C hidden, A answer tokens, P pairs of rotary dims.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.calibration.statistics import MAX_QUERIES, query_weights, visual_mask
from mha2mla_vlm.evaluation.answers import predicted
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.offload import front_modules, resident

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin
Key = tuple[str, int, int]  # of hidden states `[1, T, C]`: which stream, before which layer, which chat


class States(Protocol):
    """Where hidden states are kept."""

    def __getitem__(self, key: Key, /) -> torch.Tensor: ...

    def __setitem__(self, key: Key, hidden: torch.Tensor, /) -> None: ...

    def drop(self, layer: int) -> None:
        """Forget all that is before a layer."""


class MemoryStates(dict[Key, torch.Tensor]):
    """Hidden states in the CPU's memory, for there are many."""

    def __setitem__(self, key: Key, hidden: torch.Tensor) -> None:
        super().__setitem__(key, hidden.cpu())

    def drop(self, layer: int) -> None:
        """Forget all that is before a layer."""
        for key in [key for key in self if key[1] == layer]:
            del self[key]


# observe(chat, attention module, its input [1, T, C], rotary tables)
Observe = Callable[["Chat", nn.Module, torch.Tensor, Tables], None]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One chat: what every layer is `given` besides hidden states, and what its tokens are.

    `visual [T]` tells visual tokens, `weights [T]` how much each counts as a query, `answers [T - 1]`
    where the next token is one of an answer.
    """

    given: dict[str, Any]
    visual: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor
    modality: TokenModality

    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and weights of the `MAX_QUERIES` queries that count most, the last of equals."""
        rows = self.weights.flip(0).argsort(descending=True, stable=True)[:MAX_QUERIES]
        rows = (len(self.weights) - 1 - rows).sort().values
        return rows, self.weights[rows] / self.weights[rows].sum()


class _ReachedDecoder(Exception):  # noqa: N818 (no error)
    """Raised where the decoder would begin."""


@torch.no_grad()
def begin(
    model: PreTrainedModel,
    batches: Iterable[BatchFeature],
    visual_token_ids: Sequence[int],
    device: torch.device,
    states: States,
    streams: Sequence[str],
) -> list[Chat]:
    """Chats of one row each; hidden states before the first layer begin `streams`. Vision is done here."""
    chats: list[Chat] = []
    with resident(front_modules(model), device):
        for batch in batches:
            with _stopped_at(decoder_layers(model)[0]) as reached, contextlib.suppress(_ReachedDecoder):
                inputs = {k: v for k, v in batch.to(device).items() if k != "labels"}
                model(**inputs, use_cache=False, logits_to_keep=1)
            hidden, given = reached
            visual = visual_mask(batch, visual_token_ids)
            chat = Chat(
                given=given,
                visual=visual,
                weights=query_weights(batch, visual),
                answers=predicted(batch)[0],
                modality=TokenModality.from_mask(visual[None]),
            )
            for stream in streams:
                states[stream, 0, len(chats)] = hidden
            chats.append(chat)
    return chats


@contextlib.contextmanager
def _stopped_at(layer: nn.Module) -> Iterator[list[Any]]:
    """Within the context, a call of `layer` raises `_ReachedDecoder`; yields a list for its arguments."""
    reached: list[Any] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        reached.extend([args[0] if args else given.pop("hidden_states"), given])
        raise _ReachedDecoder

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield reached
    finally:
        handle.remove()


@torch.no_grad()
def advance(
    layer: nn.Module,
    index: int,
    chats: Sequence[Chat],
    states: States,
    stream: str,
    observe: Observe | None = None,
) -> None:
    """Take a stream of hidden states through one decoder layer, of an original model or with converted
    attention.
    """
    converted = isinstance(layer.self_attn, MLAAttention)
    for number, chat in enumerate(chats):
        given = chat.given | ({"token_modality": chat.modality} if converted else {})
        hidden = states[stream, index, number].to(chat.visual.device)
        with _observed(layer, chat, observe):
            states[stream, index + 1, number] = layer(hidden, **given)


@contextlib.contextmanager
def _observed(layer: nn.Module, chat: Chat, observe: Observe | None) -> Iterator[None]:
    """Within the context, `observe` sees what goes into the layer's attention."""
    if observe is None:
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        observe(chat, module, hidden, kwargs["position_embeddings"])

    handle = layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """Within the context, arguments and output of each call of `module` are added to the list it yields."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def attending(layer: Any, attention: nn.Module) -> Iterator[None]:
    """Within the context, a decoder layer attends by another module."""
    original, layer.self_attn = layer.self_attn, attention
    try:
        yield
    finally:
        layer.self_attn = original


def answer_states(chat: Chat, hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Normed hidden states `[A, C]` that tell the answers, from those after the last layer."""
    return norm(hidden)[0, :-1][chat.answers]
