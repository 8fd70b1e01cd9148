"""Load checkpoints as users of transformers do, and write what they say; `test_alone.py` starts it.

It does so in two forks: `alone`, where the package cannot be imported, and `with` it. Where it is started
are a folder for each checkpoint, and `inputs.pt`, all inputs; `said FORK.pt` is what each said, or its error.
"""

import importlib
import importlib.abc
import os
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

PACKAGE = "mha2mla_vlm"
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


class Absent(importlib.abc.MetaPathFinder):
    """Finds that the package is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def said_by(folder, inputs, again):
    """Logits, tokens and classes of the checkpoint in a folder, which is then saved `again`."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    out = model.generate(**inputs, **OPTIONS)
    cache = out.cache if hasattr(out, "cache") else out.past_key_values
    model.save_pretrained(again)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    model.model.language_model.layers[0].self_attn.decode_backend = "cpp"
    try:
        model.generate(**inputs, max_new_tokens=2)
        kernels = "taken"
    except ValueError as error:
        kernels = str(error)
    return {
        "logits": logits,
        "tokens": out.sequences,
        "decoded": torch.stack(out.logits),
        "cache": type(cache).__name__,
        "module": type(model).__module__,
        "inner": type(inner).__name__,
        "processor": type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__,
        "kernels": kernels,
    }


def card_example(folder):
    """What the example of a model card answers, with its folder beside."""
    (code,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    return names["answer"]


def run(how):
    """In a fork: all that is asked."""
    given, again = torch.load("inputs.pt", weights_only=True), Path(f"again {how}")
    if how == "alone":
        sys.meta_path.insert(0, Absent())
    else:  # whose code is tested elsewhere
        given = {name: given[name] for name in ("newer", "llava")}
    said = {name: said_by(name, inputs, again / name) for name, inputs in given.items()}
    said["example"] = card_example("llava")
    said["imported"] = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    torch.save(said, f"said {how}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        importlib.import_module(f"transformers.models.{name}.processing_{name}")
    forks = []
    for how in ("alone", "with"):
        if not (fork := os.fork()):
            run(how)
            sys.stdout.flush()
            os._exit(0)
        forks.append(fork)
    codes = [os.waitpid(fork, 0)[1] for fork in forks]
    sys.exit(any(codes))
