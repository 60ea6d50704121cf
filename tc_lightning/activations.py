"""How much memory a step keeps for backward, and how many steps fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    import resource
except ImportError:  # Windows
    resource = None

MARGIN = 0.1  # of the device's memory stays free


@contextlib.contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Within it, counts the bytes that autograd keeps for backward, each storage once; parameters, which are there anyway, not."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def room(device: torch.device) -> int:
    """Bytes that a training step may take beyond the largest one so far, less the margin; 0 where this cannot be told."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device)
        return int(free + ours - torch.cuda.max_memory_allocated(device) - MARGIN * total)
    if device.type == "cpu":
        return _room_of_the_process()
    return 0


def _room_of_the_process() -> int:
    memory, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if resource is None or not memory.is_file():
        return 0
    read = {name: int(value.split()[0]) * 1024 for name, value in _lines(memory, ("MemAvailable", "MemTotal"))}
    now = {name: int(value.split()[0]) * 1024 for name, value in _lines(status, ("VmRSS", "VmHWM"))}
    return int(read["MemAvailable"] - (now["VmHWM"] - now["VmRSS"]) - MARGIN * read["MemTotal"])


def _lines(file: Path, names: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [line.partition(":")[::2] for line in file.read_text().splitlines()]
    return [(name, value) for name, value in pairs if name in names]
