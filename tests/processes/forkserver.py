"""Commands in forks of one process that has imported everything: a second each, instead of many to import.

Requests come as lines of JSON on standard input, answers go as lines to standard output; `forks.py` asks.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import resource
import runpy
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
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if request["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"],) * 2)
    if request["plain"]:
        header, none = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert not ctypes.CDLL(None).capset(header, none)
    name = signal.Signals[request["signal"]]
    if request["seconds"] is not None:
        threading.Timer(request["seconds"], os.kill, (os.getpid(), name)).start()
    return watch(request, name)


def watch(request, name):
    """Signal this process at its moment; returns a list of the number of events so far."""
    after, below, renamed, seen = request["after"], request["below"], request["renamed"], [0]
    begun = [after is None]

    def counts(event, arguments):
        if renamed is not None:
            return event == "os.rename" and str(arguments[1]).endswith(renamed)
        return any(below in str(argument) for argument in arguments)

    def hook(event, arguments):
        """An audit hook."""
        if not event.startswith(EVENTS):
            return
        if begun[0] and counts(event, arguments):
            seen[0] += 1
            if seen[0] == request["event"]:
                os.kill(os.getpid(), name)
        begun[0] = begun[0] or str(arguments[0]).endswith(after)

    sys.addaudithook(hook)
    return seen


def run(request):
    """In the fork: the command, or the script; never returns."""
    seen, code, script = prepare(request), 0, request["script"]
    sys.argv = [script or "mha2mla", *request["arguments"]]
    try:
        main() if script is None else runpy.run_path(script, run_name="__main__")
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


def group_environment(rank, count, port):
    """What `torch.distributed.run` tells one of its processes."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    group = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    agent = {"TORCHELASTIC_RUN_ID": port, "TORCHELASTIC_MAX_RESTARTS": 0}
    return {name: str(value) for name, value in (local | group | agent).items()}


def run_group(request):
    """Run several processes that work together; the first code that is not 0 ends the others, as there."""
    count, environment, left, first = request["processes"], request["environment"], set(), 0
    for rank in range(count):
        told = environment | group_environment(rank, count, request["port"])
        if not (process := os.fork()):
            run(request | {"environment": told})
        left.add(process)
    while left:
        process, status = os.waitpid(-1, 0)
        left.discard(process)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code
            for other in left:
                os.kill(other, signal.SIGTERM)
    return {"code": first}


def answer(request):
    """Run a command, or go on with one that was stopped or end it; what came of it."""
    if request.get("processes") is not None:
        return run_group(request)
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
    for module in (*(f"mha2mla_vlm.{name}" for name in MODULES), *sys.argv[1:]):
        importlib.import_module(module)
    register()
    for part in ("modeling", "processing"):
        importlib.import_module(f"transformers.models.llava.{part}_llava")
    AutoProcessor.from_pretrained  # noqa: B018 (imported when it is looked at)
    if importlib.util.find_spec("matplotlib"):
        importlib.import_module("matplotlib.backends.backend_svg")
        importlib.import_module("matplotlib.pyplot")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)
