"""What errors of a layer's attention do to the answers, predicted by gradients.

To second order an answer token diverges by `d^T (diag(p) - p p^T) d / 2`, d the change of its logits and p
its probabilities. Random signs e sketch that metric: with `u = sqrt(p) * e - p (sqrt(p) . e)` the mean of
`(u . d)^2` is `d^T (diag(p) - p p^T) d`. So the gradient of `u . logits` at the outputs of a layer's
heads shows in one number what an error there does, however many layers lie above.

Shapes: S sketches, A answer tokens, V vocabulary, T tokens, C hidden, H query heads, D head dim.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mha2mla_vlm.calibration.activations import (
    Chat,
    States,
    answer_states,
    calls_of,
    hidden_states_of,
)
from mha2mla_vlm.model.attention import MLAAttention
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.offload import end_modules, logits_of, resident

GRADIENT = "gradient"  # a stream of `[S, T, C]`


def sketch_directions(logits: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The u `[S, A, V]` for `logits [A, V]` and `signs [S, A, V]` of 1 and -1."""
    probabilities = logits.softmax(-1)
    signed = probabilities.sqrt() * signs
    return signed - probabilities * signed.sum(-1, keepdim=True)


def begin_gradients(
    model: PreTrainedModel,
    chats: Sequence[Chat],
    states: States,
    stream: str,
    *,
    sketches: int,
) -> None:
    """From the end of a stream of an original model, begin that of gradients, which goes down.

    Signs are seeded by chat, so that they are the same however chats are shared by processes.
    """
    norm, head = end_modules(model)
    last = len(decoder_layers(model))
    device = chats[0].visual.device
    with resident((norm, head), device):
        for number, chat in enumerate(chats):
            hidden = states[stream, last, number].to(device).detach().requires_grad_()
            generator = torch.Generator().manual_seed(chat.number)
            with torch.enable_grad():
                logits = logits_of(model, answer_states(chat, hidden, norm)).float()
            signs = torch.randint(2, (sketches, *logits.shape), generator=generator).to(device) * 2.0 - 1.0
            directions = sketch_directions(logits.detach(), signs)
            found = [torch.autograd.grad(logits, hidden, u, retain_graph=True)[0] for u in directions]
            states[GRADIENT, last, number] = torch.cat(found)


def project_errors(
    layer: Any,
    index: int,
    chats: Sequence[Chat],
    states: States,
    stream: str,
    candidates: Sequence[MLAAttention],
) -> torch.Tensor:
    """What errors do that converted `candidates` make in an original layer, `[candidates, chats, S]`.

    The stream of gradients is taken down through the layer; without candidates that is all.
    """
    if not candidates:
        _gradients_below(layer, index, chats, states, stream)
        return torch.zeros(0, len(chats), 1)
    found = []
    for number, chat in enumerate(chats):
        hidden = states[stream, index, number].to(chat.visual.device).detach().requires_grad_()
        attention = layer.self_attn
        with calls_of(attention) as calls, calls_of(attention.o_proj) as inner, torch.enable_grad():
            output = layer(hidden, **chat.given[index])
        ((args, kwargs, _),), (((heads,), _, _),) = calls, inner
        gradients = states[GRADIENT, index + 1, number].to(hidden.device)
        both = [
            torch.autograd.grad(output, (heads, hidden), one[None], retain_graph=True) for one in gradients
        ]
        here, below = (torch.cat(found) for found in zip(*both, strict=True))
        states[GRADIENT, index, number] = below
        found.append(_projected(candidates, here, heads.detach(), chat, args, kwargs))
    return torch.stack(found, dim=1)


def _gradients_below(layer: Any, index: int, chats: Sequence[Chat], states: States, stream: str) -> None:
    """Take the stream of gradients down through a layer."""
    for number, chat in enumerate(chats):
        hidden = states[stream, index, number].to(chat.visual.device).detach().requires_grad_()
        with torch.enable_grad():
            output = layer(hidden, **chat.given[index])
        gradients = states[GRADIENT, index + 1, number].to(hidden.device)
        below = [torch.autograd.grad(output, hidden, one[None], retain_graph=True)[0] for one in gradients]
        states[GRADIENT, index, number] = torch.cat(below)


@torch.no_grad()
def _projected(
    candidates: Sequence[MLAAttention],
    gradients: torch.Tensor,
    heads: torch.Tensor,
    chat: Chat,
    args: Any,
    kwargs: Any,
) -> torch.Tensor:
    """Products of `gradients [S, T, H D]` with the errors of each candidate's heads, `[candidates, S]`."""
    rows, known, gradients = [], dict[int, _Known](), gradients.flatten(1).double()
    hidden = hidden_states_of(args, kwargs)
    for module in candidates:
        weight = module.q_proj.weight.data_ptr()  # many candidates have the same
        if weight not in known:
            known[weight] = _Known(module.q_proj, hidden)
        with _heads_only(module, known[weight]):
            error = module(*args, **kwargs, token_modality=chat.modality)[0] - heads
        rows.append(gradients @ error.flatten().double())
    return torch.stack(rows)


class _Known(nn.Module):
    """In the place of a linear projection of an input: what comes of it."""

    def __init__(self, projection: nn.Linear, x: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.output = projection.out_features, projection(x)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.output


@contextlib.contextmanager
def _heads_only(module: MLAAttention, queries: _Known) -> Iterator[None]:
    """Within the context, attention has these queries, and returns what its heads give."""
    before = module.q_proj, module.o_proj
    module.q_proj, module.o_proj = queries, nn.Identity()
    try:
        yield
    finally:
        module.q_proj, module.o_proj = before
