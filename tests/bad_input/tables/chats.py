"""Files of chats, in each form that is read."""

import json

from cases import CONVERT, EVALUATE, FINETUNE, Case, pipe, text

QUESTION = {"role": "user", "content": "?"}
ANSWER = {"role": "assistant", "content": "7"}


def chat(*messages, **more):
    return json.dumps({"messages": list(messages), **more})


def llava(*turns, **more):
    return json.dumps([{"conversations": list(turns), **more}])


UNANSWERED = f"{chat(QUESTION)}\n" * 9
ASKED = {"from": "human", "value": "?"}
DEEP = "[" * 100_000
LINES = {
    "empty": ("", "no records"),
    "spaces": ("  \n \n", "no records"),
    "broken": ('{"messages": [', "broken JSON"),
    "broken after a good one": (chat(QUESTION, ANSWER) + "\n{", "line 2"),
    "a number": ("7", "neither `messages` nor `conversations`"),
    "text": ('"hello"', "neither `messages` nor `conversations`"),
    "nothing": ("null", "neither `messages` nor `conversations`"),
    "an object of other keys": ('{"prompt": "?"}', "neither `messages` nor `conversations`"),
    "messages of nothing": ('{"messages": null}', "neither `messages` nor `conversations`"),
    "no messages": (chat(), "no messages"),
    "messages that are text": ('{"messages": "?"}', "no messages"),
    "messages that are an object": ('{"messages": {"role": "user"}}', "no messages"),
    "a message that is text": (chat("?"), "unknown role"),
    "a message that is nothing": ('{"messages": [null]}', "unknown role"),
    "a message without a role": (chat({"content": "?"}), "unknown role"),
    "an unknown role": (chat({"role": "tool", "content": "?"}), "unknown role 'tool'"),
    "a role that is a list": (chat({"role": ["user"], "content": "?"}), "unknown role"),
    "a role that is an object": (chat({"role": {"user": 1}, "content": "?"}), "unknown role"),
    "a role of thousands of letters": (chat({"role": "u" * 10_000, "content": "?"}), "unknown role"),
    "no content": (chat({"role": "user"}), "content must be"),
    "content that is a number": (chat({"role": "user", "content": 7}), "content must be"),
    "content that is an object": (chat({"role": "user", "content": {}}), "content must be"),
    "a part that is text": (chat({"role": "user", "content": ["?"]}), "content must be"),
    "an unknown part": (chat({"role": "user", "content": [{"type": "audio"}]}), "audio"),
    "a part without a type": (chat({"role": "user", "content": [{}]}), "known types"),
    "a part of a list type": (chat({"role": "user", "content": [{"type": []}]}), "known types"),
    "a text of nothing": (chat({"role": "user", "content": [{"type": "text"}]}), "known types"),
    "a text that is a number": (
        chat({"role": "user", "content": [{"type": "text", "text": 7}]}),
        "known types",
    ),
    "a part of thousands of letters": (
        chat({"role": "user", "content": [{"type": "x" * 10_000}]}),
        "known types",
    ),
    "an answer first": (chat(ANSWER, QUESTION), "begins with an answer"),
    "an answer after a system text": (
        chat({"role": "system", "content": "Read."}, ANSWER),
        "begins with an answer",
    ),
    "a kind that is a number": (chat(QUESTION, ANSWER | {"kind": 3}), "`kind` must be text"),
    "half a surrogate pair": (chat({"role": "user", "content": "\ud800"}, ANSWER), "surrogate"),
    "half a surrogate pair in an answer": (chat(QUESTION, ANSWER | {"content": "\udfff"}), "surrogate"),
    "half a surrogate pair in a kind": (chat(QUESTION, ANSWER | {"kind": "\udfff"}), "surrogate"),
    "numbers of thousands of digits": ('{"messages": ' + "9" * 10_000 + "}", "broken JSON"),
    "deep nesting": ('{"messages": ' + DEEP, "broken JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
    "UTF-16": (chat(QUESTION, ANSWER).encode("utf-16"), "line 1"),
    "an image": (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1"),
    "zero bytes": (b"\x00" * 100, "line 1"),
    "a placeholder without an image": (
        chat({"role": "user", "content": [{"type": "image"}]}, ANSWER),
        "0 image(s) for 1",
    ),
    "an image without a placeholder": (
        chat(QUESTION, ANSWER, images=["images/000000-0.png"]),
        "1 image(s) for 0",
    ),
    "images that are text": (chat(QUESTION, ANSWER, images="a.png"), "`images` must be"),
    "images that are an object": (chat(QUESTION, ANSWER, images={"a": 1}), "`images` must be"),
    "an image that is a number": (chat(QUESTION, ANSWER, images=[7]), "`images` must be"),
    "an image of nothing": (chat(QUESTION, ANSWER, images=[None]), "`images` must be"),
    "an image without a path": (chat(QUESTION, ANSWER, images=[{"url": "x"}]), "`images` must be"),
    "an image whose path is a list": (chat(QUESTION, ANSWER, images=[{"path": []}]), "`images` must be"),
}
LISTS = {
    "a list that does not end": ("[" + chat(QUESTION, ANSWER), "broken JSON after record 0"),
    "a list without commas": (
        f"[{chat(QUESTION, ANSWER)} {chat(QUESTION, ANSWER)}]",
        "broken JSON after record 1",
    ),
    "a list of numbers": ("[1, 2]", "neither `messages` nor `conversations`"),
    "a list of lists": ("[[]]", "neither `messages` nor `conversations`"),
    "a list of nothing": ("[]", "no records"),
    "a list that nests without end": (DEEP, "broken JSON"),
    "a list that is not UTF-8": (b'["\xff"]', "not UTF-8"),
    "turns that are text": ('[{"conversations": "?"}]', "`conversations` must be"),
    "turns of text": (llava("?"), "`conversations` must be"),
    "no turns": (llava(), "no messages"),
    "a speaker that is unknown": (llava({"from": "dog", "value": "?"}), "unknown role 'dog'"),
    "a speaker that is a list": (llava({"from": [], "value": "?"}), "unknown role"),
    "a value that is a number": (llava({"from": "human", "value": 7}), "`value` must be text"),
    "a value of nothing": (llava({"from": "human"}), "`value` must be text"),
    "an image for no placeholder": (llava(ASKED, image="a.png"), "1 image(s) for 0"),
    "an image that is an object": (llava(ASKED, image={"a": 1}), "`images` must be"),
    "an image that is true": (llava(ASKED, image=True), "`images` must be"),
}
NAMES = {
    "a name that is too long": "x" * 300 + ".png",
    "a path that is too long": "x/" * 3000 + "a.png",
    "a zero byte in a name": "a\0.png",
    "a folder": "images",
    "a loop": "loop.png",
    "half a surrogate pair": "\ud800.png",
    "an empty name": "",
}


def with_image(name):
    """A chat about the file of that name."""
    return chat({"role": "user", "content": [{"type": "image"}]}, ANSWER, images=[name])


def looped(folder):
    text("data/chats.jsonl", with_image("loop.png"))(folder)
    (folder / "data" / "loop.png").symlink_to("loop.png")


CASES = {
    **{
        name: Case(command=EVALUATE, change=text("data/chats.jsonl", content), named=named)
        for name, (content, named) in (LINES | LISTS).items()
    },
    **{
        f"image: {name}": Case(
            command=EVALUATE, change=text("data/chats.jsonl", with_image(file)), named="image"
        )
        for name, file in NAMES.items()
    },
    "image: a link to itself": Case(command=EVALUATE, change=looped, named="loop.png"),
    "a pipe": Case(command="evaluate small --data pipe.jsonl", change=pipe("pipe.jsonl"), named="pipe.jsonl"),
    "a device": Case(command="evaluate small --data /dev/zero", named="/dev/zero"),
    "a folder of nothing": Case(
        command="evaluate small --data none", change=lambda folder: (folder / "none").mkdir(), named="none"
    ),
    "parquet that is none": Case(
        command="evaluate small --data a.parquet", change=text("a.parquet", "PAR1 not"), named="a.parquet"
    ),
    "a folder of parquet that is none": Case(
        command="evaluate small --data tables", change=text("tables/a.parquet", b""), named="tables"
    ),
    "a saved dataset that is none": Case(
        command="evaluate small --data saved", change=text("saved/dataset_info.json", "{}"), named="saved"
    ),
    "a saved dictionary that is none": Case(
        command="evaluate small --data saved", change=text("saved/dataset_dict.json", "7"), named="saved"
    ),
    "a name that is too long": Case(command=f"evaluate small --data {'x' * 300}", named="x" * 30),
    "a zero byte in a name": Case(command="evaluate small --data", more=("a\0b",), named="data"),
    "an empty name": Case(command="evaluate small --data", more=("",), named="data"),
    "training on questions": Case(
        command=FINETUNE,
        change=text("data/chats.jsonl", UNANSWERED),
        named="no assistant message",
    ),
    "training on one chat": Case(
        command=FINETUNE, change=text("data/chats.jsonl", chat(QUESTION, ANSWER)), named="1 of 1 chat(s)"
    ),
    "training on chats that are all too long": Case(
        command=f"{FINETUNE} --max-length 4", named="longer than 4 tokens"
    ),
    "converting on one chat": Case(
        command=CONVERT, change=text("data/chats.jsonl", chat(QUESTION, ANSWER)), named="1 record(s)"
    ),
    "converting on questions": Case(
        command=CONVERT,
        change=text("data/chats.jsonl", UNANSWERED),
        named="no assistant message",
    ),
    "evaluating questions": Case(
        command=EVALUATE,
        change=text("data/chats.jsonl", UNANSWERED),
        named="no assistant messages",
    ),
}
