"""Optional packages: which of them are missing, and how to install them."""

from __future__ import annotations

from importlib import util


def missing(purpose: str, *modules: str, extra: str) -> str | None:
    """An error message for the modules that are not installed; None if all are.

    Nothing is imported.

    Args:
        purpose: what needs the modules, the subject of the message.
        *modules: names of top-level modules, which are those of their packages.
        extra: the extra of otkd that installs them.

    Example:
        >>> from otkd.extras import missing
        >>> print(missing("This", "torch", "absent_package", extra="demo"))
        This needs absent-package, which is not installed: pip install '.[demo]' in otkd's checkout
    """
    absent = [name.replace("_", "-") for name in modules if util.find_spec(name) is None]
    if not absent:
        return None
    is_not = "is not" if len(absent) == 1 else "are not"
    return (
        f"{purpose} needs {' and '.join(absent)}, which {is_not} installed: "
        f"pip install '.[{extra}]' in otkd's checkout"
    )
