"""What the pages of docs/ show is so; `make docs` checks their links."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

import mha2mla_vlm
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
