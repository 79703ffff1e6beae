"""Muon for the matrices inside the blocks, AdamW for the embedding and the norms, with a state of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MATRIX_RATE = 0.02
VECTOR_RATE = 0.003
MATRIX_DECAY = 0.1
MOMENTUM = 0.95
BETAS = (0.9, 0.98)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return a batch of matrices [N, rows, columns] with their singular values drawn to about one.

    The Newton-Schulz iteration of Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.transpose(1, 2) if tall else matrices
    found = found / (found.square().sum(dim=(1, 2), keepdim=True).sqrt() + 1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.transpose(1, 2)
        found = 3.4445 * found + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ found
    return found.transpose(1, 2) if tall else found


class Optimizer:
    """Updates a model's parameters in place from their gradients; ``state`` is all it remembers between updates."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Take over parameters by name; matrices other than embeddings are Muon's, all else is AdamW's."""
        self.state: dict[str, Tensor] = {}
        self._vectors: dict[str, torch.nn.Parameter] = {}
        self._matrices: dict[torch.Size, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if parameter.ndim == 2 and "embed" not in name:
                self._matrices.setdefault(parameter.shape, {})[name] = parameter
                self.state[f"momentum.{name}"] = torch.zeros_like(parameter)
            else:
                self._vectors[name] = parameter
                self.state[f"first.{name}"] = torch.zeros_like(parameter)
                self.state[f"second.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def update(self, *, step: int, scale: float) -> None:
        """Apply and clear the gradients; ``step`` counts from 0, ``scale`` multiplies the learning rates."""
        for shape, parameters in self._matrices.items():
            self._update_matrices(shape, parameters, scale)
        for name, parameter in self._vectors.items():
            self._update_vector(name, parameter, step, scale)

    def _update_matrices(self, shape: torch.Size, parameters: Mapping[str, torch.nn.Parameter], scale: float) -> None:
        pushes = []
        for name, parameter in parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            momentum = self.state[f"momentum.{name}"].lerp_(parameter.grad, 1 - MOMENTUM)
            pushes.append(parameter.grad.lerp_(momentum, MOMENTUM))
        rate = MATRIX_RATE * scale
        pushed = orthogonalised(torch.stack(pushes)) * max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, push in zip(parameters.values(), pushed, strict=True):
            parameter.mul_(1 - rate * MATRIX_DECAY).sub_(push, alpha=rate)
            parameter.grad = None

    def _update_vector(self, name: str, parameter: torch.nn.Parameter, step: int, scale: float) -> None:
        assert parameter.grad is not None, f"{name} has no gradient"
        first = self.state[f"first.{name}"].lerp_(parameter.grad, 1 - BETAS[0])
        second = self.state[f"second.{name}"].lerp_(parameter.grad.square(), 1 - BETAS[1])
        first_share, second_share = (1 - beta ** (step + 1) for beta in BETAS)
        parameter.addcdiv_(first / first_share, (second / second_share).sqrt_().add_(1e-8), value=-VECTOR_RATE * scale)
        parameter.grad = None
