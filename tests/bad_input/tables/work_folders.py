"""The folder of an interrupted conversion, and what else stands where a result is to go."""

import json

from cases import CONVERT, Case, text

RESUMED = f"{CONVERT} --resume"
PROGRESS = "out.partial/progress.json"


def progress(**values):
    return json.dumps({"done": 1, "notes": {}, "settings": {}} | values)


STATES = {
    "empty": ("", "not the work folder"),
    "broken": ("{", "not the work folder"),
    "a list": ("[]", "not the work folder"),
    "a number": ("7", "not the work folder"),
    "of nothing": ("{}", "not the work folder"),
    "not text": (b"\xff\xfe", "not the work folder"),
    "deep nesting": ("[" * 100_000, "not the work folder"),
    "a number of thousands of digits": ('{"done": ' + "9" * 10_000 + "}", "not the work folder"),
    "settings that are text": (progress(settings="x"), "not the work folder"),
    "settings that are a list": (progress(settings=[]), "not the work folder"),
    "other settings": (progress(settings={"model": "other"}), "begun with another"),
    "no notes": (progress(notes=None), "not the work folder"),
    "notes that are text": (progress(notes="x"), "not the work folder"),
    "done that is text": (progress(done="many"), "not the work folder"),
    "done below 0": (progress(done=-1), "not the work folder"),
    "done that is nothing": (progress(done=None), "not the work folder"),
    "done with fractions": (progress(done=1.5), "not the work folder"),
}
CASES = {
    **{
        name: Case(command=RESUMED, change=text(PROGRESS, content), named=named)
        for name, (content, named) in STATES.items()
    },
    "not resumed": Case(command=CONVERT, change=text(PROGRESS, progress()), named="--resume"),
    "of something else": Case(
        command=RESUMED, change=text("out.partial/mine.txt", "mine"), named="not the work folder"
    ),
    "a file": Case(command=RESUMED, change=text("out.partial", "mine"), named="out.partial"),
    "an output that is full": Case(
        command=CONVERT, change=text("out/mine.txt", "mine"), named="not an empty folder"
    ),
    "an output that is a file": Case(
        command=CONVERT, change=text("out", "mine"), named="not an empty folder"
    ),
    "an output that is a loop": Case(
        command=CONVERT, change=lambda files: (files / "out").symlink_to("out"), named="out"
    ),
    "a spill that is a file": Case(command=f"{CONVERT} --spill ranks.pth", named="--spill"),
    "a spill under a file": Case(command=f"{CONVERT} --spill ranks.pth/states", named="--spill"),
    "a spill of a long name": Case(command=f"{CONVERT} --spill {'x' * 300}", named="--spill"),
}
