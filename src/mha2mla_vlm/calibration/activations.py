"""Chats on their way through a decoder, a layer at a time.

Shapes: T tokens, C hidden, A answer tokens, P pairs of rotary dims.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel

from mha2mla_vlm.algorithms.looked_at import Chosen
from mha2mla_vlm.calibration.statistics import MAX_QUERIES, OF_A_HEAD, query_weights, visual_mask
from mha2mla_vlm.evaluation.answers import predicted
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.modeling import attention_of, text_model
from mha2mla_vlm.model.offload import front_modules, resident
from mha2mla_vlm.utils.compat import unshared

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


# observe(chat, attention module, its input [1, T, C], rotary tables, attention mask)
Observe = Callable[["Chat", nn.Module, torch.Tensor, Tables, torch.Tensor | None], None]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One chat: what each layer is `given` besides hidden states, what the model adds to these between layers
    (`layer_arguments`), and what its tokens are.

    `number` is its place among the chats of all processes, `visual [T]` marks visual tokens, `weights [T]`
    says how much each counts as a query, `answers [T - 1]` where the next token is one of an answer.
    """

    number: int
    given: Sequence[dict[str, Any]]
    added: dict[int, torch.Tensor]
    visual: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor
    modality: TokenModality

    def some_queries(self, heads: int) -> Chosen:
        """The same places, with weights that stand for all queries'."""
        return [(rows, share * self.weights.sum()) for rows, share in self.queries(heads)]

    def queries(self, heads: int) -> Chosen:
        """Places and weights of the `MAX_QUERIES` queries that count most, the last of equals, dealt to so
        many heads that share a KV head: what pairs are chosen by has to see many queries, of whatever head.
        """
        most = min(MAX_QUERIES, heads * OF_A_HEAD)
        rows = self.weights.flip(0).argsort(descending=True, stable=True)[:most]
        rows = (len(self.weights) - 1 - rows).sort().values
        dealt = [rows[head % len(rows) :: heads] for head in range(heads)]
        return [(own, self.weights[own] / self.weights[own].sum()) for own in dealt]


@torch.no_grad()
def begin(
    model: PreTrainedModel,
    batches: Iterable[BatchFeature],
    visual_token_ids: Sequence[int],
    device: torch.device,
    states: States,
    streams: Sequence[str],
    *,
    first: int = 0,
) -> list[Chat]:
    """Chats of one row each, numbered from `first`; hidden states before the first layer begin `streams`.
    Vision is done here.
    """
    chats: list[Chat] = []
    with resident(front_modules(model), device):
        for batch in batches:
            hidden, given, added = layer_arguments(model, batch.to(device))
            visual = visual_mask(batch, visual_token_ids)
            chat = Chat(
                number=first + len(chats),
                given=given,
                added=added,
                visual=visual,
                weights=query_weights(batch, visual),
                answers=predicted(batch)[0],
                modality=TokenModality.from_mask(visual[None]),
            )
            for stream in streams:
                states[stream, 0, len(chats)] = hidden
            chats.append(chat)
    return chats


Call = tuple[torch.Tensor | None, dict[str, Any]]  # hidden states (None: zeros), and keyword arguments


@torch.no_grad()
def layer_arguments(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, list[dict[str, Any]], dict[int, torch.Tensor]]:
    """What the model's own forward gives its decoder layers, found by one pass over layers that return zeros.

    Returns hidden states `[B, T, C]` before the first layer, each layer's keyword arguments, and what is
    added to hidden states before a layer (or, numbered as one more, before the norm), where anything is.
    """
    with _stubbed(model) as calls:
        model.model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    (first, _), *others = calls
    added = {index: hidden for index, (hidden, _) in enumerate(others, 1) if hidden is not None}
    return cast(torch.Tensor, first), [given for _, given in calls[:-1]], added


class _Stub(nn.Module):
    """Stands for a decoder layer: keeps what it is called with, and returns zeros."""

    def __init__(self, layer: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        self.names, self.calls = list(inspect.signature(layer.forward).parameters), calls
        self.unshared = unshared(layer)

    def forward(self, *args: Any, **given: Any) -> torch.Tensor:
        hidden, *others = args or [given.pop("hidden_states")]
        given |= dict(zip(self.names[1:], others, strict=False)) | self.unshared
        self.calls.append((hidden if not self.calls or hidden.any() else None, given))
        return torch.zeros_like(hidden)


@contextlib.contextmanager
def _stubbed(model: PreTrainedModel) -> Iterator[list[Call]]:
    """Within the context, stubs are in the place of the decoder layers and of the norm behind them; yields a
    list for what they are called with.
    """
    text: Any = text_model(model)
    layers, norm, calls = text.layers, text.norm, list[Call]()
    text.layers, text.norm = nn.ModuleList(_Stub(layer, calls) for layer in layers), _Stub(norm, calls)
    try:
        yield calls
    finally:
        text.layers, text.norm = layers, norm


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
    converted = isinstance(attention_of(layer), MLAAttention)
    for number, chat in enumerate(chats):
        given = chat.given[index] | ({"token_modality": chat.modality} if converted else {})
        hidden = states[stream, index, number].to(chat.visual.device)
        with _observed(layer, chat, observe):
            output = layer(hidden, **given)
        added = chat.added.get(index + 1)
        states[stream, index + 1, number] = output if added is None else output + added


@contextlib.contextmanager
def _observed(layer: nn.Module, chat: Chat, observe: Observe | None) -> Iterator[None]:
    """Within the context, `observe` sees what goes into the layer's attention."""
    if observe is None:
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs["position_embeddings"], kwargs.get("attention_mask")
        observe(chat, module, hidden_states_of(args, kwargs), *given)

    handle = layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What an attention module is called with."""
    hidden: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


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
def attending(layer: Any, attention: nn.Module | None) -> Iterator[None]:
    """Within the context, a decoder layer attends by another module; None leaves it as it is."""
    if attention is None:
        yield
        return
    original, layer.self_attn = layer.self_attn, attention
    try:
        yield
    finally:
        layer.self_attn = original


def answer_states(chat: Chat, hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Normed hidden states `[A, C]` that predict the answers, from those after the last layer."""
    return norm(hidden)[0, :-1][chat.answers]
