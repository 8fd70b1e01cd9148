"""Models whose weights stay on disk: transformers' disk offloading, read a module at a time."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.modeling import decoder_layers, mla_classes, text_model
from mha2mla_vlm.utils.compat import hook_at_rest, offloaded_shape, offloaded_value, tied_names


def empty_model(config: Any) -> Any:
    """A model of an original or a converted config, without memory."""
    with torch.device("meta"):
        if getattr(config, "mla", None) is not None:
            return mla_classes(config.model_type)[1](config)
        return AutoModelForImageTextToText.from_config(config)


def disk_map(config: Any, device: torch.device) -> dict[str, str]:
    """The `device_map` of a model that is read from disk to `device` module by module, but for its last norm.

    What stays on the device shows accelerate where to work; before 1.15 it takes no model without, and
    cannot read tied weights, so that these stay too.
    """
    whole, near = empty_model(config), str(device)
    text = text_model(whole)
    ends = near if tied_names(whole) else "disk"
    devices = {name: ends for name, child in whole.named_children() if child is not whole.model}
    devices |= {f"model.{name}": near for name, _ in whole.model.named_parameters(recurse=False)}
    devices |= {f"model.{name}": "disk" for name, child in whole.model.named_children() if child is not text}
    (place,) = (name for name, child in whole.model.named_children() if child is text)
    for name, child in text.named_children():
        small = child is text.norm or not any(True for _ in child.parameters())
        kept = ends if child is whole.get_input_embeddings() else "disk"
        devices[f"model.{place}.{name}"] = near if small else kept
    return devices


@contextlib.contextmanager
def resident(modules: Iterable[nn.Module], device: torch.device | None = None) -> Iterator[None]:
    """Within the context, the weights of modules that lie on disk are in memory, on `device`.

    Modules that are in memory anyway stay where they are.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if has_offloaded_params(module):
                stack.enter_context(align_module_device(module, device))
                stack.enter_context(hook_at_rest(module))
        yield


def front_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """All modules that a prompt goes through before the first decoder layer."""
    behind = {id(m) for layer in decoder_layers(model) for m in layer.modules()}
    behind |= {id(m) for m in end_modules(model)}
    return (module for module in model.modules() if id(module) not in behind)


def end_modules(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """What follows the last decoder layer: the norm and the head."""
    return text_model(model).norm, model.lm_head


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of normed hidden states, as the model's own forward makes them of its head."""
    logits: torch.Tensor = model.lm_head(hidden)
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)  # Gemma's
    return logits if cap is None else cap * (logits / cap).tanh()


def stored_names(model: PreTrainedModel) -> list[str]:
    """Names of what a checkpoint of the model holds; tied weights once."""
    tied = tied_names(model)
    return [name for name in model.state_dict() if name not in tied]


def check_shapes(model: PreTrainedModel) -> None:
    """Raise `InputError` for a weight on disk whose shape is not that of the config, before it is read."""
    for name in stored_names(model):
        owner, _, local = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        expected = tuple(getattr(module, local).shape)
        found = offloaded_shape(module, local) if has_offloaded_params(module) else None
        if found is not None and found != expected:
            raise InputError(f"{name} has shape {list(found)}, by the config it must be {list(expected)}")


def read_weights(model: PreTrainedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters and buffers, from memory or from disk."""
    found = {}
    for name in names:
        owner, _, local = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        tensor = getattr(module, local)
        found[name] = offloaded_value(module, local) if tensor.is_meta else tensor.detach()
    return found
