"""The table of registered losses, from their constructors and docstrings."""

from __future__ import annotations

import inspect

from rich.table import Table

import otkd

# Every loss has these, which the caption says once.
_COMMON = ("temperature", "teacher_temperature", "rescale_t2", "reduction", "vocab_size")
_HIDDEN = ("max_iterations", "tolerance", "backend", "options", "soft_loss", "transport")


def losses_table() -> Table:
    """Name, first line of the docstring, and arguments with defaults of every registered loss."""
    table = Table(
        title="Losses",
        title_justify="left",
        caption=f"All losses also have {', '.join(_COMMON)}.",
        caption_justify="left",
    )
    table.add_column("name", no_wrap=True)
    table.add_column("description")
    table.add_column("arguments")
    for name in otkd.list_losses():
        loss = otkd.loss_class(name)
        arguments = [
            argument if parameter.default is parameter.empty else f"{argument}={parameter.default}"
            for argument, parameter in inspect.signature(loss).parameters.items()
            if argument not in _COMMON and argument not in _HIDDEN
        ]
        table.add_row(name, (inspect.getdoc(loss) or "").splitlines()[0], ", ".join(arguments))
    return table
