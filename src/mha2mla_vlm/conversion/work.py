"""Where a conversion keeps what it needs on its way: in memory, or in a folder (`work_folder`)."""

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from mha2mla_vlm.calibration.activations import MemoryStates, States


class Work(Protocol):
    """Steps `done`, `notes` of what they found, hidden states, tensors under names, and the seconds that
    each phase took.

    `main` says whether this process is the one that writes and shows progress.
    """

    main: bool
    done: int
    notes: dict[str, Any]
    states: States
    seconds: dict[str, float]

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a name."""

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors that were kept."""

    def finished_step(self, *, drop: int | None = None) -> None:
        """One more step is done; the states before layer `drop` are not needed any more."""

    def writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Within the context, `what` is written: where it fails, that is said."""


class MemoryWork:
    """Keeps all in memory, that of the CPU."""

    main = True

    def __init__(self) -> None:
        self.done = 0
        self.notes: dict[str, Any] = {}
        self.states: States = MemoryStates()
        self.seconds: dict[str, float] = {}
        self._kept: dict[str, Mapping[str, torch.Tensor]] = {}

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a name."""
        self._kept[name] = {key: tensor.cpu() for key, tensor in tensors.items()}

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors that were kept."""
        return dict(self._kept[name])

    def finished_step(self, *, drop: int | None = None) -> None:
        """One more step is done."""
        self.done += 1
        if drop is not None:
            self.states.drop(drop)

    def writing(self, _: str) -> contextlib.AbstractContextManager[None]:
        """Nothing is written."""
        return contextlib.nullcontext()
