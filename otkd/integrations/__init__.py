"""Bridges to training frameworks, each a module that imports its framework only when asked for."""

from otkd.extras import missing

_MISSING = missing("otkd.integrations", "transformers", "accelerate", extra="train")
if _MISSING:
    raise ImportError(_MISSING)
