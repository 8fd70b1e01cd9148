"""What converting the large models with layers of several kinds saves, by their true shapes, without weights.

    python benchmarks/hybrid_shapes.py        # a minute, writes docs/scale/hybrid.md

Bytes are counted as `convert --dry-run` counts them, of configs; time and memory, for which a dry run
converts one layer, are not here.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.plan import plan
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.cache.state import state_bytes_per_row
from mha2mla_vlm.model.offload import empty_model

OUT = Path(__file__).parents[1] / "docs" / "scale" / "hybrid.md"
SHARE = 0.125
CONTEXTS = (16_384, 131_072)
GEMMA4: dict[str, Any] = {
    "global_head_dim": 512,
    "head_dim": 256,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # config class, and sizes of the language model
    "Qwen3.5-27B": (
        "Qwen3_5Config",
        {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 64,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 48,
            "vocab_size": 248320,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
            },
        },
    ),
    "Gemma 3 27B": (
        "Gemma3Config",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "vocab_size": 262208,
        },
    ),
    "Gemma 4 12B": (
        "Gemma4UnifiedConfig",
        GEMMA4
        | {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
        },
    ),
    "Gemma 4 26B-A4B": (
        "Gemma4Config",
        GEMMA4
        | {
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
    ),
    "Gemma 4 31B": (
        "Gemma4Config",
        GEMMA4
        | {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
        },
    ),
}


def row(name: str) -> str:
    """One line of the table."""
    kind, text = SHAPES[name]
    config = getattr(transformers, kind)(text_config=text)
    sizes, settings = AttentionSizes.of(config), ConversionConfig(budget=SHARE, latent_bits="16")
    plan(config, settings)  # raises for what cannot be converted
    with torch.device("meta"):
        language = empty_model(config).model.get_decoder()
    weights = 2 * sum(value.numel() for value in language.state_dict().values())
    before, kept = bytes_per_token(config), state_bytes_per_row(config)
    wholes = [(before * tokens + kept) / 1e9 for tokens in CONTEXTS]
    smaller = [(SHARE * before * tokens + kept) / 1e9 for tokens in CONTEXTS]
    cells = [name, f"{len(sizes.growing)} of {sizes.layers}"]
    cells += [f"{sizes.kv_heads} x {sizes.head_dim}, {sizes.rotary_dim} rotated", f"{weights / 1e9:.1f}"]
    cells += [f"{before:,}", f"{int(SHARE * before):,}", f"{kept / 1e6:.0f}"]
    cells += [f"{a:.2f} to {b:.2f}" for a, b in zip(wholes, smaller, strict=True)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the table."""
    heads = [
        "model",
        "layers converted",
        "KV heads x dims",
        "language model, GB",
        "bytes a token",
        "at 12.5%",
    ]
    heads += ["MB a chat in other layers", *(f"GB at {tokens:,} tokens" for tokens in CONTEXTS)]
    lines = ["# Large models with layers of several kinds", "", "`python benchmarks/hybrid_shapes.py`", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, SHAPES)]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
