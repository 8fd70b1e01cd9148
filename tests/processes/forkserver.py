"""Commands in forks of one process that has imported everything: a second each, instead of many to import.

Requests come as lines of JSON on standard input, answers go as lines to standard output; `forks.py` asks.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch
from transformers import AutoProcessor

from mha2mla_vlm.cli.main import main
from mha2mla_vlm.model.modeling import register

MODULES = ("conversion.on_disk", "conversion.estimate", "conversion.adapters", "conversion.import_published")
MODULES += ("training.run", "demo", "evaluation.answers", "evaluation.lmms_eval.task", "data.sources")
MODULES += ("report.make", "bench.models", "bench.report", "zoo.recipe")
EVENTS = ("open", "os.", "shutil.", "tempfile.")


def prepare(request):
    """In the fork: its folder, its output, the largest file it may write, and the moment at which it ends."""
    os.chdir(request["folder"])
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if request["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"],) * 2)
    if request["plain"]:
        header, none = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert not ctypes.CDLL(None).capset(header, none)
    name = signal.Signals[request["signal"]]
    if request["seconds"] is not None:
        threading.Timer(request["seconds"], os.kill, (os.getpid(), name)).start()
    after, below, seen = request["after"], request["below"], [0]
    begun = [after is None]

    def hook(event, arguments):
        """An audit hook."""
        if not event.startswith(EVENTS):
            return
        if begun[0] and any(below in str(argument) for argument in arguments):
            seen[0] += 1
            if seen[0] == request["event"]:
                os.kill(os.getpid(), name)
        begun[0] = begun[0] or str(arguments[0]).endswith(after)

    sys.addaudithook(hook)
    return seen


def run(request):
    """In the fork: the command; never returns."""
    seen, code = prepare(request), 0
    sys.argv = ["mha2mla", *request["arguments"]]
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # as Python ends with it
            code = 120
    Path(request["count"]).write_text(str(seen[0]))
    os._exit(code)


def answer(request):
    """Run a command, or go on with one that was stopped or end it; what came of it."""
    if "stopped" in request:
        process = request["stopped"]
        os.kill(process, signal.Signals[request["signal"]])
    elif not (process := os.fork()):
        run(request)
    _, status = os.waitpid(process, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"stopped": process}
    return {"code": os.waitstatus_to_exitcode(status)}


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
    for module in MODULES:
        importlib.import_module(f"mha2mla_vlm.{module}")
    register()
    for part in ("modeling", "processing"):
        importlib.import_module(f"transformers.models.llava.{part}_llava")
    AutoProcessor.from_pretrained  # noqa: B018 (imported when it is looked at)
    if importlib.util.find_spec("matplotlib"):
        importlib.import_module("matplotlib.backends.backend_svg")
        importlib.import_module("matplotlib.pyplot")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)
