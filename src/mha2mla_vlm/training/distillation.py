"""What the original model teaches: its answers' distributions, and its layers' attention outputs.

Shapes: B batch, T tokens, K columns of `[B, T]` that predict an answer in any row, A answer tokens,
C hidden, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mha2mla_vlm.data.records import IGNORE_INDEX
from mha2mla_vlm.model.families.base import TEXT_MODELS
from mha2mla_vlm.model.modeling import attention_of, decoder_layers, text_model

_AFTER = ("lm_head.", *(f"model.{name}.norm." for name in TEXT_MODELS))  # behind the language model's layers


def answer_columns(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns that predict an answer token, `[K]`, and the tokens they predict, `[B, K]`."""
    targets = labels[:, 1:]
    columns = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]
    return columns, targets[:, columns]


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of `logits [B, K, V]` to `targets [B, K]`, summed over answer tokens, in float32."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) by token, `[A]` of `[A, V]`, in nats and float32."""
    log_p, log_q = teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def relative_errors(
    found: dict[int, torch.Tensor], wanted: dict[int, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Squared error of each layer's `[B, T, C]` over the squared norm of what was wanted, mean over layers.

    `mask [B, T]` leaves padding out.
    """
    errors = [
        (found[layer].float() - y.float())[mask].square().sum() / y.float()[mask].square().sum()
        for layer, y in wanted.items()
    ]
    return torch.stack(errors).mean()


def share_frozen(teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    """Let the teacher use the student's frozen parameters where they are equal; returns how many numbers.

    All but attention is, so a teacher costs only the memory of its attention.
    """
    frozen = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    shared = 0
    for name, parameter in list(teacher.named_parameters()):
        own = frozen.get(name)
        if own is None or own.shape != parameter.shape or own.dtype != parameter.dtype:
            continue
        if torch.equal(own.to(parameter.device), parameter):
            path, _, leaf = name.rpartition(".")
            setattr(teacher.get_submodule(path), leaf, own)
            shared += own.numel()
    return shared


def same_inputs(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Whether both language models get the same embeddings: frozen and equal parameters before them."""
    layers = tuple(f"model.{name}.layers." for name in TEXT_MODELS)
    before = [
        {n: p for n, p in model.named_parameters() if not n.startswith(layers)}
        for model in (teacher, student)
    ]
    names = [{n for n in found if not n.startswith(_AFTER)} for found in before]
    return names[0] == names[1] and all(
        not before[1][n].requires_grad and torch.equal(before[0][n], before[1][n]) for n in names[0]
    )


@contextlib.contextmanager
def language_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Within the context, what the language model was given last: embeddings, positions, mask."""
    given: dict[str, Any] = {}

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given.update({k: v for k, v in kwargs.items() if k != "token_modality"})

    with text_model(model).register_forward_pre_hook(keep, with_kwargs=True):
        yield given


@contextlib.contextmanager
def _hooked(
    modules: Iterable[nn.Module], register: Callable[..., RemovableHandle], hook: Callable[..., Any]
) -> Iterator[None]:
    """Within the context, each module calls `hook` with its index ahead of what `register` has it give."""
    with contextlib.ExitStack() as hooks:
        for index, module in enumerate(modules):
            hooks.enter_context(register(module, functools.partial(hook, index)))
        yield


@contextlib.contextmanager
def attention_outputs(model: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Within the context, what each layer's attention gives, `[B, T, C]`."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int, _: nn.Module, args: Any, output: Any) -> None:
        outputs[index] = output[0]

    attentions = [each for layer in decoder_layers(model) if (each := attention_of(layer)) is not None]
    with _hooked(attentions, nn.Module.register_forward_hook, keep):
        yield outputs


@contextlib.contextmanager
def layer_inputs(model: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Within the context, what goes into each layer, `[B, T, C]`."""
    inputs: dict[int, torch.Tensor] = {}

    def keep(index: int, _: nn.Module, args: Any) -> None:
        inputs[index] = args[0]

    with _hooked(decoder_layers(model), nn.Module.register_forward_pre_hook, keep):
        yield inputs


@contextlib.contextmanager
def fed(model: PreTrainedModel, inputs: dict[int, torch.Tensor]) -> Iterator[None]:
    """Within the context, layers of `model` work on these inputs, not on each other's outputs.

    The graph stays whole, with gradients of zero: processes must agree on the parameters that have one.
    """

    def replace(index: int, _: nn.Module, args: Any) -> Any:
        return (inputs[index] + 0.0 * args[0], *args[1:])

    with _hooked(decoder_layers(model), nn.Module.register_forward_pre_hook, replace):
        yield
