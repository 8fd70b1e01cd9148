"""TRL trains converted models as it trains their originals: it calls them with and without their heads."""

import pytest
import torch
from helpers import answered, random_mla, record

from mha2mla_vlm.model.modeling import decoder_layers

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
FAST = {"per_device_train_batch_size": 2, "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}


def parts(message):
    """A message's content in parts."""
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def trained(trainer, model):
    """Names of the factors that a step of the trainer changed; the loss is finite."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = trainer.train().training_loss
    assert torch.isfinite(torch.tensor(loss))
    return [
        name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_supervised_fine_tuning_with_images(family, lora, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = random_mla(family)
    rows = [
        {
            "messages": [{"role": m["role"], "content": parts(m)} for m in chat.messages],
            "images": chat.load_images(),
        }
        for chat in answered(family, 2)
    ]
    names = [f"kv_{half}_proj.{modality}" for half in "ab" for modality in ("text", "vision")]
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(tmp_path), max_length=None, learning_rate=1e-2, **FAST),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=peft.LoraConfig(r=2, target_modules=names) if lora else None,
    )
    changed = trained(trainer, trainer.model)
    for part in ("kv_a_proj.text", "kv_a_proj.vision", "kv_b_proj.text", "kv_b_proj.vision"):
        assert len([name for name in changed if part in name and "lora_A" not in name]) >= len(
            decoder_layers(model)
        )


def test_a_step_of_group_relative_policy_optimisation(tmp_path):
    family = "qwen2_5_vl"
    model, processor = random_mla(family)
    chats = [record(family, "image", seed) for seed in range(2)]
    rows = [
        {"prompt": [{"role": "user", "content": parts(m)} for m in c.messages], "images": c.load_images()}
        for c in chats
    ]
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=trl.GRPOConfig(
            str(tmp_path), num_generations=2, max_completion_length=4, learning_rate=1e-2, **FAST
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    changed = trained(trainer, model)
    assert any("kv_b_proj.vision" in name for name in changed)
