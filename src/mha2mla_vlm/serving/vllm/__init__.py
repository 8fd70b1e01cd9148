"""vLLM serves converted models: a plugin, in vLLM's entry point group `vllm.general_plugins`."""


def register() -> None:
    """Make vLLM know the converted models; it calls this in each of its processes, more than once.

    The classes themselves are made where vLLM first needs one, so that no device is touched here.
    """
    from mha2mla_vlm.model.families import FAMILIES
    from mha2mla_vlm.model.modeling import class_names
    from mha2mla_vlm.model.modeling import register as register_configs
    from mha2mla_vlm.serving.vllm.compat import ModelRegistry

    register_configs()
    for family in FAMILIES.values():
        name = class_names(family).model
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
