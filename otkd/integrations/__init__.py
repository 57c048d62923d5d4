"""Bridges to training frameworks, each a module that imports its framework only when asked for."""

from importlib.util import find_spec

_MISSING = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"otkd.integrations needs transformers and accelerate, and {' and '.join(_MISSING)} cannot "
        "be found: pip install '.[train]' in otkd's checkout"
    )
