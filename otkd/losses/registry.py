"""Losses by the names used on the command line and in tables."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from otkd.checks import did_you_mean
from otkd.losses.base import unknown_argument
from otkd.losses.batch import BatchSinkhornLoss
from otkd.losses.composite import SinKDLoss
from otkd.losses.divergences import (
    AdaptiveKLLoss,
    AlphaBetaLoss,
    CrossEntropyLoss,
    JSDLoss,
    KLLoss,
    ReverseKLLoss,
    SkewKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
    UniversalLogitLoss,
)
from otkd.losses.transport import MissingCost, SinkhornLoss, WassersteinLoss

LOSSES: dict[str, type[nn.Module]] = {
    "ce": CrossEntropyLoss,
    "kl": KLLoss,
    "rkl": ReverseKLLoss,
    "jsd": JSDLoss,
    "tvd": TVDLoss,
    "skl": SkewKLLoss,
    "srkl": SkewReverseKLLoss,
    "akl": AdaptiveKLLoss,
    "alpha_beta": AlphaBetaLoss,
    "sinkhorn": SinkhornLoss,
    "wasserstein": WassersteinLoss,
    "batch_sinkhorn": BatchSinkhornLoss,
    "sinkd": SinKDLoss,
    "uld": UniversalLogitLoss,
}


def list_losses() -> list[str]:
    """The registry names, as :func:`get_loss` takes them."""
    return list(LOSSES)


def loss_class(name: str) -> type[nn.Module]:
    """The class behind a registry name.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    if name in LOSSES:
        return LOSSES[name]
    hint = did_you_mean(str(name), LOSSES)
    raise ValueError(f"unknown loss {name!r}{hint} The losses are {', '.join(LOSSES)}")


def get_loss(name: str, **options: Any) -> nn.Module:
    """A loss by its registry name: ``get_loss("jsd", beta=0.1, temperature=2)``.

    ``get_loss("sinkhorn", embedding=W)`` and ``get_loss("wasserstein", cost=C)`` need what their
    losses need.

    Raises:
        TypeError, ValueError: for an unknown name (with the nearest), options the loss refuses, or
            one that it needs and was not given.
    """
    build = loss_class(name)
    parameters = inspect.signature(build).parameters
    for option in options:
        if option not in parameters:
            raise TypeError(unknown_argument(build.__name__, option, parameters))
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise TypeError(
                f"the loss {name!r} needs {parameter.name}=: write "
                f"get_loss({name!r}, {parameter.name}=...); see {build.__name__}"
            )
    try:
        return build(**options)
    except MissingCost:
        raise MissingCost(f"get_loss({name!r}, ") from None
