"""The protocol of a loss, which trainers and weighted losses rely on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from otkd.functional.report import Report
from otkd.teachers import StoredTeacher, TopKTeacher, teacher_logits_of


@runtime_checkable
class Loss(Protocol):
    """The properties of a loss besides its call, ``loss(student_logits, teacher_logits, …)``.

    Every loss of otkd implements this protocol. :func:`as_loss` adapts any other module.

    Attributes:
        needs_teacher: whether the call needs ``teacher_logits``.
        needs_labels: whether the call needs ``labels``.
        needs_features: whether the call needs ``student_features`` and ``teacher_features``.
        reads_stored: whether the loss, or one of its terms, reads a
            :class:`~otkd.teachers.TopKTeacher` without expanding it to dense logits. Every loss
            accepts a stored teacher in place of logits.
        bridges_vocabularies: whether student and teacher may have vocabularies of different size.
        reductions: the reductions of all terms.
        last_report: what the solver did in the last call; None without a solver. For several terms,
            the worst: most iterations, largest error, least coverage.
        last_reports: the report of each term with a solver. The key is the path of the term, with
            names joined by ``/``; a loss without terms has the key ``""``.
        last_terms: the unweighted, detached value of each term in the last call; empty for a loss
            without terms.
    """

    @property
    def needs_teacher(self) -> bool: ...  # noqa: D102
    @property
    def needs_labels(self) -> bool: ...  # noqa: D102
    @property
    def needs_features(self) -> bool: ...  # noqa: D102
    @property
    def reads_stored(self) -> bool: ...  # noqa: D102
    @property
    def bridges_vocabularies(self) -> bool: ...  # noqa: D102
    @property
    def reductions(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def last_report(self) -> Report | None: ...  # noqa: D102
    @property
    def last_reports(self) -> Mapping[str, Report]: ...  # noqa: D102
    @property
    def last_terms(self) -> Mapping[str, Tensor]: ...  # noqa: D102


_NAMES = tuple(name for name, value in vars(Loss).items() if isinstance(value, property))


def has_protocol(module: nn.Module) -> TypeGuard[Loss]:
    """Whether a loss has every property of the protocol.

    This function is called at every step. ``isinstance`` would evaluate every property, and a
    weighted loss would ask all of its terms.
    """
    held, kind = vars(module), type(module)
    return all(name in held or hasattr(kind, name) for name in _NAMES)


def as_loss(module: nn.Module) -> Loss:
    """``module`` itself if it has the protocol, otherwise an adapter for it."""
    return module if has_protocol(module) else ForeignLoss(module)


def teacher_for(
    loss: nn.Module, teacher: Tensor | StoredTeacher | None, student_logits: Tensor
) -> Tensor | StoredTeacher | None:
    """The teacher in the form that ``loss`` reads.

    Losses with the protocol accept every form. Other modules get dense logits, for which a stored
    top-k teacher is expanded by :meth:`~otkd.teachers.TopKTeacher.logits_beside`. A module that
    passes its teacher on to losses of otkd can set ``reads_stored = True`` to get the stored top-k
    teacher unchanged.
    """
    if teacher is None or has_protocol(loss):
        return teacher
    if not isinstance(teacher, TopKTeacher):
        return teacher_logits_of(teacher, student_logits.device)
    if as_loss(loss).reads_stored:
        return teacher
    teacher = teacher.to(student_logits.device)
    if teacher.vocab_size != student_logits.shape[-1]:
        return teacher.logits()
    return teacher.logits_beside(student_logits)


class ForeignLoss:
    """Adapter for a module that is called like a loss of otkd but lacks part of the protocol.

    Properties that the module has are used. By default it needs a teacher and nothing else, reads
    dense logits and one vocabulary, and has the terms and reports of the losses inside it.
    """

    def __init__(self, module: nn.Module):
        self._module = module

    def _ask(self, name: str, default: Any) -> Any:
        return getattr(self._module, name, default)

    @property
    def needs_teacher(self) -> bool:
        """See :class:`Loss`; True unless the module defines it."""
        return self._ask("needs_teacher", True)

    @property
    def needs_labels(self) -> bool:
        """See :class:`Loss`; False unless the module defines it."""
        return self._ask("needs_labels", False)

    @property
    def needs_features(self) -> bool:
        """See :class:`Loss`; False unless the module defines it."""
        return self._ask("needs_features", False)

    @property
    def reads_stored(self) -> bool:
        """See :class:`Loss`; False unless the module defines it."""
        return self._ask("reads_stored", False)

    @property
    def bridges_vocabularies(self) -> bool:
        """See :class:`Loss`; False unless the module defines it."""
        return self._ask("bridges_vocabularies", False)

    @property
    def reductions(self) -> frozenset[str]:
        """See :class:`Loss`; those of the module and of all modules inside it."""
        named = (getattr(module, "reduction", None) for module in self._module.modules())
        return self._ask("reductions", frozenset(filter(None, named)))

    @property
    def last_report(self) -> Report | None:
        """See :class:`Loss`."""
        return worst_report(self.last_reports)

    @property
    def last_reports(self) -> Mapping[str, Report]:
        """See :class:`Loss`; the module's own, or those of the losses inside it."""
        own = self._ask("last_report", None)
        if own is None:
            return dict(_reports_inside(self._module, ""))
        if not isinstance(own, Report):  # a Solution of otkd.ot, or what looks like one
            own = Report(
                iterations=own.iterations,
                marginal_error=own.marginal_error.max(),
                converged=own.converged,
            )
        return {"": own}

    @property
    def last_terms(self) -> Mapping[str, Tensor]:
        """See :class:`Loss`; empty unless the module defines it."""
        return self._ask("last_terms", None) or {}


def worst_report(reports: Mapping[str, Report]) -> Report | None:
    """One report for several terms: most iterations, largest error, least coverage."""
    found = list(reports.values())
    if len(found) < 2:
        return found[0] if found else None
    return Report.of(
        found,
        support=", ".join(dict.fromkeys(report.support for report in found)),
        backend=", ".join(dict.fromkeys(report.backend for report in found)),
        coverage=_least(report.coverage for report in found),
        worst_coverage=_least(report.worst_coverage for report in found),
    )


def _least(values: Iterable[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.stack(known).min() if known else None


def joined(name: str, path: str) -> str:
    """The path of a term inside the term ``name``."""
    return f"{name}/{path}" if path else name


def _reports_inside(module: nn.Module, name: str) -> Iterator[tuple[str, Report]]:
    for child_name, child in module.named_children():
        path = joined(name, child_name) if name else child_name
        if has_protocol(child):
            yield from ((joined(path, inner), r) for inner, r in child.last_reports.items())
        else:
            yield from _reports_inside(child, path)
