"""What a loss reports between two logs, the same in all processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from otkd.integrations.tally import Tally
from otkd.losses.protocol import Loss


class LossRecord:
    """Terms and solver reports of a loss; read from the device once per log.

    The value of a term is its contribution to an optimiser step, over all microbatches and
    processes, as a mean over the steps, so that the weighted terms add up to the logged loss. A
    step without the term counts as 0.

    Of the solver reports, the worst since the last log is kept: most iterations, largest marginal
    error and least coverage of any call in any process. The mean coverage is a mean over positions.
    With several terms the names are ``solver/<term>/iterations`` and so on, and
    ``solver/iterations`` covers all solvers.

    Args:
        skip_non_finite: whether terms that are NaN or infinite are excluded from their means, as
            Trainer does for the loss with ``logging_nan_inf_filter``.
    """

    def __init__(self, *, skip_non_finite: bool = False) -> None:
        self._tally = Tally()
        self._skip = skip_non_finite

    def add(
        self, loss: Loss, *, share: float, steps: float, positions: Callable[[], Tensor]
    ) -> None:
        """Add the last call of ``loss``.

        Args:
            loss: its ``last_terms`` and ``last_reports`` are read.
            share: factor of the terms; 1 if the calls of one step add up.
            steps: the fraction of an optimiser step that the call was.
            positions: returns the number of positions of the call, if it is needed.
        """
        self._tally.add("steps", steps)
        for name, value in loss.last_terms.items():
            self.add_term(name, value, share=share, steps=steps)
        for path, report in loss.last_reports.items():
            for prefix in {"solver", f"solver/{path}".rstrip("/")}:
                self._tally.most(f"{prefix}/iterations", report.iterations)
                self._tally.most(f"{prefix}/marginal_error", report.marginal_error.max())
                if report.coverage is not None:
                    weight = positions()
                    self._tally.add_mean(f"{prefix}/coverage", report.coverage * weight, weight)
                if report.worst_coverage is not None:
                    self._tally.least(f"{prefix}/worst_coverage", report.worst_coverage)

    def add_term(self, name: str, value: Tensor, *, share: float, steps: float) -> None:
        """Add a term of the loss or of the trainer; for the arguments see :meth:`add`."""
        value = value.detach()
        if self._skip:
            self._tally.add(f"skipped/{name}", ~value.isfinite() * steps)
            value = value.nan_to_num(0.0, 0.0, 0.0)
        self._tally.add(f"loss/{name}", value * share)

    def take(self) -> dict[str, float]:
        """Terms and reports of all processes since the last call; every process must call this."""
        found = self._tally.take()
        steps = found.pop("steps", 0.0)
        skipped = {name: found.pop(name) for name in list(found) if name.startswith("skipped/")}
        for name in found:
            if name.startswith("loss/"):
                counted = steps - skipped.get(name.replace("loss", "skipped", 1), 0.0)
                found[name] = found[name] / counted if counted else float("nan")
        return dict(sorted(found.items()))
