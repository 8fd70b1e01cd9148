"""Parameters that train and parameters that stay, and LoRA on the former."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mha2mla_vlm.errors import InputError, need
from mha2mla_vlm.training.policies import ROLES, find_policy


def trained_names(model: nn.Module, policy: str) -> list[str]:
    """Names of the parameters that a policy trains."""
    pattern = re.compile("|".join(ROLES[role] for role in find_policy(policy)))
    return [name for name, _ in model.named_parameters() if pattern.search(name)]


def set_trained(model: PreTrainedModel, policy: str) -> int:
    """Freeze all but what `policy` trains, and hold that in float32; returns how many numbers train.

    A step of AdamW is often less than bfloat16 can represent.
    """
    chosen = set(trained_names(model, policy))
    if not chosen:
        raise InputError(f"policy {policy!r} trains nothing in this checkpoint; choose another")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            parameter.data = parameter.data.to(torch.float32)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_lora(model: PreTrainedModel, policy: str, rank: int) -> Any:
    """The model with LoRA adapters (peft) on the matrices that `policy` names; norms stay frozen."""
    need("peft", "train", "LoRA")
    from peft import LoraConfig, get_peft_model

    matrices = {
        name.removesuffix(".weight")
        for name in trained_names(model, policy)
        if name.endswith(".weight") and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
    }
    largest = min(min(model.get_submodule(name).weight.shape) for name in matrices)
    if rank > largest:
        raise InputError(f"lora_rank = {rank}: give at most {largest}, the least size of what trains")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(matrices)))
