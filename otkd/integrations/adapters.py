"""A PEFT model without its adapters, as the teacher of the same model with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from otkd.integrations.models import adapted

BASE_MODEL = "base_model"


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model, which may be wrapped, without its adapters and without dropout.

    Afterwards every module has the mode, and every parameter the ``requires_grad``, that it had
    before: PEFT itself makes all parameters of the adapters trainable.
    """
    found: Any = adapted(model)
    modes = [(module, module.training) for module in found.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in found.parameters()]
    found.eval()
    try:
        with found.disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needs_gradient in trained:
            if parameter.requires_grad != needs_gradient:
                parameter.requires_grad_(needs_gradient)


def refuse_base_model(student: nn.Module) -> None:
    """Raise ``ValueError`` if the student without adapters does not exist, or would be trained."""
    found: Any = adapted(student)
    if found is None or not hasattr(found, "disable_adapter"):
        raise ValueError(
            f'teacher="{BASE_MODEL}" is the student without its adapters, but the student '
            f"{type(student).__name__} is not a PeftModel: wrap it with peft.get_peft_model, or "
            "pass the teacher as a model"
        )
    named = found.get_base_model().named_parameters()
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    with base_model(found):  # in which PEFT freezes the adapters
        trained = [name for name, parameter in named if parameter.requires_grad]
    if trained:
        raise ValueError(
            f'teacher="{BASE_MODEL}" is the student without its adapters, but {len(trained)} of '
            f"its own parameters are trained too, such as {trained[0]}, so the teacher would "
            'change: freeze them (bias="none" in LoraConfig), or pass a copy of the model'
        )
