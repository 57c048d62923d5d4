"""The public API is frozen in ``api_surface.json``: a change of it is made on purpose.

After a wanted change write the file anew: ``python tests/unit/test_api_surface.py``.
"""

import inspect
import json
from pathlib import Path

import otkd
import otkd.extend

FILE = Path(__file__).with_name("api_surface.json")
MODULES = (
    otkd,
    otkd.functional,
    otkd.losses,
    otkd.costs,
    otkd.supports,
    otkd.teachers,
    otkd.ot,
    otkd.alignment,
    otkd.extend,
)


def call(value):
    """The parameters that a caller may give, by position and after * by name only."""
    found = inspect.signature(value).parameters.values()
    by_name = [p.name for p in found if p.kind == p.KEYWORD_ONLY]
    others = [p.name for p in found if p.kind != p.KEYWORD_ONLY]
    return ", ".join([*others, *(["*", *by_name] if by_name else [])])


def members(kind):
    """The public names that otkd defines on a class; those of torch and Python may change."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "otkd"]
    return ", ".join(sorted({n for base in bases for n in vars(base) if not n.startswith("_")}))


def describe(value):
    if inspect.isclass(value):
        plain = getattr(value, "_is_protocol", False) or issubclass(value, Exception)
        called = "" if plain else call(value)
        return {"call": called, "members": members(value)}
    return {"call": call(value)} if inspect.isroutine(value) else type(value).__name__


def surface():
    return {
        module.__name__: {name: describe(getattr(module, name)) for name in sorted(module.__all__)}
        for module in MODULES
    }


def test_the_public_api_is_the_one_on_file():
    assert surface() == json.loads(FILE.read_text("utf-8")), (
        "the public API has changed. If that is intended, run "
        "`python tests/unit/test_api_surface.py` and say so in CHANGELOG.md"
    )


if __name__ == "__main__":
    FILE.write_text(json.dumps(surface(), indent=1) + "\n", "utf-8")
