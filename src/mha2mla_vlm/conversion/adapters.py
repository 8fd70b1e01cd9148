"""Adapters of an original model (peft), merged into its weights before it is converted."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mha2mla_vlm.errors import InputError, first_line, need
from mha2mla_vlm.model.checkpoint import load, load_config, load_processor, resolve, save
from mha2mla_vlm.model.origin import shared_name, stated_by
from mha2mla_vlm.utils.distributed import process_index, wait_for_all
from mha2mla_vlm.utils.folders import check_output, discard
from mha2mla_vlm.utils.progress import status
from mha2mla_vlm.utils.remote import away_from

logger = logging.getLogger(__name__)


class Merged(NamedTuple):
    """Where a model lies that is to be converted; if an adapter was merged into it, what both are."""

    name: str
    source: dict[str, str] | None


@contextlib.contextmanager
def merged(name: str, adapter: str | None, output: Path, *, resume: bool) -> Iterator[Merged]:
    """Within the context, a model with its adapter merged in is in the folder `OUTPUT.merged`.

    It is removed at the end, but kept if anything fails, for `resume`. Without an adapter it is the model
    `name` itself. Merging holds the whole model in memory. Raises `InputError` if the adapter does not fit.
    """
    if adapter is None:
        yield Merged(name, None)
        return
    path = check_output(output)  # which is claimed
    folder = path.with_name(path.name + ".merged")
    if process_index() == 0 and not (resume and folder.exists()):
        save(merge(name, adapter), load_processor(name), folder)
    wait_for_all()
    yield Merged(str(folder), known_source(name, adapter))
    if process_index() == 0:
        discard(folder, path)


def known_source(name: str, adapter: str) -> dict[str, str]:
    """What a model card says of a model and the adapter merged into it: both names, the model's licence."""
    stated = stated_by(resolve(name), load_config(name))
    return stated | {"merged_into": shared_name(name), "adapter": shared_name(adapter)}


def merge(name: str, adapter: str) -> Any:
    """A model with an adapter's changes in its weights; raises `InputError` if the adapter does not fit."""
    need("peft", "train", "merging an adapter")
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    logger.info("merging %s into %s", adapter, name)
    if away := away_from(adapter):  # peft asks the hub even for what is in its cache
        raise InputError(f"the adapter {adapter} is no folder here, and {away}")
    try:
        original = load(name)
        with status(f"reading {adapter}"):
            adapted = PeftModel.from_pretrained(original, adapter)
            given = load_peft_weights(adapter, device="cpu")
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot merge the adapter {adapter} into {name}: {first_line(error)}") from None
    if wrong := sorted(given.keys() ^ get_peft_model_state_dict(adapted).keys()):
        raise InputError(f"the adapter {adapter} is not one of {name}; they differ in {', '.join(wrong[:3])}")
    with status(f"merging {adapter}"):
        return adapted.merge_and_unload(safe_merge=True)
