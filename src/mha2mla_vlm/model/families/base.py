"""What the library must know of a model family: names, never code."""

from dataclasses import dataclass
from typing import Any

TEXT_MODELS = ("language_model", "text_model")  # what families call the language model


@dataclass(frozen=True, kw_only=True)
class Family:
    """One vision-language architecture of transformers.

    `visual_tokens` are the config fields that hold the ids of tokens that count as visual: the placeholders
    that visual features replace, and the marks around them. `norms` are what attention may hold besides
    projections: norms of each head's queries and keys (QK-norm). `left_layers` are types of layers that stay
    as the original has them. Where it is `gated`, the query projection gives a gate too, a sigmoid of which
    multiplies what attention gives before the output projection. `token_types` is the input that marks visual
    tokens. With `partial_rotary` RoPE may turn only some dims of a head. With `values_of_keys` there may be
    no projection to values, which then are what keys are made of by their norm and RoPE.
    """

    model_type: str  # `config.model_type` of the original model
    model_class: str  # class in `transformers`
    config_class: str  # class in `transformers`
    processor_class: str  # class in `transformers`
    text_model_types: tuple[str, ...]  # language models whose attention is q, k, v, o with RoPE
    visual_tokens: tuple[str, ...]
    licence: str  # what users of converted weights should know
    norms: tuple[str, ...] = ()
    left_layers: tuple[str, ...] = ()
    gated: bool = False
    partial_rotary: bool = False
    values_of_keys: bool = False
    token_types: str = "mm_token_type_ids"

    @property
    def inner_class(self) -> str:
        """Class in `transformers` of what the model is without its language-model head."""
        return self.model_class.removesuffix("ForConditionalGeneration") + "Model"

    @property
    def mla_model_type(self) -> str:
        """`config.model_type` of the converted model."""
        return f"{self.model_type}_mla"

    def visual_token_ids(self, config: Any) -> tuple[int, ...]:
        """Ids of the visual tokens under a model's config."""
        ids = (getattr(config, name, None) for name in self.visual_tokens)
        return tuple(i for i in ids if i is not None)
