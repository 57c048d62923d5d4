"""What a loss says of its last call, averaged between two logs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from otkd.losses.protocol import as_loss


class LossRecord:
    """Means of the terms and solver reports of a loss; read from the device once a log."""

    def __init__(self):
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, loss: nn.Module, *, share: float, steps: float) -> None:
        """Add the last call of ``loss``.

        Args:
            loss: read for ``last_terms`` and ``last_reports``.
            share: factor of the terms; 1 where those of the calls of one step add up.
            steps: how much of an optimiser's step the call was; terms are means over steps.
        """
        said = as_loss(loss)
        for name, value in said.last_terms.items():
            self.add_term(name, value, share=share, steps=steps)
        for report in said.last_reports.values():
            self._add("solver/iterations", report.iterations, 1)
            self._add("solver/marginal_error", report.marginal_error, 1)
            for name, value in (
                ("coverage", report.coverage),
                ("worst_coverage", report.worst_coverage),
            ):
                if value is not None:
                    self._add(f"solver/{name}", value, 1)

    def add_term(self, name: str, value: Tensor, *, share: float, steps: float) -> None:
        """Add a term that is not of the loss; arguments as :meth:`add`."""
        self._add(f"loss/{name}", value * share, steps)

    def _add(self, name: str, value: Tensor | float, weight: float) -> None:
        if isinstance(value, Tensor):
            # Of several problems solved in one call, the worst.
            value = value.detach().float().max()
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def take(self, device: torch.device) -> tuple[list[str], Tensor]:
        """Names and means, a tensor on ``device``, of all that was added since the last call."""
        names = list(self._sums)
        means = [torch.as_tensor(self._sums[n] / self._weights[n], device=device) for n in names]
        self._sums, self._weights = {}, {}
        return names, torch.stack([mean.float() for mean in means]) if names else torch.empty(0)
