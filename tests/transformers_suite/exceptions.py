"""Tests of transformers that a converted model fails, and why. By family, or for all."""

_STRICT = "loads a folder without some weights; converted models refuse to make up weights"
_BARE = "gives inputs_embeds alone; text and vision factors need to know which tokens are visual"

EXCEPTIONS: dict[str, dict[str, str]] = {
    "all": {
        "test_correct_missing_keys": _STRICT,
        "test_model_weights_reload_no_missing_tied_weights": _STRICT,
        "test_inherits_generation_mixin": "looks for GenerationMixin among direct bases only",
        "test_generate_from_random_inputs_embeds": _BARE,
    },
    "llava": {
        "test_inputs_embeds": _BARE,
        "test_generate_from_inputs_embeds_0_greedy": _BARE,
        "test_generate_from_inputs_embeds_1_beam_search": _BARE,
        "test_generate_from_inputs_embeds_with_static_cache": _BARE,
    },
}
