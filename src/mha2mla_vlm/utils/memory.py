"""What Linux reports about this process's memory."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Memory in use, files mapped into it included; None where Linux does not report it."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that has been in use."""
    return _status("VmHWM")


def forget_peak() -> bool:
    """Let the peak start anew from what is in use now; whether that could be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
