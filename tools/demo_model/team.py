"""Processes of one machine that train one model together: each computes on its own rows, all apply the same update.

One thread in each of two processes gets more done than two threads in one where other programs want the processor too:
threads wait for each other after every operation, processes once in a step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import torch
from torch import Tensor

PATIENCE_S = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """One process's place in a team. All members call the same methods in the same order, ``agree`` before ``average``.

    ``gradients`` [member, parameter] and ``value`` [1] are shared memory.
    """

    rank: int
    size: int
    gradients: Tensor
    value: Tensor
    barrier: Barrier

    def agree(self, value: float) -> float:
        """Return the value that the first member passed.

        Raises:
            threading.BrokenBarrierError: another member didn't come, here as in ``average``.
        """
        if self.rank == 0:
            self.value.fill_(value)
        self.barrier.wait(PATIENCE_S)
        return float(self.value)

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each parameter's gradient by its mean over the members."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch.cat([gradient.flatten() for gradient in gradients], out=self.gradients[self.rank])
        self.barrier.wait(PATIENCE_S)
        means = self.gradients.mean(0).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


@contextmanager
def assembled(size: int, model: torch.nn.Module, work: Callable[[Team], None]) -> Iterator[Team]:
    """Run ``work`` in forked processes, all but the first member's, while the caller does the first one's.

    Each process has its own copy of everything, the model included. The others end with the block at the latest.
    """
    context = multiprocessing.get_context("fork")
    gradients = torch.zeros(size, sum(parameter.numel() for parameter in model.parameters())).share_memory_()
    value, barrier = torch.zeros(1, dtype=torch.float64).share_memory_(), context.Barrier(size)
    members = [Team(rank=rank, size=size, gradients=gradients, value=value, barrier=barrier) for rank in range(size)]
    processes = [context.Process(target=work, args=(member,), daemon=True) for member in members[1:]]
    for process in processes:
        process.start()
    try:
        yield members[0]
    finally:
        for process in processes:
            process.terminate()
            process.join()
