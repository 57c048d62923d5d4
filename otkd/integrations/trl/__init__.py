"""Distillation with TRL: its ``DistillationTrainer`` with any otkd loss, and given completions."""

from importlib.metadata import version

from otkd.extras import missing

TESTED = "1.16"

_MISSING = missing("otkd.integrations.trl", "trl", extra="trl")
if _MISSING:
    raise ImportError(_MISSING)
if not f"{version('trl')}.".startswith(f"{TESTED}."):
    raise ImportError(
        f"otkd.integrations.trl overrides private methods of TRL {TESTED}, but TRL "
        f"{version('trl')} is installed: pip install 'trl>=1.16,<1.17'"
    )

from otkd.integrations.trl.trainer import DistillationTrainer  # noqa: E402

__all__ = ["DistillationTrainer"]
