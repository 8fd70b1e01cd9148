"""What trains, by the role that a parameter has.

The published names v2 to v6 are aliases (arXiv 2601.11464, its code).
"""

from mha2mla_vlm.errors import InputError, shown
from mha2mla_vlm.model.families.base import TEXT_MODELS

_TEXT = rf"(?:{'|'.join(TEXT_MODELS)})\."
_LAYER = _TEXT + r"layers\.\d+\."
ROLES = {
    "query": _LAYER + r"self_attn\.q_proj\.",
    "rope-key": _LAYER + r"self_attn\.k_rope_proj\.",
    "down": _LAYER + r"self_attn\.kv_a_proj\.",
    "up": _LAYER + r"self_attn\.kv_b_proj\.",
    "original-key-value": _LAYER + r"self_attn\.[kv]_proj\.",  # not converted, or with normed keys
    "output": _LAYER + r"self_attn\.o_proj\.",
    "mlp": _LAYER + r"mlp\.",
    "linear-attention": _LAYER + r"linear_attn\.",  # of layers that are not converted
    "norms": _TEXT + r"(layers\.\d+\.(\w+layernorm|self_attn\.[qk]_norm)|norm)\.",
}
_KEYS_VALUES = ("rope-key", "down", "up", "original-key-value")
_ATTENTION = ("query", *_KEYS_VALUES, "output")
POLICIES: dict[str, tuple[str, ...]] = {
    "attention-and-norms": (*_ATTENTION, "norms"),
    "attention": _ATTENTION,
    "attention-but-output": ("query", *_KEYS_VALUES),
    "unroped-attention-and-norms": ("query", "down", "up", "norms"),
    "keys-and-values": _KEYS_VALUES,
    "factors": ("down", "up"),
    "down-factors": ("down",),
    "layers": (*_ATTENTION, "mlp", "linear-attention", "norms"),
}
ALIASES = {
    "v2": "attention-and-norms",
    "v3": "attention-but-output",
    "v4": "unroped-attention-and-norms",
    "v5": "factors",
    "v6": "down-factors",
}


def find_policy(name: str) -> tuple[str, ...]:
    """Roles that train under a policy or its published alias; raises `InputError` if it is not known."""
    roles = POLICIES.get(ALIASES.get(name, name))
    if roles is None:
        aliases = ", ".join(f"{alias} = {policy}" for alias, policy in ALIASES.items())
        raise InputError(f"unknown policy {shown(name)}; known: {', '.join(POLICIES)} ({aliases})")
    return roles
