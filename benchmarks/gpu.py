"""All that a GPU has to show, in one command that needs no network: `make gpu`, or

    PYTHONPATH=src python benchmarks/gpu.py            # 20 minutes on an H200
    PYTHONPATH=src python benchmarks/gpu.py --only tests attention --minutes 5

Steps: `tests` (models and kernels against their specifications, compiled), `attention` (a decoding step of
attention at the 7B shapes over keys rotated at write and at read, by CUDA graphs), `layers` (with projections
and the writing of the cache, as `generate` calls them, and prompts), `convert` (two layers of a 7B shape),
`vllm` (where it is installed). A step that fails says so and the next begins. OUT gets figures, the end of
what each step printed, and README.md with the tables.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "gpu"
LINES = 40  # of what a step printed that are kept
ATTENTION = (
    "benchmarks/decode_at_read.py --dtype bfloat16 --layers 28 --seconds 0.3 --most-gigabytes 20 "
    "--made-up-to 0 --modes write 'read 128' 'read 32' --contexts"
)
COMMANDS = {  # after `python`; those that measure get a folder too
    "tests": [
        "-m pytest -q -n 8 -p no:cacheprovider tests/gpu tests/unit/test_kernels.py "
        "tests/unit/test_rotated_kernel.py tests/unit/test_packed_kernel.py tests/unit/test_pages.py"
    ],
    "attention": [f"{ATTENTION} 1024 4096 16384 65536 131072", f"{ATTENTION} 1024 16384 --batch 32"],
    "layers": [
        "benchmarks/decode.py --seconds 0.3 --most-gigabytes 40 --prefill --batches 1 32 "
        "--contexts 1024 16384 131072"
    ],
    "convert": ["benchmarks/scale.py --shape qwen2.5-vl-7b --layers 2"],
    "vllm": ["-m pytest -q -m vllm tests/serving"],
}


def commands_of(step: str, out: Path) -> list[list[str]]:
    """The commands of a step, whose figures go to OUT/STEP."""
    output = [] if step in ("tests", "vllm") else ["-o", str(out / step)]
    return [[sys.executable, *shlex.split(command), *output] for command in COMMANDS[step]]


def run(commands: list[list[str]], log: Path, minutes: float) -> dict[str, Any]:
    """Run a step's commands, each whatever the others did, and say how they ended."""
    start, codes, environment = time.monotonic(), [], os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with log.open("w") as out:
        for command in commands:
            given = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": subprocess.STDOUT}
            try:
                codes.append(subprocess.run(command, **given, timeout=60 * minutes).returncode)
            except subprocess.TimeoutExpired:
                codes.append(f"stopped after {minutes} minutes")
    lines = log.read_text(errors="replace").splitlines()[-LINES:]
    log.write_text("\n".join(lines) + "\n")
    return {"ended": codes, "seconds": round(time.monotonic() - start), "last": lines[-1] if lines else ""}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none",
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
    }


def page(result: dict[str, Any], out: Path) -> str:
    """The page of a run: the machine, how steps ended, and the tables that they wrote."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = [
        f"Measured by `make gpu`: {machine}.",
        "",
        "| step | ended | seconds | last line |",
        f"|{4 * '---|'}",
    ]
    for name, step in result["steps"].items():
        ended = ", ".join("well" if code == 0 else str(code) for code in step["ended"])
        lines.append(f"| {name} | {ended} | {step['seconds']} | {step['last'].replace('|', '/')[:100]} |")
    for name in result["steps"]:
        table = out / name / "README.md"
        if table.exists():
            lines += ["", f"## {name}", "", table.read_text().strip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, help="steps, in their order")
    parser.add_argument("--minutes", type=float, default=8, help="that a command may take")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use; benchmarks/decode.py and decode_at_read.py measure on a CPU")
    out = given.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "steps": {}}
    for name in given.only or [n for n in COMMANDS if n != "vllm" or importlib.util.find_spec("vllm")]:
        result["steps"][name] = run(commands_of(name, out), out / f"{name}.log", given.minutes)
        print(name, result["steps"][name], file=sys.stderr, flush=True)
        (out / "run.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "README.md").write_text(page(result, out))
    failed = [name for name, step in result["steps"].items() if any(step["ended"])]
    print(json.dumps({"output": str(out), "failed": failed}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
