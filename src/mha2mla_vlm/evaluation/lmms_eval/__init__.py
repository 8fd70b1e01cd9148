"""The evaluation harness lmms-eval (0.7 and up): our models as one of its own, chats as one of its tasks."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval finds under the entry point `lmms_eval.models`: the model `mha2mla`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mha2mla", chat_class_path="mha2mla_vlm.evaluation.lmms_eval.model.MHA2MLA")
