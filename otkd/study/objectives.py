"""The training objective of a loss in a classification run, and the options it depends on."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import otkd
from otkd.losses.sinkd import SoftCrossEntropyLoss, UnrolledBatchSinkhornLoss
from otkd.study.messages import StudyError
from otkd.study.settings import option

if TYPE_CHECKING:
    from otkd.study.protocols import Objective
    from otkd.study.settings import Settings

# The rows of the teacher's classification head give these losses the distances between classes.
NEED_CLASS_ROWS = ("sinkhorn", "transport_kl", "wasserstein")
# The options of batch transport.
_TRANSPORT = ("batch_cost", "batch_temperature", "epsilon", "sample_cost", "debias", "iterations")
_PRICE = ("price", "smoothing", "direction")


def objective_options(name: str, settings: Settings) -> dict[str, Any]:
    """The options that the objective called ``name`` depends on, for result files.

    Raises:
        ValueError: for an unknown name; the message has the nearest one.
    """
    options = {option: getattr(settings, option) for option in _option_names(name, settings.author)}
    if options.get("sinkhorn_weight", 0.0) is None:
        default = otkd.SinKDLoss.author() if settings.author else otkd.SinKDLoss()
        options["sinkhorn_weight"] = default.weights["sinkhorn"]
    if not options.get("sample_cost"):
        # Results that were made before this option existed are results without the cost.
        options.pop("sample_cost", None)
    return options


def _option_names(name: str, author: bool) -> list[str]:
    takes = inspect.signature(otkd.loss_class(name)).parameters
    if name == "ce":
        return []
    names = ["alpha"]
    if name == "sinkd":
        names += ["sinkhorn_weight", "author", *_TRANSPORT]
    if name == "batch_sinkhorn":
        names += _TRANSPORT
    elif "temperature" in takes:
        names += ["temperature", "anneal", "rescale_t2"]
    if "epsilon" in takes and "epsilon" not in names:
        names.append("epsilon")
    if name == "transport_kl":
        names += _PRICE
    # The public code has a single cost and no debiasing.
    unknown = ("batch_cost", "sample_cost", "debias") if author and name == "sinkd" else ()
    return [option for option in names if option not in unknown]


def check_effect(given: Collection[str], objectives: Sequence[Objective]) -> None:
    """Refuse an option of losses that has no effect on any of ``objectives``.

    Raises:
        StudyError: naming the option.
    """
    tried = [variant for objective in objectives for variant in objective.tried()]
    taken = {name for each in tried for name in _option_names(each.loss, each.settings.author)}
    every = {name for loss in otkd.list_losses() for name in _option_names(loss, False)}
    for name in sorted(every.intersection(given) - taken):
        losses = ", ".join(dict.fromkeys(each.loss for each in tried))
        raise StudyError(f"{option(name)} has no effect on {losses}: leave it out.")


def check_objectives(objectives: Sequence[Objective], num_labels: int) -> None:
    """Build every objective once, with each of its candidates, so that mistakes are found early.

    Raises:
        StudyError: for an unknown loss or an option that it refuses.
    """
    for each in (variant for objective in objectives for variant in objective.tried()):
        each.settings.check()
        try:
            options = objective_options(each.loss, each.settings)
            build_objective(each.loss, options, torch.eye(num_labels))
        except (ValueError, TypeError, KeyError) as error:
            raise StudyError(str(error.args[0] if error.args else error)) from error


def needs_features(options: Mapping[str, Any]) -> bool:
    """Whether an objective with these options reads the states of student and teacher."""
    return options.get("batch_cost") == "hidden"


def build_objective(
    name: str,
    options: Mapping[str, Any],
    class_rows: Tensor | None = None,
    widths: tuple[int, int] | None = None,
) -> nn.Module:
    """The loss that trains a student.

    ``ce`` is hard labels only and ``sinkd`` has a hard-label term of its own; for any other loss it
    is ``alpha · loss + (1 − alpha) · ce``.

    Args:
        name: a registry name.
        options: from :func:`objective_options`.
        class_rows: ``(num_labels, features)``, needed by the losses of ``NEED_CLASS_ROWS``.
        widths: of the states of student and teacher, needed by the cost between states.

    Raises:
        ValueError: for options that the loss refuses.
    """
    if name == "ce":
        return otkd.get_loss("ce")
    common = {key: options[key] for key in ("temperature", "rescale_t2") if key in options}
    if name == "sinkd":
        return _sinkd(options, common, widths)
    if name == "batch_sinkhorn":
        loss = _batch_transport(options, widths)
    else:
        common |= {key: options[key] for key in ("epsilon", *_PRICE) if key in options}
        if name in NEED_CLASS_ROWS:
            if class_rows is None:
                raise ValueError(f"the objective {name!r} needs the teacher's class rows")
            if name == "wasserstein":
                common["cost"] = otkd.costs.EmbeddingCost(class_rows, metric="euclidean")
            else:
                common |= {"cost": "embedding", "embedding": class_rows}
        loss = otkd.get_loss(name, **common)
    alpha = options["alpha"]
    return otkd.WeightedLoss({name: (alpha, loss), "ce": (1 - alpha, "ce")})


def annealed_term(name: str, objective: nn.Module) -> nn.Module:
    """The term of an objective whose temperature is annealed: that of the soft labels."""
    return objective.terms["kl" if name == "sinkd" else name]  # pyright: ignore


def _sinkd(
    options: Mapping[str, Any], common: Mapping[str, Any], widths: tuple[int, int] | None
) -> nn.Module:
    if not options["author"]:
        soft, transport = otkd.KLLoss(**common), _batch_transport(options, widths)
    else:
        # SinKDLoss.author() with the options of its parts.
        of_soft: dict[str, Any] = {"rescale_t2": False, **_without_none(common)}
        soft = SoftCrossEntropyLoss(**of_soft)
        transport = UnrolledBatchSinkhornLoss(
            temperature=options["batch_temperature"],
            epsilon=options["epsilon"],
            **_without_none({"iterations": options["iterations"]}),
        )
    return otkd.SinKDLoss(
        options["alpha"], options["sinkhorn_weight"], soft_loss=soft, transport=transport
    )


def _batch_transport(options: Mapping[str, Any], widths: tuple[int, int] | None) -> nn.Module:
    projection = None
    if needs_features(options) and widths is not None and widths[0] != widths[1]:
        projection = nn.Linear(*widths, bias=False)
    return otkd.BatchSinkhornLoss(
        cost=options["batch_cost"],
        temperature=options["batch_temperature"],
        epsilon=options["epsilon"],
        sample_cost=options.get("sample_cost", 0.0),
        debias=options["debias"],
        **_without_none({"max_iterations": options["iterations"], "projection": projection}),
    )


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
