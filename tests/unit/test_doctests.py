"""The examples in the docstrings run and print what they say; every public class has one."""

import doctest
import inspect

import pytest
import torch

import otkd
import otkd.extend
from otkd.losses.registry import LOSSES

MODULES = (otkd, otkd.losses, otkd.costs, otkd.supports, otkd.teachers, otkd.alignment, otkd.ot)
# Those of a subclass or of the package itself, for which CONTRIBUTING.md has the examples.
NOT_BUILT = {"Cost", "CostMatrices", "Positions", "StoredTeacher", "Support", "Tokenizer"}
PUBLIC = {
    f"{value.__module__}.{value.__qualname__}": value
    for module in MODULES
    for value in (getattr(module, name) for name in module.__all__)
    if inspect.isclass(value) or inspect.isfunction(value)
}
EXAMPLES = [
    test
    for value in (*PUBLIC.values(), otkd, otkd.extend)
    for test in doctest.DocTestFinder(recurse=inspect.isclass(value)).find(
        value, globs={"otkd": otkd, "torch": torch}
    )
    if test.examples
]


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_prints_what_it_says(example):
    registered, output = dict(LOSSES), []
    try:
        failed, _ = doctest.DocTestRunner().run(example, out=output.append)
    finally:  # an example may register a loss
        LOSSES.clear()
        LOSSES.update(registered)
    assert not failed, "".join(output)


@pytest.mark.parametrize("name", [n for n, value in PUBLIC.items() if inspect.isclass(value)])
def test_every_public_class_has_an_example(name):
    kind = PUBLIC[name]
    assert kind.__name__ in NOT_BUILT or issubclass(kind, Warning) or ">>>" in kind.__doc__
