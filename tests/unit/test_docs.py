"""What the pages of docs/ show is so; `make docs` checks their links."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

import mha2mla_vlm
from mha2mla_vlm.cli.main import USAGE_ERROR, app
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError

DOCS = Path(__file__).parents[2] / "docs"
DATA = (DOCS / "data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="(\S+)"\n(.*?)^```$', DATA, flags=re.MULTILINE | re.DOTALL))
REFUSALS = re.findall(r"^\| `(\{.*\})` \| `+(chats\.jsonl line 1: .*?)`+ \|$", DATA, flags=re.MULTILINE)


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The files that the page on data shows, in the current folder, with their images."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("receipt", "letter"):
        Image.new("RGB", (24, 24)).save(f"images/{name}.png")
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    runpy.run_path("tables.py")


def test_examples_of_data_are_read(shown):
    sources = {"chats.jsonl": 2, "llava.json": 2, "chats.parquet": 1, "dataset": 1}
    chats = {source: load_records(source) for source in sources}
    assert {source: len(records) for source, records in chats.items()} == sources
    first = {str(records[0].messages[0]["content"]) for records in chats.values()}
    assert len(first) == 1  # one chat in all forms


def test_refusals_of_data_read_as_shown(shown):
    assert len(REFUSALS) > 5
    for line, refusal in REFUSALS:
        Path("chats.jsonl").write_text(line + "\n", encoding="utf-8")
        with pytest.raises(InputError) as error:
            load_records("chats.jsonl")
        assert str(error.value) == refusal


def test_the_api_has_all_names_and_the_results_all_tables():
    api = re.findall(r"^::: mha2mla_vlm\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(mha2mla_vlm.__all__) <= set(api)
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    tables = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("*/**/*.md")}
    assert tables <= set(re.findall(r"\]\((\S+?)\)", results))


ROOT = DOCS.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    *ROOT.glob("recipes/*/*.md"),
]
STARTS = (
    r"(?:mha2mla|(?:torchrun|accelerate|python)\b.* -m mha2mla_vlm|\$run) "  # `$run` ends with `finetune`
)


def blocks(text):
    """Lines of a page's shell blocks, those that go on joined."""
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def shown_commands(text):
    """Words of each whole command in the shell blocks of a page."""
    for line in blocks(text):
        if found := re.match(STARTS, line):
            words = shlex.split(re.sub(r"\$\([^)]*\)|\$\w+", "VALUE", line[found.end() :]), comments=True)
            yield (["finetune"] if found[0].startswith("$run") else []) + words


def mentioned_commands(text):
    """Words of what a page names in a line of text, which may be part of a command."""
    for code in re.findall(
        r"`(mha2mla [^`]+|[a-z-]+ --[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    ):
        yield shlex.split(code.removeprefix("mha2mla "))


def command_of(words):
    """The command that words begin with, None if it is none of ours, and the words after its name."""
    command = get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return (None if hasattr(command, "commands") else command), words


def options_of(command):
    """All options of a command."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_the_pages_are_understood(page):
    text = page.read_text(encoding="utf-8")
    for words in shown_commands(text):
        command, rest = command_of(words)
        assert command is not None, words
        command.make_context(words[0], rest).close()  # which parses, and raises if it cannot
    for words in mentioned_commands(text):
        command, rest = command_of(words)
        if command is not None:
            assert {word for word in rest if word.startswith("-")} <= options_of(command) | {"--help"}, words


@pytest.mark.parametrize("line", ["convert m -o out", "convert m --data d -o out --bits 8", "chat"])
def test_a_command_that_is_not_understood_would_be_seen(line):
    words = next(shown_commands(f"```sh\nmha2mla {line}  # a comment\n```\n"))
    command, rest = command_of(words)
    with pytest.raises(USAGE_ERROR):
        command.make_context(words[0], rest)


def test_commands_of_the_pages_are_found():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    shown_names = [words[0] for text in texts for words in shown_commands(text)]
    assert len(shown_names) > 40
    assert set(shown_names) >= {
        "convert",
        "evaluate",
        "finetune",
        "report",
        "generate",
        "chat",
        "bench",
        "task",
        "zoo",
    }
    assert sum(len(list(mentioned_commands(text))) for text in texts) > 20


@pytest.mark.parametrize("page", ["README.md", "docs/convert.md", "docs/data.md"])
def test_options_named_without_a_command_exist(page):
    group = get_command(app)
    known = set().union(*map(options_of, group.commands.values()), options_of(group), {"--help"})
    named = re.findall(r"(?<=[` ])--[a-z][a-z-]*", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 3
    assert set(named) - {"--trust-remote-code"} <= known  # of `transformers serve`


FRONTIER = {
    "original": "original",
    "published": "published",
    "at write": "write, 16 bits",
    "at read": "read, 16 bits",
}
FRONTIER |= {"bits by channel": "auto, bits by channel"}


def rows_of(path):
    return [json.loads(line) for line in (DOCS / path).read_text(encoding="utf-8").splitlines()]


def counted(model, method, budget):
    """The row of the frontier for a model, method and size."""
    wanted = model, FRONTIER[method], budget
    rows = rows_of("frontier/rows.jsonl")
    return next(row for row in rows if (row["model"], row["method"], row["budget"]) == wanted)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "convert.md"], ids=lambda path: path.name)
def test_tables_of_quality_have_the_figures_that_count(page):
    text = page.read_text(encoding="utf-8")
    models = ("qwen2_5_vl", "llava_next", "llava", "qwen3_vl")
    columns = ["cache", "method", *(f"`zoo:{name}`" for name in models)]
    head = f"| {' | '.join(columns)} |\n|---|---|---|---|---|---|\n"
    lines = text.split(head)[1].split("\n\n")[0].splitlines()
    assert len(lines) > 5
    words = {"write": "at write", "default": "at read", "read": "at read", "mixed": "bits by channel"}
    method = None
    for line in lines:
        share, title, *cells = (cell.strip(" *`") for cell in line.strip("|").split("|"))
        if title != "the same":
            method = words.get(re.split(r"[ ,]+", title.strip("`"))[-1], title)
        for model, cell in zip(models, cells, strict=True):
            row = counted(model, method, float(share.rstrip("%")) / 100)
            loss = "" if method == "original" else f", {row['kl']:.4f}"
            assert cell == f"{row['exact_match']:.1%}{loss}", line
