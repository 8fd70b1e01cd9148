"""What a small cache is worth to a server: vLLM with an original and its conversions, at equal cache memory.

    .venv-vllm/bin/python benchmarks/serving.py     # after `make test-vllm`, which makes that environment
    .venv-vllm/bin/python benchmarks/serving.py --tokens 2048 --kinds original fp8 write-0.25

A kind is the original, the original with vLLM's own cache of 8 bits (fp8), or a conversion: when keys are
rotated, the budget and, if not 16, the bits of latents. All serve the same chats about images, all sent at
once, each answered with the same number of tokens. The memory holds `--tokens` of the original's, fewer than
the requests that run together need, so it must preempt some and compute them again. Runs alternate; a row has
medians. Rows and a table go to OUT.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from mha2mla_vlm import ConversionConfig, bytes_per_token, convert, load, load_processor, save
from mha2mla_vlm.model.checkpoint import load_config, resolve
from mha2mla_vlm.utils.machine import device_name
from mha2mla_vlm.zoo.chats import zoo_records

OUT = Path(__file__).parents[1] / "docs" / "serving"
CALIBRATION = 128
PAGE = 64


def prompts(name: str, processor: Any, count: int) -> list[dict[str, Any]]:
    """The first question of each of some held-out chats, as vLLM takes it."""
    asked = []
    for chat in zoo_records(name, split="test", samples=count, seed=5):
        question = chat.before(chat.answers()[0])
        text = processor.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
        asked.append({"prompt": text, "multi_modal_data": {"image": question.load_images()}})
    return asked


def measure(folder: str, cache_dtype: str, memory: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one model, in this process."""
    from vllm import LLM, SamplingParams

    asked = prompts(options.model, load_processor(folder), options.requests)
    llm = LLM(
        folder,
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=options.running,
        kv_cache_memory_bytes=memory,
        kv_cache_dtype=cache_dtype,
        block_size=PAGE,
        enable_prefix_caching=False,
        disable_log_stats=False,
        enforce_eager=options.eager,
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    llm.generate(asked[:2], sampling, use_tqdm=False)
    start = time.perf_counter()
    found = llm.generate(asked, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "capacity_tokens": cache.num_gpu_blocks * cache.block_size,
        "seconds": seconds,
        "requests_per_second": len(found) / seconds,
        "preemptions": metrics["vllm:num_preemptions"],
        "prompt_tokens": statistics.mean(len(request.prompt_token_ids) for request in found),
    }


def in_process(folder: str, cache_dtype: str, memory: int, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        given = ["--one", folder, cache_dtype, str(memory), result.name]
        subprocess.run([sys.executable, __file__, *arguments, *given], check=True, stdout=sys.stderr)
        return json.load(result)


def converted(name: str, kind: str, folder: Path) -> Path:
    """A zoo model's conversion of some kind."""
    rotate_at, budget, *bits = kind.split("-")
    config = ConversionConfig(
        rotate_at=cast(Any, rotate_at), budget=float(budget), latent_bits=cast(Any, bits[0] if bits else "16")
    )
    model, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
    chats = zoo_records(name, split="train", samples=CALIBRATION, seed=1)
    return save(convert(model, processor, chats, config), processor, folder)


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Alternating runs of all kinds, and what they say."""
    itemsize, kinds = getattr(torch, options.dtype).itemsize, options.kinds
    with tempfile.TemporaryDirectory() as folder:
        original = str(resolve(f"zoo:{options.model}"))
        whole = dict.fromkeys(("original", "fp8"), original)
        folders = {k: whole.get(k) or str(converted(options.model, k, Path(folder, k))) for k in kinds}
        each = {k: bytes_per_token(load_config(path), itemsize=itemsize) for k, path in folders.items()}
        memory = options.tokens * bytes_per_token(load_config(original), itemsize=itemsize)
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind, path in folders.items():
                cache_dtype = "fp8" if kind == "fp8" else "auto"
                runs[kind].append(in_process(path, cache_dtype, memory, arguments))
                print(kind, runs[kind][-1], file=sys.stderr)
    rows = {
        kind: {"bytes_per_token": each[kind] // (itemsize if kind == "fp8" else 1)}
        | {name: statistics.median(run[name] for run in found) for name in found[0]}
        for kind, found in runs.items()
    }
    return {
        "model": options.model,
        "cache_bytes": memory,
        **{name: getattr(options, name) for name in ("requests", "running", "new", "dtype")},
        "rows": rows,
        "device": device_name(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown of all results."""
    lines = [
        "| model | cache | bytes per token | room, tokens | requests a second | preemptions | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in found:
        base = result["rows"]["original"]
        for kind, row in result["rows"].items():
            ratios = [row[k] / base[k] for k in ("capacity_tokens", "requests_per_second")]
            lines.append(
                f"| {result['model']} {kind} | {result['cache_bytes'] / 1e6:.1f} MB "
                f"| {row['bytes_per_token']} | {row['capacity_tokens']:.0f} ({ratios[0]:.2f}) "
                f"| {row['requests_per_second']:.2f} "
                f"({ratios[1]:.2f}) | {row['preemptions']:.0f} | {result['date']}, {result['device']} |"
            )
    return "In brackets the ratio to the original.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2_5_vl", help="name of a zoo model")
    parser.add_argument("--kinds", nargs="+", default=["original", "fp8", "write-0.25", "read-0.0625-mixed"])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the original that memory holds")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--running", type=int, default=48, help="requests that may run together")
    parser.add_argument("--new", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, cache_dtype, memory, result = options.one
        Path(result).write_text(json.dumps(measure(folder, cache_dtype, int(memory), options)))
        return
    found = compare(options, sys.argv[1:])
    OUT.mkdir(exist_ok=True)
    (OUT / f"{options.model}-{options.tokens:05}.json").write_text(json.dumps(found, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))]
    (OUT / "README.md").write_text(table(results))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
