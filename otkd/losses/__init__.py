"""The losses as ``nn.Module``s with the same call signature; one family per file."""

from otkd.losses.batch import BatchSinkhornLoss
from otkd.losses.divergences import (
    AdaptiveKLLoss,
    AlphaBetaLoss,
    CrossEntropyLoss,
    HellingerLoss,
    JSDLoss,
    KLLoss,
    ReverseKLLoss,
    SkewKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
    UniversalLogitLoss,
)
from otkd.losses.hybrid import HybridLogitLoss
from otkd.losses.pushforward import PushforwardLoss
from otkd.losses.registry import get_loss, list_losses, loss_class, register_loss
from otkd.losses.sinkd import SinKDLoss
from otkd.losses.sinkhorn import SinkhornLoss
from otkd.losses.transport_kl import TransportKLLoss
from otkd.losses.wasserstein import WassersteinLoss
from otkd.losses.weighted import WeightedLoss

__all__ = [
    "AdaptiveKLLoss",
    "AlphaBetaLoss",
    "BatchSinkhornLoss",
    "CrossEntropyLoss",
    "HellingerLoss",
    "HybridLogitLoss",
    "JSDLoss",
    "KLLoss",
    "PushforwardLoss",
    "ReverseKLLoss",
    "SinKDLoss",
    "SinkhornLoss",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "TVDLoss",
    "TransportKLLoss",
    "UniversalLogitLoss",
    "WassersteinLoss",
    "WeightedLoss",
    "get_loss",
    "list_losses",
    "loss_class",
    "register_loss",
]
