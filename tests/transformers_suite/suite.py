"""Test cases of transformers' own for a family, about our converted class instead of the original.

The bar: what passes for the original passes for the converted model. A test that fails for both is
skipped (it needs the hub, say); `exceptions.py` lists the rest, with reasons.
"""

import functools
import importlib
import unittest

import pytest
from transformers.models.auto import modeling_auto

from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modeling import mla_classes, mla_inner_class

# 8, for a test quantises a cache in groups of 8
MLA = {"qk_rope_head_dim": 4, "kv_lora_rank": 8, "modalities": ["text", "vision"]}


def original_case(family):
    """The test case of transformers for a family's model classes."""
    module = importlib.import_module(f"tests.models.{family}.test_modeling_{family}")
    common = importlib.import_module("tests.test_modeling_common")
    mixin = common.ModelTesterMixin
    cases = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, mixin)]
    (case,) = (c for c in cases if issubclass(c, unittest.TestCase) and c.__module__ == module.__name__)
    return case


def converted_case(family, exceptions):
    """The same test case about converted classes; `exceptions` are reasons by the name of the test."""
    original = original_case(family)
    names = [name for name in dir(original) if name.startswith("test_") and callable(getattr(original, name))]
    body = {name: _compared(original, name, exceptions.get(name)) for name in names}
    inner, model = converted_classes(family)
    # by these names the tests know which class has labels and a loss
    config_class = mla_classes(family)[0]
    modeling_auto.MODEL_MAPPING_NAMES[config_class.model_type] = inner.__name__
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config_class.model_type] = model.__name__
    body |= {
        "__module__": __name__,
        "all_model_classes": (inner, model),
        "_get_attention_shape": _latent_shapes,
        "pipeline_model_mapping": {},  # tests of pipelines need the hub
        "setUp": _set_up(original, config_class),
    }
    return type(f"Converted{original.__name__}", (original,), body)


def converted_classes(family):
    """The classes without and with head."""
    _, model_class = mla_classes(family)
    return mla_inner_class(get_family(family)), model_class


def _set_up(original, config_class):
    def set_up(self):
        original.setUp(self)
        _seed()
        tester, self.config_tester.config_class = self.model_tester, config_class
        self.config_tester.inputs_dict["mla"] = MLA
        original_config = tester.get_config

        def get_config(*args, **kwargs):
            values = original_config(*args, **kwargs).to_dict()
            return config_class(**values | {"model_type": config_class.model_type, "mla": MLA})

        tester.get_config = get_config

    return set_up


def _latent_shapes(self, batch, length, config):
    """What the cache holds in place of keys and values, by the hook that upstream's DeepSeek tests use."""
    rank, rope_dim = MLA["kv_lora_rank"], MLA["qk_rope_head_dim"]
    return (batch, 1, length, rank), (batch, config.num_key_value_heads, length, rope_dim)


def _seed():
    """The same inputs in every run: they come from a generator that transformers leaves unseeded."""
    importlib.import_module("tests.test_modeling_common").global_rng.seed(0)
    importlib.import_module("transformers").set_seed(0)


def _compared(original, name, reason):
    test = getattr(original, name)

    @functools.wraps(test)
    def run(self):
        try:
            test(self)
        except (unittest.SkipTest, pytest.skip.Exception):
            raise
        except Exception:
            if not _passes(original, name):
                self.skipTest("fails for the original, too")
            raise

    return pytest.mark.xfail(reason=reason, strict=True)(run) if reason else run


def _passes(case, name):
    result = unittest.TestResult()
    case(name).run(result)
    return result.wasSuccessful()
