"""Losses in programs that are compiled with ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: a compiled program calls the function outside its graph, with one graph break.

    The number of solver iterations and of counted positions depends on the data. Tracing would
    compile a graph for each of these numbers, which takes minutes and gains nothing, because the
    time is spent in matrix products.
    """
    # torch.compiler.disable would import the compiler with otkd, which takes seconds; this form,
    # which torch.optim uses, imports it at the first call.
    return _disable_dynamo(function)
