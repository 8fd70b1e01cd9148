"""Decoding attention over keys rotated at read, at write, and the original's, at the 7B models' shapes.

    python benchmarks/decode_at_read.py                     # all shapes, an eighth of the cache
    python benchmarks/decode_at_read.py --shape qwen2.5-vl-7b --contexts 16384 --dtype float32

Random weights and caches; contexts are text, images (32 by 32 tokens where RoPE is multimodal) and text.
`read R` rotates R dims of a head when they are read, `write` has a quarter of the bytes in rotated keys that
are cached. Ratios are against the fastest way that PyTorch has for the original, timed in turn in the same
run; `made` is `read` with all keys made of latents, without interpolation. Results go to OUT.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, models_of

from mha2mla_vlm.bench.layers import best_dense, random_caches, time_attention
from mha2mla_vlm.bench.models import device_name

OUT = Path(__file__).parents[1] / "docs" / "decode" / "read"
HEAD_DIM = 128


def sizes(shape: str, budget: float) -> dict[str, dict[str, Any]]:
    """Sizes of each mode at a share of the original's 2 * G * D numbers a token."""
    heads = SHAPES[shape][1]["num_key_value_heads"]
    numbers = round(2 * heads * HEAD_DIM * budget)
    rope = max(2, round(numbers / heads / 4) // 2 * 2)
    position = 2 * (3 if "qwen" in shape else 1) / 28  # numbers of two bytes, for one of some 28 layers
    at_read = {"rotate_at": "read", "kv_lora_rank": int(numbers - position)}
    return {
        "write": {"qk_rope_head_dim": rope, "kv_lora_rank": numbers - rope * heads},
        f"read {HEAD_DIM}": {**at_read, "qk_rope_head_dim": HEAD_DIM},
        f"read {HEAD_DIM // 4}": {**at_read, "qk_rope_head_dim": HEAD_DIM // 4},
    }


def measure(given: argparse.Namespace, shape: str) -> list[dict[str, Any]]:
    """Rows of a shape: for each context and mode the seconds of a layer and the ratio to the original."""
    rows = []
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    for context in given.contexts:
        for mode, mla in sizes(shape, given.budget).items():
            _, converted = models_of(shape, given.layers, mla, device, dtype)
            dense, latent = random_caches(converted, context, 1)
            row = {"shape": shape, "context": context, "mode": mode}
            times = time_attention(converted, dense, latent, given.seconds)
            best = best_dense(times)
            row |= {"baseline": best, "original_ms": 1e3 * times[best].median / given.layers}
            row |= {"ms": 1e3 * times["ours"].median / given.layers}
            row |= {"ratio": times[best].median / times["ours"].median}
            if mode.startswith("read"):
                times = time_attention(converted, dense, latent, given.seconds, interpolate=False)
                row["made_ratio"] = times[best].median / times["ours"].median
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of results."""
    where = sorted({f"{r['device']}, {r['dtype']}, torch {r['torch']}, {r['date']}" for r in results})
    lines = [
        "| dtype | shape | tokens | rotated | ms | original, ms | ratio | all keys made |",
        f"|{8 * '---|'}",
    ]
    for result in results:
        for row in result["rows"]:
            made = f"{row['made_ratio']:.2f}" if "made_ratio" in row else "-"
            cells = [result["dtype"], row["shape"], f"{row['context']:,}", row["mode"], f"{row['ms']:.2f}"]
            cells += [f"{row['original_ms']:.2f}", f"{row['ratio']:.2f}", made]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*where, "", *lines, ""])


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--budget", type=float, default=0.125)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each comparison")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for shape in given.shape:
        result = {"rows": measure(given, shape), "device": device_name(torch.device(given.device))}
        result |= {"dtype": given.dtype, "torch": torch.__version__, "budget": given.budget}
        result |= {"date": datetime.date.today().isoformat(), "layers": given.layers}
        (given.output / f"{shape}-{given.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")
    kept = [json.loads(path.read_text()) for path in sorted(given.output.glob("*.json"))]
    (given.output / "README.md").write_text(table(kept))


if __name__ == "__main__":
    main()
