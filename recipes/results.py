"""What `run.sh` keeps: a line of JSON for each step, all of them in one file, and a table.

python recipes/results.py line STEP SECONDS FILE      # the last line of FILE, with step and seconds
python recipes/results.py above LIMIT FILE KEY        # ends well if the line's KEY is above LIMIT
python recipes/results.py scores FOLDER               # what lmms-eval scored, as one line
python recipes/results.py question FOLDER MODEL       # a request to a server: the first chat of a folder
python recipes/results.py answer SERVER               # its answer, of the response on standard input
python recipes/results.py table OUT                   # OUT/results.jsonl and OUT/results.md
"""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = (  # of a step's line, in the table
    "bytes_per_token", "bytes_per_token_original", "output_bytes", "peak_bytes", "exact_match",
    "baseline_exact_match", "kl", "agreement", "exact_match_before", "kl_before", "steps", "answer", "server",
)  # fmt: skip
RATIOS = ("cache_ratio", "attention_ratio", "layer_ratio", "step_ratio", "prefill_ratio")


def line(step: str, seconds: str, file: str) -> None:
    """Print a step's line of JSON: what its command printed last."""
    printed = Path(file).read_text(encoding="utf-8").strip().splitlines()
    result = json.loads(printed[-1]) if printed else {}
    print(json.dumps({"step": step, "wall_seconds": int(seconds), **result}))


def above(limit: str, file: str, key: str) -> None:
    """End with 1 unless a step's figure is above the limit."""
    sys.exit(json.loads(Path(file).read_text(encoding="utf-8"))[key] <= float(limit))


def scores(folder: str) -> None:
    """Print lmms-eval's scores by task and metric; ends with 1 if it left none."""
    found = sorted(Path(folder).rglob("*_results.json"))
    if not found:
        sys.exit(f"lmms-eval left no results in {folder}")
    results = json.loads(found[-1].read_text(encoding="utf-8"))["results"]
    numbers = {
        task: {
            name: value for name, value in row.items() if isinstance(value, float) and "stderr" not in name
        }
        for task, row in results.items()
    }
    print(json.dumps({"scores": numbers}))


def question(folder: str, model: str) -> None:
    """Print a request for the first answer of the first chat, as OpenAI's API takes it."""
    with (Path(folder) / "chats.jsonl").open(encoding="utf-8") as file:
        chat = json.loads(file.readline())
    images, messages = iter(chat["images"]), []
    for message in chat["messages"]:
        if message["role"] == "assistant":
            break
        parts = [_part(part, Path(folder), images) for part in message["content"]]
        messages.append({"role": message["role"], "content": parts})
    print(json.dumps({"model": model, "messages": messages, "max_tokens": 64, "temperature": 0}))


def _part(part: dict[str, Any], folder: Path, images: Any) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    path = folder / next(images)
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{path.suffix[1:]};base64,{data}"}}


def answer(server: str) -> None:
    """Print what a server answered, of its response on standard input, as a line of JSON."""
    response = json.load(sys.stdin)
    text = response["choices"][0]["message"]["content"]
    print(json.dumps({"server": server, "answer": text, "usage": response.get("usage")}))


def table(out: str) -> None:
    """Write all steps' lines, in the order in which they ended, as JSON lines and as a page."""
    files = sorted(Path(out, "steps").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    text = "".join(f"{json.dumps(result)}\n" for result in results)
    Path(out, "results.jsonl").write_text(text, encoding="utf-8")
    lines = ["| step | minutes | |", "|---|---|---|"]
    lines += [f"| {r['step']} | {r['wall_seconds'] / 60:.1f} | {_cell(r)} |" for r in results]
    Path(out, "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(result: dict[str, Any]) -> str:
    """What of a step's line is for people."""
    kl = result.get("kl")
    steps = kl.items() if isinstance(kl, dict) else ()
    found = [f"KL after {name.replace('_', ' ')} {value:.4f}" for name, value in steps]
    for name in SHOWN:
        value = result.get(name)
        if isinstance(value, float):
            value = f"{value:.4f}"
        elif isinstance(value, int):
            value = f"{value:,}"
        if value is not None and not isinstance(value, dict):
            found.append(f"{name.replace('_', ' ')} {value}")
    for row in result.get("rows", []):
        ratios = [f"{name[:-6]} {row[name]:.2f}" for name in RATIOS if row.get(name) is not None]
        found.append(f"{row['context']:,} tokens, batch {row['batch']}: {', '.join(ratios)}")
    for task, numbers in result.get("scores", {}).items():
        found.append(f"{task} " + ", ".join(f"{name.split(',')[0]} {x:.4g}" for name, x in numbers.items()))
    return "; ".join(found).replace("|", "/").replace("\n", " ")


COMMANDS: dict[str, Callable[..., None]] = {
    "line": line, "above": above, "scores": scores, "question": question, "answer": answer, "table": table,
}  # fmt: skip

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
