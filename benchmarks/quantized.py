"""What a quantised latent cache costs: quality on the zoo models, bytes, and the memory of a step.

    python benchmarks/quantized.py     # ten minutes on two cores; hqq and optimum-quanto for rows of theirs

Quality: each chat's prompt fills the cache, its last answer is then read over it, so that all answer tokens
meet quantised ones. Exact match, and KL to the original's answers, on 128 chats about held-out scans, in
bfloat16. A step: one layer of Qwen2.5-VL-7B's shape (R = 32, d_kv = 64) over 16,384 tokens: the most memory
that it holds beyond the cache, and its time. Rows and a table go to OUT.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from caches import positions
from decode import models_of
from measured import DOCS, write_between
from transformers import Cache, DynamicCache, QuantizedCache
from transformers import cache_utils as transformers_caches

from mha2mla_vlm import ConversionConfig, convert, load, load_processor
from mha2mla_vlm.bench.context import modality_of
from mha2mla_vlm.bench.layers import random_caches, rotary_tables
from mha2mla_vlm.bench.timing import peak_memory
from mha2mla_vlm.data.records import IGNORE_INDEX, Record, encode, encode_with_labels
from mha2mla_vlm.model.cache.latent import LatentCache, cache_bytes
from mha2mla_vlm.model.cache.quantized import quantized_cache
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.utils.compat import cache_argument
from mha2mla_vlm.utils.machine import device_name
from mha2mla_vlm.zoo.chats import zoo_records

OUT = DOCS / "decode"
MARK = "<!-- written by benchmarks/quantized.py -->"
BUDGET = 0.25
CONTEXT = 16384
Make = Callable[[Any], Cache]


def kinds_of_cache() -> dict[str, Make]:
    """Every kind that can be made here, from a language model's config."""
    kinds: dict[str, Make] = {"latent": lambda config: LatentCache()}
    for bits in (8, 4, 2):
        kinds[f"latent, {bits}-bit"] = lambda config, n=bits: quantized_cache(nbits=n)
    for backend, package, widths in (("hqq", "hqq", (8, 4, 2)), ("quanto", "optimum", (4, 2))):
        for bits in widths if find_spec(package) else ():
            # groups of 64 need sizes that 64 divides, which a prompt of any length has not
            options = {"backend": backend, "nbits": bits, "q_group_size": 8}
            kinds[f"{backend}, {bits}-bit"] = lambda config, how=options: QuantizedCache(config=config, **how)
    if hasattr(transformers_caches, "Fp8QuantizedLayer"):
        kinds["fp8"] = lambda config: QuantizedCache("fp8", config)
    return kinds


