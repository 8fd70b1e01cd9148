"""Does sequential calibration pay? Factors of each layer from what it sees above the converted ones.

    python benchmarks/sequential.py            # all zoo models, 10 minutes on two cores

Both ways convert to the same sizes with the same pairs. Calibration: 128 chats about training scans.
Measured: 100 other chats about training scans, for this is a choice. Prints a Markdown table.
"""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import BatchFeature

from mha2mla_vlm import ConversionConfig, load, load_processor, make_profile
from mha2mla_vlm.calibration.activations import MemoryStates, advance, attending, begin
from mha2mla_vlm.calibration.layer_profile import LayerProfile, measure_layer
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.allocation import allocated
from mha2mla_vlm.conversion.layer import LayerwiseConversion
from mha2mla_vlm.conversion.plan import plan
from mha2mla_vlm.conversion.profile import Profile
from mha2mla_vlm.conversion.sweep import methods
from mha2mla_vlm.conversion.weights import converted_layer
from mha2mla_vlm.conversion.work import MemoryWork
from mha2mla_vlm.data.records import encode_with_labels
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.utils.progress import Phases
from mha2mla_vlm.zoo.chats import zoo_records

BUDGETS = (0.375, 0.25, 0.1875)
STREAM = "calibration"


class AboveConverted:
    """Chats that go through the converted layers, and what they show about the next one."""

    def __init__(self, model: Any, batches: list[BatchFeature], profile: Profile) -> None:
        self.layers, self.profile, self.states = decoder_layers(model), profile, MemoryStates()
        visual = get_family(model.config.model_type).visual_token_ids(model.config)
        self.chats = begin(model, batches, visual, model.device, self.states, [STREAM])

    def known(self, index: int) -> LayerProfile:
        """The pairs of the profile, and statistics above the converted layers."""
        given = (self.layers[index], index, self.chats, self.states, STREAM, methods(self.profile.config))
        found = measure_layer(*given, total=len(self.chats), moments=True)
        return replace(self.profile.layers[index], stats=found.stats)

    def advance(self, index: int, converted: nn.Module) -> None:
        """Take the chats through a layer that is converted."""
        with attending(self.layers[index], converted):
            advance(self.layers[index], index, self.chats, self.states, STREAM)


def loss(
    model: Any, profile: Profile, mla: MLAConfig, held_out: list[BatchFeature], above: AboveConverted | None
) -> float:
    """KL on held-out chats, with statistics of the profile or of what is `above` the converted layers."""
    layers = decoder_layers(model)
    with Phases("converting layers", len(layers)) as phases:
        known = profile.layers.__getitem__ if above is None else above.known
        given = {"device": model.device, "phases": phases, "known": known, "work": MemoryWork()}
        conversion = LayerwiseConversion(model, profile.config, mla, **given)
        conversion.begin([], held_out)
        for index, layer in enumerate(layers):
            weights = conversion.layer(index).weights
            if above is not None:
                above.advance(index, converted_layer(layer.self_attn, weights, mla.layer(index)))
            phases.advance()
        return conversion.measured().kl["factorization"]


def main() -> None:
    """Print the table."""
    print("| | budget | one pass over the original | sequential |\n|---|---|---|---|")
    for name in ZOO_NAMES:
        model, processor = load(f"zoo:{name}", dtype="float32"), load_processor(f"zoo:{name}")
        visual = get_family(name).visual_token_ids(model.config)
        chosen, others = (
            [encode_with_labels(processor, [record], visual) for record in records]
            for records in (
                zoo_records(name, split="train", samples=128, seed=1),
                zoo_records(name, split="train", samples=100, seed=77),
            )
        )
        records = zoo_records(name, split="train", samples=128, seed=1)
        at_write = ConversionConfig(rotate_at="write", latent_bits="16")
        profile = make_profile(model, processor, records, at_write)
        for budget in BUDGETS:
            config = replace(at_write, budget=budget)
            sizes = AttentionSizes.of(model.config)
            mla = allocated(plan(model.config, config), profile.losses, sizes, config)
            above = AboveConverted(model, chosen, profile)
            plain, sequential = (loss(model, profile, mla, others, way) for way in (None, above))
            print(f"| `zoo:{name}` | {budget:.4g} | {plain:.4f} | {sequential:.4f} |", flush=True)


if __name__ == "__main__":
    main()
