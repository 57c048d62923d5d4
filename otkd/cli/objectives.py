"""What a loss name means in a classification run: the objective and the options it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import otkd
from otkd.cli.catalogue import loss_parameters
from otkd.cli.console import CommandError

if TYPE_CHECKING:
    from otkd.cli.settings import Settings

# These are told the geometry of the classes by the rows of the teacher's classifier.
NEED_CLASS_ROWS = ("sinkhorn", "wasserstein")


def objective_options(name: str, settings: Settings) -> dict[str, Any]:
    """The options the objective called ``name`` depends on, for result files.

    Raises:
        ValueError: for an unknown name; the message has the nearest one.
    """
    if name == "ce":
        return {}
    takes = loss_parameters(otkd.loss_class(name))
    if name == "sinkd":
        options: dict[str, Any] = {
            "alpha": settings.alpha,
            "sinkhorn_weight": settings.sinkhorn_weight,
        }
    else:
        options = {"weight": settings.alpha}
    for shared in ("temperature", "epsilon"):
        if shared in takes:
            options[shared] = getattr(settings, shared)
    return options


def build_objective(name: str, options: Mapping[str, Any], class_rows: Tensor | None) -> nn.Module:
    """The loss a student is trained with.

    ``ce`` is hard labels alone and ``sinkd`` has its own hard-label term; any other loss is weighed
    against hard labels as ``weight · loss + (1 − weight) · ce``.

    Args:
        name: a registry name.
        options: from :func:`objective_options`.
        class_rows: ``(num_labels, features)``, needed by the losses of ``NEED_CLASS_ROWS``.

    Raises:
        ValueError: for options the loss refuses.
    """
    if name == "ce":
        return otkd.get_loss("ce")
    arguments = dict(options)
    weight = arguments.pop("weight", None)
    if name in NEED_CLASS_ROWS:
        if class_rows is None:
            raise ValueError(f"the objective {name!r} needs the teacher's class rows")
        if name == "sinkhorn":
            arguments |= {"cost": "embedding", "embedding": class_rows}
        else:
            arguments["cost"] = otkd.costs.EmbeddingCost(class_rows, metric="euclidean")
    loss = otkd.get_loss(name, **arguments)
    if weight is None:
        return loss
    return otkd.WeightedLoss({name: (weight, loss), "ce": (1 - weight, "ce")})


def check_objectives(names: list[str], settings: Settings, num_labels: int) -> None:
    """Build every objective once, so that a mistake shows before anything is trained.

    Raises:
        CommandError: for an unknown loss or an option it refuses.
    """
    if not names:
        raise CommandError("--losses names no loss.")
    stand_in = torch.eye(num_labels)
    for name in names:
        try:
            build_objective(name, objective_options(name, settings), stand_in)
        except (ValueError, TypeError, KeyError) as error:
            raise CommandError(str(error.args[0] if error.args else error)) from error
