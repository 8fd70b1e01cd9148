"""What a latent cache in few bits costs: quality on the zoo models, bytes, and the memory of a step.

    python benchmarks/quantized.py     # ten minutes on two cores; hqq and optimum-quanto for rows of theirs

Quality: each chat's prompt fills the cache, its last answer is then read over it, so that all answer tokens
meet quantised ones. Exact match, and KL to the original's answers, on 128 pictures of held-out scans, in
bfloat16. A step: one layer of Qwen2.5-VL-7B's shape (R = 32, d_kv = 64) over 16,384 tokens: the most memory
that it holds beyond the cache, and its time. Rows and a table go to OUT.
"""

import argparse
import copy
import datetime
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from decode import models_of
from transformers import Cache, DynamicCache, QuantizedCache
from transformers import cache_utils as transformers_caches

from mha2mla_vlm import ConversionConfig, convert, load, load_processor
from mha2mla_vlm.bench.layers import modality_of, random_caches
from mha2mla_vlm.bench.models import device_name
from mha2mla_vlm.bench.timing import peak_memory
from mha2mla_vlm.cache import LatentCache, TokenModality, cache_bytes
from mha2mla_vlm.data import Record, encode, encode_with_labels
from mha2mla_vlm.demo import zoo_records
from mha2mla_vlm.modeling import decoder_layers
from mha2mla_vlm.quantized_cache import quantized_cache
from mha2mla_vlm.zoo import ZOO_NAMES

OUT = Path(__file__).parents[1] / "docs" / "decode"
BUDGET = 0.25
CONTEXT = 16384
Make = Callable[[Any], Cache]


def kinds_of_cache() -> dict[str, Make]:
    """Every kind that can be made here, from a language model's config."""
    kinds: dict[str, Make] = {"latent": lambda config: LatentCache()}
    for bits in (8, 4, 2):
        kinds[f"latent, {bits} bits"] = lambda config, n=bits: quantized_cache(nbits=n)
    for backend, package, widths in (("hqq", "hqq", (8, 4, 2)), ("quanto", "optimum", (4, 2))):
        for bits in widths if find_spec(package) else ():
            kinds[f"{backend}, {bits} bits"] = lambda config, b=backend, n=bits: QuantizedCache(
                b, config, nbits=n
            )
    if hasattr(transformers_caches, "Fp8QuantizedLayer"):
        kinds["fp8"] = lambda config: QuantizedCache("fp8", config)
    return kinds


def answer_logits(
    model: Any, processor: Any, record: Record, cache: Cache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last answer's tokens over a cache that the prompt filled, and these tokens."""
    last = record.answers[-1]
    chat = Record(messages=record.messages[: last + 1], images=record.images)
    whole = encode_with_labels(processor, [chat], model.config_ids)
    prompt = dict(encode(processor, [record.before(last)], generation_prompt=True))
    length = prompt["input_ids"].shape[1]
    ids, labels = whole["input_ids"][:, length:], whole["labels"][0, length:]
    first = model(**prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
    mask = torch.ones(1, length + ids.shape[1], dtype=torch.long)
    rest = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    kept = labels != -100
    return torch.cat([first, rest[:, :-1]], dim=1)[0, kept].float(), labels[kept]


@torch.no_grad()
def quality(
    model: Any, processor: Any, records: list[Record], make: Make, expected: list[Any]
) -> dict[str, Any]:
    """Exact match, KL to `expected` log-probabilities, which are found if empty, and bytes a token."""
    right, divergence, tokens, stored, held = 0, 0.0, 0, 0, 0
    fresh = not expected
    for index, record in enumerate(records):
        cache = make(model.config.get_text_config())
        logits, labels = answer_logits(model, processor, record, cache)
        log_probs = logits.log_softmax(-1)
        if fresh:
            expected.append(log_probs)
        divergence += float((expected[index].exp() * (expected[index] - log_probs)).sum())
        tokens, right = tokens + len(labels), right + bool((logits.argmax(-1) == labels).all())
        stored, held = stored + cache_bytes(cache), held + cache.get_seq_length()
    return {"exact_match": right / len(records), "kl": divergence / tokens, "bytes_per_token": stored / held}


def zoo_rows(name: str, pictures: int) -> list[dict[str, Any]]:
    """Quality of every kind of cache on a zoo model."""
    original, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
    calibration = zoo_records(name, split="train", count=128, seed=1)
    small = convert(original, processor, calibration, ConversionConfig(budget=BUDGET))
    models = [model.bfloat16() for model in (original, small)]
    for model in models:
        model.config_ids = small.visual_token_ids
    held_out = zoo_records(name, split="test", count=pictures, seed=0)
    expected: list[Any] = []
    rows = [
        {"cache": "original", **quality(models[0], processor, held_out, lambda _: DynamicCache(), expected)}
    ]
    for kind, make in kinds_of_cache().items():
        rows.append({"cache": kind, **quality(models[1], processor, held_out, make, expected)})
        print(name, rows[-1], file=sys.stderr)
    return [{"model": f"zoo:{name}", **row} for row in rows]


@torch.no_grad()
def step_rows() -> list[dict[str, Any]]:
    """Bytes, memory and time of a step of one large layer."""
    _, model = models_of("qwen2.5-vl-7b", 1, 64, torch.device("cpu"), torch.bfloat16)
    module = decoder_layers(model)[0].self_attn
    filled = random_caches(model, CONTEXT, 1)[1]
    known = modality_of(CONTEXT, 1, torch.device("cpu"))
    modality = known.extend(TokenModality.from_mask(torch.zeros(1, 1, dtype=torch.bool)))
    hidden = torch.randn(1, 1, model.config.get_text_config().hidden_size).bfloat16()
    tables = model.model.language_model.rotary_emb(hidden, torch.full((3, 1, 1), CONTEXT))
    rows = []
    for kind, make in kinds_of_cache().items():
        cache = make(model.config.get_text_config())
        cache.update(filled.layers[0].keys, filled.layers[0].values, 0)

        def step(cache: Cache = cache) -> None:
            module(
                hidden_states=hidden,
                position_embeddings=tables,
                past_key_values=cache,
                token_modality=modality,
            )

        own = copy.deepcopy(cache)
        module(hidden_states=hidden, position_embeddings=tables, past_key_values=own, token_modality=modality)
        size = cache_bytes(cache)
        with peak_memory(torch.device("cpu")) as peak:
            step()
        rows.append({"cache": kind, "bytes": size, "peak_bytes": peak["bytes"]})
        print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=list(ZOO_NAMES), choices=ZOO_NAMES)
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    arguments = parser.parse_args()
    steps = step_rows()
    rows = [row for name in arguments.models for row in zoo_rows(name, arguments.pictures)]
    result = {
        "rows": rows,
        "steps": steps,
        "device": device_name(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    (arguments.output / "quantized.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"output": str(arguments.output / "quantized.json")}))


if __name__ == "__main__":
    main()
