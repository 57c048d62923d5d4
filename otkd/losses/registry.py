"""Losses by the names used on the command line and in tables."""

from __future__ import annotations

from torch import nn

from otkd.checks import did_you_mean
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
from otkd.losses.transport import SinkhornLoss, WassersteinLoss

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


def get_loss(name: str, **options) -> nn.Module:
    """A loss by its registry name: ``get_loss("jsd", beta=0.1, temperature=2)``.

    Raises:
        TypeError, ValueError: for an unknown name (with the nearest) or options the loss refuses.
    """
    return loss_class(name)(**options)
