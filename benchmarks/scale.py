"""Converts checkpoints of the true shapes of 7B models and larger, with random weights, on this machine.

    python benchmarks/scale.py --shape qwen2.5-vl-7b llava-next-8b llava-1.5-7b     # two hours, 35 GB of disk
    python benchmarks/scale.py --shape qwen2.5-vl-7b --layers 2 --budget 0.125
    python benchmarks/scale.py --shape qwen3-vl-30b-a3b --layers 2 --budget 0.125

For each shape: writes a checkpoint (bfloat16, sharded; the zoo's tokenizer; for the LLaVAs images of fewer
pixels, so that chats have 512 tokens), converts it with 16 such chats by `mha2mla convert` in a process of
its own, and reports the seconds of each phase, the process's own high-water mark of memory, and the disk
used, beside what `--dry-run` predicted. Rows go to OUT/SHAPE.json, a table of all that are there to
OUT/README.md.
"""

import argparse
import datetime
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, PreTrainedConfig, ProcessorMixin

from mha2mla_vlm.data.records import Record, chat_length
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.utils.machine import device_name
from mha2mla_vlm.zoo.architectures import new_model

OUT = Path(__file__).parents[1] / "docs" / "scale"
CHATS, TOKENS, SHARD_BYTES = 16, 512, 4_000_000_000
SIZES = ["--qk-rope-head-dim", "32", "--d-kv", "64"]
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
}
QWEN3: dict[str, Any] = {"num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # family, and sizes of the language model
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "llava-next-8b": (
        "llava_next",
        LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128320},
    ),
    "llava-1.5-7b": (
        "llava",
        LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32064},
    ),
    "qwen2.5-vl-small": (  # for what is to take minutes
        "qwen2_5_vl",
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 4096,
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        QWEN3
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
    ),
    "qwen3-vl-30b-a3b": (
        "qwen3_vl_moe",
        QWEN3
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4}
        | {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
    ),
}
TRUE = list(SHAPES)[:3]
QWEN3_VISION = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
    "num_position_embeddings": 48 * 48, "deepstack_visual_indexes": [8, 16, 24], "patch_size": 16,
}  # fmt: skip
QWEN_VISION: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "window_size": 112,
    },
    "qwen2.5-vl-small": {
        "depth": 2, "hidden_size": 160, "intermediate_size": 640, "num_heads": 2,
        "fullatt_block_indexes": [1], "patch_size": 14, "window_size": 112,
    },
    "qwen3-vl-8b": QWEN3_VISION,
    "qwen3-vl-30b-a3b": QWEN3_VISION,
}  # fmt: skip
IMAGE_SIZE = {"llava_next": 168, "llava": 294}  # of CLIP's own 336


