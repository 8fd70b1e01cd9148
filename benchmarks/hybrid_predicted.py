"""KL that a budget is predicted to cost, and what it costs, of very small random hybrid models.

    python benchmarks/hybrid_predicted.py        # two minutes; prints the table of docs/results/hybrid.md

The models are those of `tests/tiny_models.py`: of the true architectures, without training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import answered, original

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.evaluation.answers import evaluate

NAMES, SHARES, MODES = ("qwen3_5", "gemma3", "gemma4"), (0.5, 0.25), ("read", "write")
CALIBRATION, CHATS = 48, 72
PROMPTS = ("image", "two images", "text", "two turns")


def cells(name: str, share: float, mode: str) -> list[str]:
    """Predicted KL, summed over layers, and measured KL of one conversion."""
    model, processor = original(name)
    chats = answered(name, CHATS, PROMPTS)
    config = ConversionConfig(budget=share, rotate_at=mode, latent_bits="16")
    small = convert(model, processor, chats[:CALIBRATION], config)
    found = evaluate(small, processor, chats[CALIBRATION:], baseline=model)
    return [f"{sum(small.mla_config.predicted_kl):.4f}", f"{found['kl']:.4f}"]


def main() -> None:
    """Print the table."""
    heads = [head for mode in MODES for head in (f"predicted, at {mode}", "measured")]
    print("| " + " | ".join(["model, share of the cache", *heads]) + " |")
    print("|" + "---|" * (1 + len(heads)))
    for share in SHARES:
        for name in NAMES:
            row = [cell for mode in MODES for cell in cells(name, share, mode)]
            print("| " + " | ".join([f"`{name}`, {share:.0%}", *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
