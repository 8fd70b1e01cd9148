"""The C++ kernels of this folder, built with the machine's compiler when they are first needed.

Libraries are kept in the user's cache folder (`XDG_CACHE_HOME`), under a name that their source, compiler
and processor decide. They need Linux and g++.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The library of `name.cpp`, built if it has to be; None, with the reason in the log, if it cannot be."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++"))), None)
    if compiler is None or platform.system() != "Linux":
        logger.info("no CPU kernel %s: it needs Linux and a C++ compiler", name)
        return None
    source = FOLDER / f"{name}.cpp"
    path = _cache_folder() / f"{name}-{_fingerprint(compiler, source)}.so"
    try:
        if not path.exists():
            logger.info("building the CPU kernel, once: %s", path)
            _build(compiler, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("no CPU kernel %s, decoding is slower: %s", name, reason)
        return None


def processor() -> str:
    """What identifies the processor's instructions: on x86-64 the line of flags."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _fingerprint(compiler: str, source: Path) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    parts = (
        source.read_bytes(),
        *(header.read_bytes() for header in sorted(FOLDER.glob("cpu_*.h"))),
        version,
        processor().encode(),
        " ".join(FLAGS).encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "mha2mla_vlm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="mha2mla_vlm-"))
    return folder


def _build(compiler: str, source: Path, path: Path) -> None:
    """Compile to a temporary file beside `path`, then rename it.

    OpenMP is not linked: its functions are those that PyTorch has loaded, so that both share threads.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, check=True, text=True)
        linked.rename(path)
