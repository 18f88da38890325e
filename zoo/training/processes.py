"""Several processes, on torch's own engine: torchrun, DDP and FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.components.model import Model
from zoo.errors import UsageError


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this one is."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and reports."""
        return self.rank == 0

    def share(self, rows: int, parts: int) -> list[slice]:
        """The rows of a batch that this process computes, in so many parts."""
        shares = self.count * parts
        if rows < shares:
            raise UsageError(
                f"batch: {rows} sequences, and {self.count} processes compute {parts} parts each"
            )
        edges = [rows * n // shares for n in range(shares + 1)]
        first = self.rank * parts
        return [slice(edges[n], edges[n + 1]) for n in range(first, first + parts)]

    def total(self, value: float) -> float:
        """The sum of all processes' values."""
        if self.count == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self._exact)
        dist.all_reduce(summed)
        return float(summed)

    @property
    def _exact(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def whole(self, value: Tensor) -> Tensor:
        """A number that all processes agree on, where each may hold a part of it."""
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    @contextmanager
    def gradients(self, running: nn.Module, *, last: bool) -> Iterator[None]:
        """Within a step: processes exchange gradients after the last part alone."""
        if self.count == 1 or last:
            _exchange(running, True)
            yield
        elif isinstance(running, nn.parallel.DistributedDataParallel):
            with running.no_sync():
                yield
        else:
            _exchange(running, False)
            yield

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            dist.barrier()


def _exchange(running: Any, now: bool) -> None:
    """Of parameters that are spread: whether gradients are exchanged after a part."""
    if hasattr(running, "set_requires_gradient_sync"):
        running.set_requires_gradient_sync(now)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    Raises:
        UsageError: The device is not here.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    here = device_of(device, local)
    if count == 1 or dist.is_initialized():
        yield Processes(here, rank, count)
        return
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", rank=rank, world_size=count)
    try:
        yield Processes(here, rank, count)
    finally:
        dist.destroy_process_group()


def device_of(name: str, local: int = 0) -> torch.device:
    """The device of a name; `auto` is the best one here.

    Raises:
        UsageError: There is none of that kind, with what to do.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name.startswith("cuda") and not cuda:
        built = torch.backends.cuda.is_built()
        fault = "no GPU is visible to torch" if built else "this torch was built without CUDA"
        raise UsageError(
            f"device cuda: {fault}. Use --device cpu, or install a torch that has CUDA"
        )
    if name == "mps" and not mps:
        raise UsageError("device mps: not on this machine. Use --device cpu")
    if name not in ("cpu", "cuda", "mps") and not name.startswith("cuda:"):
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda or mps")
    return torch.device("cuda", local) if name == "cuda" else torch.device(name)


def spread(model: Model, processes: Processes, shard: str) -> nn.Module:
    """The module that runs: the model itself, or with what exchanges gradients."""
    if processes.count == 1:
        return model
    if shard == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(processes.device.type, (processes.count,))
        for name, module in model.named_modules():
            if name.rpartition(".")[0].endswith("blocks"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    ids: Any = [processes.device.index] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)
