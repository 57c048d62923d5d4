"""Losses inside programs that are compiled with ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that a compiled program calls as it is: one break of the graph, nothing traced.

    Losses iterate until their input is solved and select the positions that count. A tracer would
    make a graph of every number of iterations and of positions, which takes minutes and gains
    nothing: what takes time here are products of matrices.
    """
    # torch.compiler.disable would import the compiler, which takes seconds, together with otkd;
    # this form, which torch.optim uses, imports it at the first call.
    return _disable_dynamo(function)
