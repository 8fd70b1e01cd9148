"""Long commands that end at any moment: nothing is half-written, what is there stays, and runs resume."""

import itertools
import json
import os
import random
import re

import pytest
from forks import COMMANDS, contents

SEED = int(os.environ.get("MHA2MLA_SEED", "0"))  # of the moments
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
CODES = {"SIGKILL": -9, "SIGTERM": 130, "SIGINT": 130}
EVALUATE = ("evaluate", "small", "--data", "data", "--baseline", "model")
TIMED = {"finetune.json", "training_log.jsonl", "out"}  # with seconds in them; the last is a page
FEW = {"convert": 4, "finetune": 4, "report": 3, "zoo data": 3, "evaluate": 2}
MANY = {name: 12 * count for name, count in FEW.items()} | {"demo": 6, "convert, budget": 24}
BUDGET = ("convert", "model", "--data", "data", "--rotate-at", "write", "--budget", 0.3, "-o")


class Case:
    """A command, what an unbroken run of it makes, and the places it reads and writes."""

    def __init__(self, name, forks, workspace, folder):
        self.name, self.forks, self.workspace, self.folder = name, forks, workspace, folder
        commands = COMMANDS | {"convert, budget": BUDGET}
        self.arguments = EVALUATE if name == "evaluate" else (*commands[name], "out")
        self.place = folder / "whole"
        self.before = contents(workspace)
        ended = self.run()
        assert ended.code == 0, ended.said
        self.events, self.expected, self.said = ended.events, contents(self.place), ended.out

    def run(self, *more, **when):
        """Run it in `place`; events are those of all files that it reads and writes."""
        self.place.mkdir(exist_ok=True)
        for path in self.workspace.iterdir():
            if not (self.place / path.name).exists():
                (self.place / path.name).symlink_to(path)
        ended = self.forks.run(*self.arguments, *more, folder=self.place, **{"below": ""} | when)
        for path in self.workspace.iterdir():
            (self.place / path.name).unlink()
        return ended

    def check(self, signal, **when):
        """End it by a signal at a moment; what is there then, and after it has gone on."""
        self.place = self.folder / f"{signal} {when}"
        ended = self.run(signal=signal, **when)
        if ended.code != 0:  # else it ended before the moment
            self.check_end(signal, ended)
        assert contents(self.workspace) == self.before
        if "out" in {path.name for path in self.place.iterdir()}:  # it ended as it tidied up
            self.check_result()
            return
        begun = self.arguments[0] == "convert" and (self.place / "out.partial").exists()
        again = self.run(*(["--resume"] if begun else []))
        assert again.code == 0, again.said
        tells_seconds = self.arguments[0] in ("convert", "finetune")
        assert again.out == self.said or tells_seconds
        assert [path.name for path in self.place.iterdir()] in (["out"], [])
        self.check_result()
        assert contents(self.workspace) == self.before

    def check_end(self, signal, ended):
        assert ended.code == CODES[signal], ended.said
        assert "Traceback" not in ended.said
        assert not ended.out or json.loads(ended.out)
        left = {path.name for path in self.place.iterdir()}
        ours = {"out", "out.partial", ".out.tmp", ".out.lock"}
        assert left <= (ours if signal == "SIGKILL" else {"out", "out.partial"}), left
        if signal != "SIGKILL" and "out.partial" in left and "out" not in left:
            assert "what is done is kept in" in ended.said

    def check_result(self):
        found = contents(self.place)
        expected = {path: data for path, data in self.expected.items() if path.startswith("out")}
        found = {path: data for path, data in found.items() if path in expected or path.startswith("out/")}
        assert found.keys() == expected.keys()
        wrong = [path for path in found if found[path] != expected[path]]
        assert {path.rpartition("/")[2] for path in wrong} <= TIMED
        for path in wrong:
            assert without_times(path, found[path]) == without_times(path, expected[path])


def without_times(path, data):
    """The rows of a log, a result or a page, without what differs from run to run."""
    if data.startswith(b"<!doctype html>"):
        return re.sub(rb"<td>[\d.]+ m?s</td>", b"", data)
    if path.endswith(".jsonl"):
        rows = [json.loads(line) for line in data.splitlines()]
        return [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in rows]
    result = json.loads(data)
    timed = ("seconds_per_step", "peak_memory_bytes")
    return result | {"result": {k: v for k, v in result["result"].items() if k not in timed}}


@pytest.fixture
def case(request, forks, workspace_for_forks, tmp_path):
    return Case(request.param, forks, workspace_for_forks, tmp_path)


def moments(case, count):
    """Moments of a run, one in each of so many equal parts of its events; printed, to be found again."""
    chosen = random.Random(f"{SEED}/{case.name}")
    edges = [round(part * case.events / count) for part in range(count + 1)]
    found = [chosen.randint(low + 1, high) for low, high in itertools.pairwise(edges)]
    print(f"MHA2MLA_SEED={SEED}: {case.name} ends at events {found} of {case.events}")
    return found


@pytest.mark.parametrize("case", FEW, indirect=True)
def test_a_command_that_ends_at_a_few_moments(case):
    for number, event in enumerate(moments(case, FEW[case.name])):
        case.check(SIGNALS[number % 3], event=event)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, indirect=True)
def test_a_command_that_ends_at_many_moments(case):
    for number, event in enumerate(moments(case, MANY[case.name])):
        case.check(SIGNALS[number % 3], event=event)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, indirect=True)
def test_a_command_that_ends_after_some_seconds(case):
    """Also in the middle of writing a file, and of computing."""
    chosen = random.Random(SEED)
    for number in range(MANY[case.name]):
        case.check(SIGNALS[number % 3], seconds=round(chosen.uniform(0.01, 6), 3))
