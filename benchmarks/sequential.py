"""Does sequential calibration pay? Factors of each layer from what it sees above the converted ones.

    python benchmarks/sequential.py            # all zoo models, 10 minutes on two cores

Both ways convert to the same sizes with the same pairs. Calibration: 128 chats about training scans.
Measured: 100 other chats about training scans, for this is a choice. Prints a Markdown table.
"""

from dataclasses import replace

import torch

from mha2mla_vlm import ConversionConfig, load, load_processor, make_profile
from mha2mla_vlm.attention import MLAAttention
from mha2mla_vlm.config import MLAConfig
from mha2mla_vlm.conversion import plan
from mha2mla_vlm.data import encode_with_labels
from mha2mla_vlm.demo import zoo_records
from mha2mla_vlm.measuring import measure_layer
from mha2mla_vlm.modeling import decoder_layers
from mha2mla_vlm.probe import Probe
from mha2mla_vlm.profile import Profile
from mha2mla_vlm.streams import Key, advance, attending, begin
from mha2mla_vlm.zoo import ZOO_NAMES

BUDGETS = (0.375, 0.25, 0.1875)
STREAM = "calibration"


def sequential_layers(profile: Profile, mla: MLAConfig) -> dict[int, MLAAttention]:
    """Every layer converted by what it sees when those below it are."""
    states: dict[Key, torch.Tensor] = {}
    chats = begin(profile.model, profile.batches, profile.visual, torch.device("cpu"), states, [STREAM])
    known, made = list(profile.layers), {}
    for index, layer in enumerate(decoder_layers(profile.model)):
        options = {"total": len(chats), "moments": True}
        found = measure_layer(layer, chats, dict(states), STREAM, profile.config, **options)
        profile.layers[index] = replace(known[index], stats=found.stats)
        made[index] = profile.layer(index, mla)
        with attending(layer, made[index]):
            advance(layer, chats, states, STREAM)
    profile.layers = known
    return made


def main() -> None:
    """Print the table."""
    print("| | budget | one pass over the original | sequential |\n|---|---|---|---|")
    for name in ZOO_NAMES:
        model, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
        profile = make_profile(model, processor, zoo_records(name, split="train", count=128, seed=1))
        records = zoo_records(name, split="train", count=100, seed=77)
        batches = [encode_with_labels(processor, [record], profile.visual) for record in records]
        probe = Probe(model, batches, profile.visual)
        for budget in BUDGETS:
            config = ConversionConfig(budget=budget)
            mla = profile.allot(plan(model.config, config), config)
            plain = {index: profile.layer(index, mla) for index in range(profile.sizes.layers)}
            sequential = sequential_layers(profile, mla)
            losses = f"{probe.loss(plain):.4f} | {probe.loss(sequential):.4f}"
            print(f"| `zoo:{name}` | {budget:.4g} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
