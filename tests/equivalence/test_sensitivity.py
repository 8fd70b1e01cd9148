"""What gradients predict of a layer's errors is what the model does, where errors are small."""

import itertools

import pytest
import torch
from helpers import answered, original

from mha2mla_vlm.calibration.activations import MemoryStates, advance, answer_states, attending, begin
from mha2mla_vlm.calibration.layer_profile import LayerProfile
from mha2mla_vlm.calibration.sensitivity import begin_gradients, project_errors, sketch_directions
from mha2mla_vlm.config import AttentionSizes, MLAConfig
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import encode_split
from mha2mla_vlm.conversion.sweep import methods
from mha2mla_vlm.conversion.weights import partial_layer
from mha2mla_vlm.evaluation.answers import kl_sum
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import decoder_layers

SKETCHES = 128


def test_sketches_are_the_metric_of_probabilities_on_the_mean():
    logits = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    found = sketch_directions(logits, signs[:, None].expand(-1, 2, -1))
    p = logits.softmax(-1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(torch.einsum("sav,saw->avw", found, found) / len(signs), metric)


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_small_errors_cost_what_is_predicted(family, index):
    model, processor = original(family)
    visual = get_family(model.config.model_type).visual_token_ids(model.config)
    batches = encode_split(model, processor, answered(family), ConversionConfig()).calibration
    states = MemoryStates()
    chats = begin(model, batches, visual, torch.device("cpu"), states, ["original", "changed"])
    layers, sizes = decoder_layers(model), AttentionSizes.of(model.config)
    config = ConversionConfig(qk_rope_head_dim=sizes.head_dim, rope_selection="low", fold=False)
    selection = LayerProfile().selection(config.qk_rope_head_dim, sizes, methods(config))
    mla = MLAConfig(qk_rope_head_dim=config.qk_rope_head_dim)
    changed = partial_layer(layers[index].self_attn, selection, mla.layer(index), 1.0)
    changed.q_proj.weight.data *= 1.02  # all else is as it was
    for number, layer in enumerate(layers):
        advance(layer, number, chats, states, "original")
        with attending(layer, changed if number == index else layer.self_attn):
            advance(layer, number, chats, states, "changed")
    begin_gradients(model, chats, states, "original", sketches=SKETCHES)
    for number in reversed(range(index, len(layers))):
        found = project_errors(layers[number], number, chats, states, "original", [changed])
    predicted = found[0].square().sum(-1) / (2 * SKETCHES)

    def log_probs(stream, number):
        hidden = states[stream, len(layers), number]
        norm = model.model.language_model.norm
        return model.lm_head(answer_states(chats[number], hidden, norm)).double().log_softmax(-1)

    with torch.no_grad():
        measured = [
            float(kl_sum(log_probs("changed", n), log_probs("original", n))) for n in range(len(chats))
        ]
    assert predicted.tolist() == pytest.approx(measured, rel=0.5)
    assert float(predicted.sum()) == pytest.approx(sum(measured), rel=0.2)
    assert all(parameter.grad is None for parameter in model.parameters())
