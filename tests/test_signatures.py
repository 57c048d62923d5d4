"""What ``help()``, an editor and a type checker see of every public function and class."""

import inspect
import typing

import pytest
from torch import Tensor

from otkd import functional

SHAPED_FUNCTIONS = [getattr(functional, name) for name in functional.__all__]


@pytest.mark.parametrize("function", SHAPED_FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_of_logits_name_every_parameter_and_every_shape(function):
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
    assert set(hints) == {*signature.parameters, "return"}
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 2)
    assert hints["student_logits"].dim_str.startswith("*batch")
    assert hints["teacher_logits"].dim_str.startswith("*batch")
    assert hints["return"].dim_str == "*batch"
    for name in ("student_logits", "teacher_logits", "return"):
        assert hints[name].array_type is Tensor
    assert "*batch" in str(signature)
