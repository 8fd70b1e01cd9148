"""One conversion shared by processes, each on a core of its own: are the bytes the same, and how fast is it?

    python benchmarks/processes.py                     # 3 layers of 512 dims, random weights
    python benchmarks/processes.py --processes 1 2 --rounds 2 --budget 0.25

Numbers of processes take turns, so that a machine that is shared is so for all. Each process has one thread
and, by `taskset`, one core. Files are compared by sha256. "CPU" is the time of the process that took most of
it, which says what a machine that does nothing else would take, less waiting; starting is in both.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scale

SHAPE = "qwen2.5-vl-small"


def converted(folder: Path, processes: int, options: list[str], port: int) -> dict[str, Any]:
    """Convert the checkpoint in a folder by so many processes; seconds, and the sha256 of every file."""
    shutil.rmtree(folder / "small", ignore_errors=True)
    program = [
        sys.executable,
        "-m",
        "mha2mla_vlm",
        "convert",
        "model",
        "--data",
        "chats.jsonl",
        "-o",
        "small",
    ]
    program += options
    start, started = time.perf_counter(), []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:  # what torchrun sets
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "processes"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pinned = ["taskset", "-c", str(rank), *program]
        with (folder / f"log-{rank}.txt").open("w") as log:
            out = subprocess.DEVNULL if rank else (folder / "out.txt").open("w")
            given = {"cwd": folder, "env": environment, "stdout": out, "stderr": log}
            started.append(subprocess.Popen(pinned, **given))
    ends = [os.wait4(process.pid, 0) for process in started]
    if any(status for _, status, _ in ends):
        sys.exit((folder / "log-0.txt").read_text()[-2000:])
    result = json.loads((folder / "out.txt").read_text().splitlines()[-1])
    files = sorted(path for path in (folder / "small").rglob("*") if path.is_file())
    return {
        "processes": processes,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": max(use.ru_utime + use.ru_stime for _, _, use in ends),
        "peak_bytes": max(use.ru_maxrss for _, _, use in ends) * 1024,
        "phases": result["seconds"],
        "kl": result["kl"],
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def main() -> None:
    """Convert by turns, compare, print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chats", type=int, default=scale.CHATS, help="of 512 tokens")
    parser.add_argument("--budget", type=float, help="else R = 32, d_kv = 64 in every layer")
    parser.add_argument("--port", type=int, default=29517)
    given = parser.parse_args()
    options = scale.SIZES if given.budget is None else ["--budget", str(given.budget)]
    folder = Path(tempfile.mkdtemp(prefix="processes-"))
    try:
        (folder / "model").mkdir()
        processor = scale.write_checkpoint(SHAPE, None, folder / "model")
        scale.write_chats(SHAPE, processor, folder, given.chats)
        expected: dict[str, str] | None = None
        for _ in range(given.rounds):
            for processes in given.processes:
                run = converted(folder, processes, options, given.port)
                files = run.pop("files")
                expected = expected or files
                differ = sorted(name for name in expected | files if expected.get(name) != files.get(name))
                print(json.dumps({**run, "files": len(files), "differ": differ}), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
