"""Recipes: read strictly, mirrored by the command line, and those that we ship."""

from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from mha2mla_vlm.errors import InputError
from mha2mla_vlm.training.config import FinetuneConfig, read_recipe
from mha2mla_vlm.training.policies import ALIASES, POLICIES, ROLES, find_policy
from mha2mla_vlm.training.recipes import recipe_names, shipped_path

BAD = {
    "unknown key": ("learning_rates: 0.1", "learning_rates"),
    "text for a number": ("learning_rate: 1e-5", "write 1.0e-5"),
    "text for a whole number": ("batch_size: two", "batch_size = 'two'"),
    "a fraction for a whole number": ("batch_size: 1.5", "batch_size = 1.5"),
    "yes for a number": ("epochs: yes", "epochs = True"),
    "a number for a switch": ("bf16: 1", "bf16 = 1"),
    "unknown policy": ("trains: everything", "attention-and-norms"),
    "share above 1": ("distillation: 1.5", "distillation = 1.5"),
    "weight below 0": ("attention_loss: -1.0", "attention_loss = -1.0"),
    "no steps": ("max_steps: 0", "max_steps = 0"),
    "warm-up and decay over all": ("warmup: 0.7\ndecay: 0.7", "more than all"),
    "unknown format": ("dtype: int8", "bfloat16"),
    "unknown answer to bad records": ("on_bad_record: ignore", "skip"),
    "not a mapping": ("- a\n- b", "key: value"),
    "not YAML": ("a: [", "cannot read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_refused(case, tmp_path):
    text, part = BAD[case]
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=part):
        read_recipe(tmp_path / "recipe.yaml")


def test_what_is_given_goes_over_the_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "learning_rate: 0.001\nepochs: 2\ntraining_arguments: {adam_beta2: 0.9}"
    )
    config = read_recipe(tmp_path / "recipe.yaml", epochs=3.0, seed=None)
    assert (config.learning_rate, config.epochs, config.seed) == (0.001, 3.0, 0)
    assert config.training_arguments == {"adam_beta2": 0.9}
    with pytest.raises(InputError, match=r"missing\.yaml"):
        read_recipe(tmp_path / "missing.yaml")


def test_published_names_of_policies():
    """Section 3 of the reference: v2 to v6."""
    attention = {"query", "rope-key", "down", "up", "output", "original-key-value"}
    expected = {
        "v2": attention | {"norms"},
        "v3": attention - {"output"},
        "v4": attention - {"output", "rope-key", "original-key-value"} | {"norms"},
        "v5": {"down", "up"},
        "v6": {"down"},
    }
    assert {alias: set(find_policy(alias)) for alias in ALIASES} == expected
    assert all(set(roles) <= set(ROLES) for roles in POLICIES.values())


def test_every_plain_field_is_told_on_the_command_line():
    told = {field.name for field in fields(FinetuneConfig) if "help" in field.metadata}
    assert {field.name for field in fields(FinetuneConfig)} - told == {"training_arguments"}


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_sound(name):
    assert read_recipe(name) == read_recipe(shipped_path(name))
    assert read_recipe(name).epochs == 1.0


@pytest.mark.parametrize("name", recipe_names(launch=True))
def test_shipped_configs_of_accelerate_are_sound(name):
    config = load_config_from_file(str(shipped_path(name)))
    assert config.num_processes == 8
    if (stage := name.rpartition("/zero")[2]).isdigit():  # which hold DeepSpeed's own config
        deepspeed = HfDeepSpeedConfig(config.deepspeed_config["deepspeed_config_file"])
        assert deepspeed.get_value("zero_optimization.stage") == int(stage)


def test_each_paper_model_has_its_recipes():
    models = ("llava-1.5-7b", "llama3-llava-next-8b", "qwen2.5-vl-7b", "zoo")
    stages = ("stage1", "stage2", "single_stage")
    assert {f"{model}/{stage}" for model in models for stage in stages} <= set(recipe_names())


def test_a_recipe_that_does_not_ship_is_refused_with_those_that_do(tmp_path, monkeypatch):
    for name in ("zoo/stage3", "zoo/stage1.yaml", "accelerate/ddp"):
        with pytest.raises(InputError, match=r"does not exist; give a YAML file, or one of: .*zoo/stage1"):
            read_recipe(name)
    with pytest.raises(InputError, match=r"there are: .*accelerate/ddp"):
        shipped_path("../config")
    monkeypatch.chdir(tmp_path)
    Path("zoo").mkdir()
    Path("zoo/stage1").write_text("epochs: 7")
    assert read_recipe("zoo/stage1").epochs == 7  # a file goes before