def true_config(shape: str, layers: int | None) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """The zoo model's config and processor with the sizes of the true model."""
    family, sizes = SHAPES[shape]
    zoo_name, kind = family.removesuffix("_moe"), get_family(family)
    model, processor = new_model(zoo_name)
    values = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    values["text_config"] |= sizes | ({"num_hidden_layers": layers} if layers else {})
    values["text_config"] |= {"model_type": kind.text_model_types[0]}
    values["text_config"].pop("layer_types", None)
    values["tie_word_embeddings"] = False
    if shape in QWEN_VISION:
        vision = QWEN_VISION[shape] | {"out_hidden_size": sizes["hidden_size"]}
        sections = [24, 20, 20] if "deepstack_visual_indexes" in vision else [16, 24, 24]
        values["text_config"]["rope_parameters"]["mrope_section"] = sections
        values["vision_config"].pop("model_type")
        values["vision_config"] |= vision
        processor.image_processor.patch_size = vision["patch_size"]
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    else:
        size = IMAGE_SIZE[zoo_name]
        clip = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=size, patch_size=14, projection_dim=768,
        )  # fmt: skip
        values["vision_config"], values["image_seq_length"] = clip.to_dict(), (size // 14) ** 2
        processor.patch_size = 14
        processor.image_processor.size = {"shortest_edge": size}
        processor.image_processor.crop_size = {"height": size, "width": size}
        if zoo_name == "llava_next":
            pinpoints = [[size, size], [size, 2 * size], [2 * size, size]]
            values["image_grid_pinpoints"] = processor.image_processor.image_grid_pinpoints = pinpoints
    return getattr(transformers, kind.config_class)(**values), processor


def write_checkpoint(shape: str, layers: int | None, folder: Path) -> ProcessorMixin:
    """A checkpoint of random weights, a shard at a time."""
    config, processor = true_config(shape, layers)
    config.dtype = torch.bfloat16
    name = get_family(config.model_type).model_class
    config.architectures = [name]
    with torch.device("meta"):
        found = getattr(transformers, name)(config).state_dict()
    shapes = {k: _as_on_the_hub(k, v.shape) for k, v in found.items()}
    shards: list[dict[str, torch.Size]] = [{}]
    for key, size in shapes.items():
        if sum(2 * s.numel() for s in shards[-1].values()) + 2 * size.numel() > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = size
    index = {}
    torch.manual_seed(0)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _random(key, size) for key, size in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        del tensors
        gc.collect()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def _as_on_the_hub(key: str, size: torch.Size) -> torch.Size:
    """The shape that a file of the original has: experts lie the other way round."""
    return torch.Size((size[0], size[2], size[1])) if ".experts." in key and len(size) == 3 else size


def _random(key: str, size: torch.Size) -> torch.Tensor:
    if "norm" in key and key.endswith("weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02)


def write_chats(shape: str, processor: ProcessorMixin, folder: Path, count: int = CHATS) -> list[int]:
    """Chats of `TOKENS` tokens, most of them of an image of noise; returns their lengths."""
    rng = random.Random(0)
    width, height = {"llava_next": (336, 168), "llava": (294, 294)}.get(SHAPES[shape][0], (560, 560))
    rows, lengths = [], []
    for number in range(count):
        image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
        image.save(folder / f"{number}.png")
        words: list[str] = []
        while True:
            row = _chat(folder / f"{number}.png", " ".join(words))
            length = chat_length(processor, Record(messages=row["messages"], images=[image]))
            if length >= TOKENS:
                break
            words += [rng.choice(("row", "column", "digit", "largest"))] * max(1, (TOKENS - length) // 4)
        rows.append(row)
        lengths.append(length)
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lengths


def _chat(image: Path, words: str) -> dict[str, Any]:
    asked = [{"type": "image"}, {"type": "text", "text": f"Which digit? {words}"}]
    answer = [{"type": "text", "text": "7 4 1"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [str(image)]}


def command(folder: Path, budget: float | None, *more: str) -> dict[str, Any]:
    """The result of `mha2mla convert` of the checkpoint, in a process of its own."""
    program = [sys.executable, "-m", "mha2mla_vlm", "convert", str(folder / "model")]
    sizes = SIZES if budget is None else ["--budget", str(budget)]
    options = ["--data", str(folder / "chats.jsonl"), "-o", str(folder / "small"), *sizes, *more]
    done = subprocess.run([*program, *options], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def measure(shape: str, layers: int | None, budget: float | None, folder: Path) -> dict[str, Any]:
    """Write, estimate, convert, compare."""
    (folder / "model").mkdir()
    processor = write_checkpoint(shape, layers, folder / "model")
    lengths = write_chats(shape, processor, folder)
    os.sync()  # or the dry run waits for the disk
    predicted = command(folder, budget, "--dry-run")
    start = time.perf_counter()
    result = command(folder, budget)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (folder / "small").iterdir())
    return {
        "shape": shape,
        "layers": layers or SHAPES[shape][1]["num_hidden_layers"],
        "budget": budget,
        "tokens": sum(lengths) / len(lengths),
        "seconds": seconds,
        "phases": result["seconds"],
        "peak_bytes": result["peak_bytes"],
        "output_bytes": size,
        "predicted": predicted,
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(folder: Path) -> str:
    """All results of a folder as Markdown."""
    lines = [
        "| shape | layers | sizes | minutes | predicted | peak GB | predicted | result GB | predicted "
        "| phases | measured |"
    ]
    lines.append(f"|{11 * '---|'}")
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        predicted, whole = row["predicted"], sum(row["phases"].values())
        shares = ", ".join(f"{name} {share / whole:.0%}" for name, share in row["phases"].items())
        pairs = (
            (row["seconds"] / 60, predicted["seconds"] / 60, ".1f"),
            (row["peak_bytes"] / 1e9, predicted["peak_bytes"] / 1e9, ".2f"),
            (row["output_bytes"] / 1e9, predicted["output_bytes"] / 1e9, ".2f"),
        )
        cells = [f"{value:{form}}" for found, guess, form in pairs for value in (found, guess)]
        sizes = f"budget {row['budget']:g}" if row.get("budget") else "R 32, d_kv 64"
        where = f"{row['date']}, {row['device']}, torch {row['torch'].partition('+')[0]}"
        named = f"{row['shape']} | {row['layers']} | {sizes}"
        lines.append(f"| {named} | {' | '.join(cells)} | {shares} | {where} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=TRUE)
    parser.add_argument("--layers", type=int, help="fewer than the true model has")
    parser.add_argument(
        "--budget", type=float, help="share of the cache, allocated over layers; else R = 32, d_kv = 64"
    )
    parser.add_argument(
        "--work", type=Path, help="where checkpoints go for the time; by default a temporary folder"
    )
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shape:
        if arguments.work is not None:
            arguments.work.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.work))
        try:
            row = measure(shape, arguments.layers, arguments.budget, folder)
        finally:
            shutil.rmtree(folder)
        print(json.dumps(row), file=sys.stderr)
        suffix = f"-{arguments.layers}-layers" if arguments.layers else ""
        suffix += f"-budget-{arguments.budget:g}" if arguments.budget else ""
        (arguments.output / f"{shape}{suffix}.json").write_text(json.dumps(row, indent=1) + "\n")
    (arguments.output / "README.md").write_text(table(arguments.output))
    print(json.dumps({"output": str(arguments.output)}))


if __name__ == "__main__":
    main()
