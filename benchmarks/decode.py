"""A decoding step of attention at the shapes of the 7B models, original against converted, no checkpoint.

    python benchmarks/decode.py                                # all shapes, d_kv 64 and 32
    python benchmarks/decode.py --shape llava-1.5-7b --d-kv 32 --contexts 1024 16384
    python benchmarks/decode.py --estimate                     # nothing is run: OUT/estimate.md, see there

Layers have random weights and caches random numbers, of the sizes that conversion with R = 32 gives; MLPs
are left out. Layers take their turn, so that caches come from memory as in a whole model. Columns are
those of `mha2mla bench`: `attention` from queries to the heads' outputs, against the fastest way that
PyTorch has for the original; `layer` with all projections and the writing of the cache. Rows go to
OUT/SHAPE-D_KV.json, with --cache-bits to OUT/SHAPE-D_KV-BITSbit.json, and a table of all that are there to
OUT/README.md.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import estimate
import torch
from shapes import SHAPES, models_of

from mha2mla_vlm.bench.layers import random_caches, time_attention, time_layers
from mha2mla_vlm.bench.models import byte_counts, compared, prefill
from mha2mla_vlm.bench.report import as_ratio, rows_table
from mha2mla_vlm.model.cache.quantization import BITS
from mha2mla_vlm.utils.machine import device_name
from mha2mla_vlm.utils.progress import console

OUT = Path(__file__).parents[1] / "docs" / "decode"
GPU = OUT.parent / "gpu"  # what was measured on one, beside which estimates stand
ROPE_DIM = 32


def measure(arguments: argparse.Namespace, shape: str, d_kv: int) -> dict[str, Any]:
    """All rows of a shape."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    heads = SHAPES[shape][1]["num_key_value_heads"]
    mla = {"qk_rope_head_dim": ROPE_DIM, "kv_lora_rank": d_kv * heads}
    original, converted = models_of(shape, arguments.layers, mla, device, dtype)
    quantization = None if arguments.cache_bits is None else {"nbits": arguments.cache_bits}
    rows = []
    for batch in arguments.batches:
        for context in arguments.contexts:
            if arguments.layers * batch * context * heads * 128 * 4 > arguments.most_gigabytes * 1e9:
                continue
            dense, latent = random_caches(converted, context, batch, quantization)
            row = {"context": context, "batch": batch} | byte_counts(converted, dense, latent)
            times = time_attention(converted, dense, latent, arguments.seconds)
            row |= compared("attention", times, arguments.layers)
            times = time_layers(original, converted, dense, latent, arguments.seconds)
            row |= compared("layer", times, arguments.layers)
            if arguments.prefill:
                row |= prefill(original, converted, context, batch, arguments.seconds)
            rows.append(row)
            print(shape, d_kv, context, batch, round(row["attention_ratio"], 2), file=sys.stderr)
    return {
        "shape": shape,
        "d_kv": d_kv,
        "cache_bits": arguments.cache_bits,
        "layers": arguments.layers,
        "rows": rows,
        "device": device_name(device),
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(folder: Path) -> str:
    """A Markdown table of all results in a folder."""
    lines = [
        "| shape | d_kv | bits | batch | tokens | MB a layer | cache | attention, ms | attention | layer | "
        "prefill |",
        f"|{11 * '---|'}",
    ]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    for result in results:
        for row in result["rows"]:
            size = row["cache_bytes"] / 1e6 / result["layers"]
            kind = (result["shape"], result["d_kv"], result["cache_bits"] or 16)
            cells = (*kind, row["batch"], f"{row['context']:,}", f"{size:.1f}")
            names = ("cache", "attention", "layer", "prefill")
            ratios = [as_ratio(row.get(f"{name}_ratio")) for name in names]
            seconds = f"{1e3 * row['attention_seconds'][0]:.3g}"
            lines.append(f"| {' | '.join(map(str, [*cells, ratios[0], seconds, *ratios[1:]]))} |")
    where = sorted({f"{r['device']}, {r['dtype']}, torch {r['torch']}, {r['date']}" for r in results})
    return "\n".join([*where, "", *lines, ""])


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--d-kv", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--cache-bits", type=int, choices=BITS, help="of quantised latents")
    parser.add_argument("--prefill", action="store_true", help="time a prompt of up to 4,096 tokens too")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each comparison")
    parser.add_argument("--most-gigabytes", type=float, default=6.0, help="the original's caches at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--estimate", action="store_true", help="what GPUs need at least, with docs/gpu")
    parser.add_argument("-o", "--output", type=Path, help="by default docs/decode, of estimates docs/gpu")
    arguments = parser.parse_args()
    arguments.output = arguments.output or (GPU if arguments.estimate else OUT)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.estimate:
        (arguments.output / "estimate.md").write_text(estimate.page(GPU))
        print(json.dumps({"output": str(arguments.output / "estimate.md")}))
        return
    for shape in arguments.shape:
        for d_kv in arguments.d_kv:
            result = measure(arguments, shape, d_kv)
            console().print(rows_table(result))
            bits = f"-{arguments.cache_bits}bit" if arguments.cache_bits else ""
            path = arguments.output / f"{shape}-{d_kv}{bits}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            (arguments.output / "README.md").write_text(table(arguments.output))
    print(json.dumps({"output": str(arguments.output)}))


if __name__ == "__main__":
    main()
