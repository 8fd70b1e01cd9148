"""What fine-tuning writes: the trained model, how it was trained, and its card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mha2mla_vlm.model.card import write_card
from mha2mla_vlm.model.checkpoint import load_config
from mha2mla_vlm.model.origin import read_findings
from mha2mla_vlm.training.trainer import RecoveryTrainer

SETTINGS = "finetune.json"  # in the output: how it was trained, and the result
RESULT = "result"  # in the folder of an unfinished run: what becomes the output
STATE = "state.json"  # in the folder of an unfinished run: what it was started with, and measured first


def write_model(trainer: RecoveryTrainer, folder: Path, dtype: torch.dtype) -> None:
    """Write the trained model whole, gathered from all processes, adapters merged, in its dtype."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        state = model.state_dict()
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended as it was written
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        model.save_pretrained(folder, state_dict=state)
        model.config.dtype = dtype  # which saving sets to that of the model, not of the state
        model.config.save_pretrained(folder)


def write_rest(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings and logs beside the model. Nothing is moved: the run may be resumed until the end."""
    result = folder / RESULT
    (result / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.name in (RESULT, STATE) or path.name.startswith("checkpoint-") or path.suffix == ".tmp":
            continue
        if path.is_dir():  # tensorboard's
            shutil.copytree(path, result / path.name)
        else:
            shutil.copy(path, result)


def write_trained_card(checkpoint: str | Path, folder: Path, name: str, result: dict[str, Any]) -> None:
    """Write the card of what a converted checkpoint was trained to, with what was measured after it."""
    config = load_config(folder)
    if getattr(config, "mla", None) is not None:
        known = {"findings": read_findings(checkpoint), "evaluation": result, "trained": True}
        write_card(config, folder, name=name, **known)
