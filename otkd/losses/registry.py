"""The registry: losses by the names that the command line and tables use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from otkd.checks import did_you_mean
from otkd.losses.ground_cost import MissingCost
from otkd.losses.settings import unknown_argument

LOSSES: dict[str, type[nn.Module]] = {}
_Class = TypeVar("_Class", bound=type[nn.Module])


def register_loss(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make a loss available to :func:`get_loss` under ``name``.

    Classes outside otkd can be registered, too.

    Raises:
        ValueError: if another class has the name.

    Example:
        >>> @otkd.register_loss("half_kl")
        ... class HalfKLLoss(otkd.KLLoss):
        ...     def per_position(self, batch):
        ...         return super().per_position(batch) / 2
        >>> otkd.get_loss("half_kl")
        HalfKLLoss(temperature=1.0, reduction='mean')
    """

    def register(loss: _Class) -> _Class:
        known = LOSSES.setdefault(name, loss)
        # A module that is executed again, as in a notebook, defines its class again.
        if (known.__module__, known.__qualname__) != (loss.__module__, loss.__qualname__):
            raise ValueError(f"the loss {name!r} is already registered: it is {known.__qualname__}")
        LOSSES[name] = loss
        return loss

    return register


def list_losses() -> list[str]:
    """The names of all registered losses, in alphabetical order.

    Example:
        >>> "kl" in otkd.list_losses()
        True
    """
    return sorted(LOSSES)


def loss_class(name: str) -> type[nn.Module]:
    """The class behind a registry name.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    if name in LOSSES:
        return LOSSES[name]
    hint = did_you_mean(str(name), LOSSES)
    raise ValueError(f"unknown loss {name!r}{hint} The losses are {', '.join(list_losses())}")


def get_loss(name: str, **options: Any) -> nn.Module:
    """A loss by its registry name.

    Args:
        name: one of :func:`list_losses`.
        **options: arguments of the loss. ``"sinkhorn"`` needs ``embedding=`` or ``cost=``, and
            ``"wasserstein"`` needs ``cost=``.

    Raises:
        TypeError, ValueError: for an unknown name, an option that the loss does not accept, or a
            missing option.

    Example:
        >>> otkd.get_loss("jsd", beta=0.1, temperature=2)
        JSDLoss(beta=0.1, temperature=2, reduction='mean')
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
