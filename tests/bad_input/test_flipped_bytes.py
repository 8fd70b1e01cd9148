"""One byte of a model's folder is wrong: the folder is used as it is, or refused in one line."""

import random

import pytest
from cases import copied, text
from helpers import run_command

FLIPS = 20  # for each seed
COMMANDS = ("inspect sharded", "generate sharded --prompt Read. --max-new-tokens 1")
PLACES = (
    "config.json",
    "model.safetensors.index.json",
    "header",
    "body",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


def flipped(rng, folder, place):
    """Change one byte, and say which."""
    name = "model-00001-of-00002.safetensors" if place in ("header", "body") else place
    content = bytearray((folder / name).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    first, last = {"header": (0, header), "body": (header, len(content))}.get(place, (0, len(content)))
    at = rng.randrange(first, last)
    before, content[at] = content[at], content[at] ^ rng.randrange(1, 256)
    text(name, bytes(content))(folder)
    return f"{name}: byte {at}, {before} to {content[at]}"


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_byte_is_harmless_or_one_line(monkeypatch, capsys, workspace, tmp_path, seed):
    rng, refused = random.Random(seed), 0
    for number in range(FLIPS):
        place, command = PLACES[number % len(PLACES)], COMMANDS[number % 3 == 0]
        folder = copied(workspace, tmp_path / str(number))
        what = flipped(rng, folder / "sharded", place)
        monkeypatch.chdir(folder)
        code, out, err = run_command(monkeypatch, capsys, *command.split())
        assert code in (0, 2), (what, err)
        assert "Traceback" not in err, (what, err)
        if code == 2:
            refused += 1
            lines = [line for line in err.splitlines() if line.strip()]
            assert out == "", what
            assert len(lines) == 1, (what, err)
            assert lines[0].startswith("error: "), (what, err)
    assert refused
