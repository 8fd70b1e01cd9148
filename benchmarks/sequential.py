"""Does sequential calibration pay? Factors of each layer from what it sees above the converted ones.

    python benchmarks/sequential.py            # all zoo models, 10 minutes on two cores

Both ways convert to the same sizes with the same pairs. Calibration: 128 chats about training scans.
Measured: 100 other chats about training scans, for this is a choice. Prints a Markdown table.
"""

from typing import Any

import torch

from mha2mla_vlm import ConversionConfig, load, load_processor, make_profile
from mha2mla_vlm.calibration import LayerStats, layer_usage, observed_attention, query_weights, visual_mask
from mha2mla_vlm.conversion import plan
from mha2mla_vlm.data import encode_with_labels
from mha2mla_vlm.demo import zoo_records
from mha2mla_vlm.probe import Probe, swapped
from mha2mla_vlm.zoo import ZOO_NAMES

BUDGETS = (0.375, 0.25, 0.1875)


@torch.no_grad()
def usage_above(profile: Any, probe: Probe, converted: dict[int, Any], layer: int) -> LayerStats:
    """What a layer sees when the layers in `converted` are in place."""
    stats, masks = LayerStats(), [visual_mask(batch, profile.visual).long() for batch in profile.batches]
    for number, (batch, mask) in enumerate(zip(profile.batches, masks, strict=True)):

        def observe(index: int, *inputs: Any, batch: Any = batch, mask: Any = mask) -> None:
            if index == layer:
                for name, tokens in layer_usage(*inputs, mask, query_weights(batch, mask)).items():
                    stats.add(name, tokens)

        with (
            swapped(profile.model, converted, probe.modality[number]),
            observed_attention(profile.model, observe),
        ):
            profile.model.model.language_model(**probe.inputs[number])
    return stats


def main() -> None:
    """Print the table."""
    print("| | budget | one pass over the original | sequential |\n|---|---|---|---|")
    for name in ZOO_NAMES:
        model, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
        profile = make_profile(model, processor, zoo_records(name, split="train", count=128, seed=1))
        calibration = Probe(model, profile.batches, profile.visual)
        records = zoo_records(name, split="train", count=100, seed=77)
        batches = [encode_with_labels(processor, [record], profile.visual) for record in records]
        probe = Probe(model, batches, profile.visual)
        one_pass = profile.stats
        for budget in BUDGETS:
            config = ConversionConfig(budget=budget)
            profile.stats = one_pass
            mla = profile.allot(plan(model.config, config), config)
            plain = {index: profile.layer(index, mla) for index in range(profile.sizes.layers)}
            sequential = {0: plain[0]}
            for index in range(1, profile.sizes.layers):
                found = usage_above(profile, calibration, sequential, index)
                profile.stats = [*one_pass[:index], found, *one_pass[index + 1 :]]
                sequential[index] = profile.layer(index, mla)
            losses = f"{probe.loss(plain):.4f} | {probe.loss(sequential):.4f}"
            print(f"| `zoo:{name}` | {budget:.4g} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
