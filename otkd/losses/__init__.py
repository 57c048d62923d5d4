"""The losses as ``nn.Module``s, one family a file, behind one call."""

from otkd.losses.batch import BatchSinkhornLoss
from otkd.losses.composite import SinKDLoss, WeightedLoss
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
from otkd.losses.registry import get_loss, list_losses, loss_class
from otkd.losses.transport import SinkhornLoss, WassersteinLoss

__all__ = [
    "AdaptiveKLLoss",
    "AlphaBetaLoss",
    "BatchSinkhornLoss",
    "CrossEntropyLoss",
    "JSDLoss",
    "KLLoss",
    "ReverseKLLoss",
    "SinKDLoss",
    "SinkhornLoss",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "TVDLoss",
    "UniversalLogitLoss",
    "WassersteinLoss",
    "WeightedLoss",
    "get_loss",
    "list_losses",
    "loss_class",
]
