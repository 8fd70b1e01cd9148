"""What a model card says, and what it takes from the original's."""

import pytest
from helpers import original, random_mla
from huggingface_hub import ModelCard

from mha2mla_vlm.model.card import model_card
from mha2mla_vlm.model.origin import stated_by
from mha2mla_vlm.model.shipped import zoo_path

FINDINGS = {
    "settings": {},
    "source": {"license": "other", "license_name": "own", "license_link": "https://x.y/z"},
    "calibration_chats": 40,
    "random_chats": 8,
    "held_out_chats": 10,
}


@pytest.fixture(scope="module")
def config():
    """The config of a converted model, measured after two transforms."""
    config = random_mla("llava")[0].config
    config.mla |= {"kl": {"factorization": 0.5, "partial_rope": 0.25}, "original": "org/large"}
    return config


def read(card):
    """A card as the hub reads it."""
    return ModelCard(str(card))


def results(card):
    """Metrics of a card by the chats that they were measured on."""
    return {(each.dataset_type, each.metric_type): each.metric_value for each in card.data.eval_results or ()}


def test_metadata_is_that_of_the_conversion_and_its_source(config):
    card = read(model_card(config, name="me/small", findings=FINDINGS))
    assert card.data.base_model == "org/large"
    assert (card.data.license, card.data.license_name) == ("other", "own")
    assert card.data.license_link == "https://x.y/z"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.model_name == "me/small"
    assert results(card) == {("calibration-chats", "kl_divergence"): 0.5}
    assert "calibrated on 40 chats, of which 8 are random tokens" in card.text
    assert "10 more were held out" in card.text
    assert 'name = "me/small"' in card.text
    assert "stated as `own`" in card.text


@pytest.mark.parametrize(
    ("original", "link"),
    [("org/large", "https://huggingface.co/org/large/blob/main/LICENSE"), ("large", None)],
)
def test_a_licence_beside_the_original_is_linked_to_where_it_can_be(config, original, link):
    config.mla |= {"original": original}
    findings = FINDINGS | {
        "source": {"license": "other", "license_link": "LICENSE", "base_model": "org/first"}
    }
    card = read(model_card(config, name="small", findings=findings))
    assert card.data.license_link == link
    assert card.data.base_model == ("org/large" if link else "org/first")


def test_a_merged_adapter_is_named_beside_the_original(config):
    config.mla |= {"original": None}
    source = {"license": "other", "license_link": "LICENSE", "merged_into": "org/large", "adapter": "me/lora"}
    card = read(model_card(config, name="small", findings=FINDINGS | {"source": source}))
    assert (card.data.base_model, card.data.license) == ("org/large", "other")
    assert card.data.license_link == "https://huggingface.co/org/large/blob/main/LICENSE"
    assert "Converted from `org/large`, after the adapter `me/lora` was merged into it, with" in card.text
    assert "licence the adapter has is not recorded" in card.text
    config.mla |= {"original": "org/large"}
    assert "adapter" not in read(model_card(config, name="small", findings=FINDINGS)).text


def test_what_is_not_known_is_not_said(config):
    config.mla |= {"kl": None, "original": None}
    card = read(model_card(config, name="small"))
    for key in ("license", "license_name", "base_model", "eval_results"):
        assert card.data.get(key) is None, key
    assert "not recorded" in card.text
    assert "Measured was nothing" in card.text


def test_an_evaluation_is_of_the_weights_that_were_measured(config):
    config.mla |= {"kl": {"factorization": 0.5}}
    evaluation = {"exact_match": 0.75, "agreement": 0.5, "kl": 0.125, "answers": 20}
    held_out = {
        ("held-out-chats", "exact_match"): 0.75,
        ("held-out-chats", "agreement"): 0.5,
        ("held-out-chats", "kl_divergence"): 0.125,
    }
    card = read(model_card(config, name="small", findings=FINDINGS, evaluation=evaluation))
    assert results(card) == held_out | {("calibration-chats", "kl_divergence"): 0.5}
    trained = read(model_card(config, name="small", findings=FINDINGS, evaluation=evaluation, trained=True))
    assert results(trained) == held_out
    assert "then trained" in trained.text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nbase_model: org/first\n---\n", {"license": "mit", "base_model": "org/first"}),
        ("---\nlicense: other\nlicense_link: L\n---\n", {"license": "other", "license_link": "L"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\n1: 2\n---\n", {}),
        ("no metadata", {}),
        (None, {}),
    ],
)
def test_the_licence_is_that_of_the_originals_card(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert stated_by(tmp_path, None) == expected


def test_a_config_may_state_the_licence(tmp_path):
    config = original("llava")[0].config
    config.license = "bsd-3-clause"
    assert stated_by(tmp_path, config) == {"license": "bsd-3-clause"}
    assert stated_by(zoo_path("llava"), config) == {"license": "apache-2.0"}
