"""What the README says to type runs."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert code.count("samples=64") == 1
    names = {}
    exec(compile(code.replace("samples=64", "samples=12"), "README.md", "exec"), names)
    assert names["small"].mla_config.kl["factorization"] < 0.5
    assert (tmp_path / "small" / "modeling_mha2mla.py").is_file()
    assert re.fullmatch(r"[0-9 ]+", re.search(r"text='([^']*)'", capsys.readouterr().out)[1])


def test_every_command_of_the_readme_exists():
    from typer.main import get_command

    from mha2mla_vlm.cli.main import app

    group = get_command(app)
    used = re.findall(r"^mha2mla ((?:zoo )?[a-z-]+)(.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(used) >= 6
    for name, rest in used:
        command = group
        for part in name.split():
            command = command.commands[part]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", rest)) <= known, name