@torch.no_grad()
def answer_logits(
    model: Any, processor: Any, record: Record, visual: tuple[int, ...], cache: Cache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last answer's tokens over a cache that the prompt filled, and these tokens."""
    last = record.answers()[-1]
    chat = Record(messages=record.messages[: last + 1], images=record.images)
    whole = encode_with_labels(processor, [chat], visual)
    prompt = dict(encode(processor, [record.before(last)], generation_prompt=True))
    length = prompt["input_ids"].shape[1]
    ids, labels = whole["input_ids"][:, length:], whole["labels"][0, length:]
    places = positions(model, whole)
    prompt["position_ids"] = places[..., :length]
    first = model(**prompt, **cache_argument(cache), use_cache=True).logits[:, -1:]
    rest = model(
        input_ids=ids, position_ids=places[..., length:], **cache_argument(cache), use_cache=True
    ).logits
    kept = labels != IGNORE_INDEX
    return torch.cat([first, rest[:, :-1]], dim=1)[0, kept].float(), labels[kept]


class Quality:
    """What a zoo model answers over any cache, beside what the original answers."""

    def __init__(self, name: str, samples: int) -> None:
        self.name, self.processor = f"zoo:{name}", load_processor(f"zoo:{name}")
        original = load(self.name, dtype=torch.float32)
        calibration = zoo_records(name, split="train", samples=128, seed=1)
        self.small = convert(
            original,
            self.processor,
            calibration,
            ConversionConfig(rotate_at="write", budget=BUDGET, latent_bits="16"),
        ).bfloat16()
        self.original = original.bfloat16()
        self.records = zoo_records(name, split="test", samples=samples, seed=0)
        self.expected = [self.log_probs(self.original, record, DynamicCache())[0] for record in self.records]

    def log_probs(self, model: Any, record: Record, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of an answer's tokens, and these."""
        visual = self.small.visual_token_ids
        logits, labels = answer_logits(model, self.processor, record, visual, cache)
        return logits.log_softmax(-1), labels

    def row(self, kind: str, model: Any, make: Make) -> dict[str, Any]:
        """Exact match of last answers, KL to the original, and the cache's bytes for a token."""
        right, divergence, tokens, stored, held = 0, 0.0, 0, 0, 0
        for record, expected in zip(self.records, self.expected, strict=True):
            cache = make(model.config.get_text_config())
            found, labels = self.log_probs(model, record, cache)
            divergence += float((expected.exp() * (expected - found)).sum())
            tokens, right = tokens + len(labels), right + bool((found.argmax(-1) == labels).all())
            stored, held = stored + cache_bytes(cache), held + cache.get_seq_length()
        return {
            "model": self.name,
            "cache": kind,
            "exact_match": right / len(self.records),
            "kl": divergence / tokens,
            "bytes_per_token": stored / held,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """The original, and the converted model over every kind of cache."""
        yield self.row("original", self.original, lambda _: DynamicCache())
        for kind, make in kinds_of_cache().items():
            yield self.row(kind, self.small, make)


@torch.no_grad()
def step_rows() -> Iterator[dict[str, Any]]:
    """Bytes of a large layer's cache, and what a step over it holds besides."""
    _, model = models_of("qwen2.5-vl-7b", 1, 64, torch.device("cpu"), torch.bfloat16)
    module = decoder_layers(model)[0].self_attn
    filled = random_caches(model, CONTEXT, 1)[1].layers[0]
    known = modality_of(CONTEXT, 1, torch.device("cpu"))
    modality = known.extend(TokenModality.from_mask(torch.zeros(1, 1, dtype=torch.bool)))
    hidden = torch.randn(1, 1, model.config.get_text_config().hidden_size).bfloat16()
    tables = rotary_tables(model, hidden, CONTEXT)
    for kind, make in kinds_of_cache().items():
        for _ in range(2):  # the first warms up
            cache = make(model.config.get_text_config())
            cache.update(filled.keys, filled.values, 0)
            size = cache_bytes(cache)
            with peak_memory(torch.device("cpu")) as peak:
                module(
                    hidden_states=hidden,
                    position_embeddings=tables,
                    **cache_argument(cache),
                    token_modality=modality,
                )
        yield {"cache": kind, "bytes": size, "peak_bytes": peak["bytes"]}


def steps_apart() -> list[dict[str, Any]]:
    """`step_rows` in a process that gives back at once what it frees, so that its peak is what is held."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--only-steps"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def table(result: dict[str, Any]) -> str:
    """Both results as Markdown."""
    lines = ["| model | cache | bytes per token | exact match | KL |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        cells = f"{row['bytes_per_token']:,.0f} | {row['exact_match']:.1%} | {row['kl']:.4f}"
        lines.append(f"| `{row['model']}` | {row['cache']} | {cells} |")
    lines += ["", "| cache of a layer | MB | a step holds besides, MB |", "|---|---|---|"]
    for row in result["steps"]:
        lines.append(f"| {row['cache']} | {row['bytes'] / 1e6:.2f} | {(row['peak_bytes'] or 0) / 1e6:.1f} |")
    return "\n".join([f"{result['device']}, {result['date']}", "", *lines, ""])


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=list(ZOO_NAMES), choices=ZOO_NAMES)
    parser.add_argument("--only-steps", action="store_true", help="print the rows of steps as JSON, and stop")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.only_steps:
        print(json.dumps(list(step_rows())))
        return
    result: dict[str, Any] = {"rows": [], "steps": steps_apart()}
    for name in arguments.models:
        for row in Quality(name, arguments.samples).rows():
            result["rows"].append(row)
            print(row, file=sys.stderr)
    result |= {"device": device_name(torch.device("cpu")), "date": datetime.date.today().isoformat()}
    (arguments.output / "quantized.json").write_text(json.dumps(result, indent=1) + "\n")
    write_between(arguments.output / "quantized.md", MARK, table(result))
    print(json.dumps({"output": str(arguments.output / "quantized.json")}))


if __name__ == "__main__":
    main()
