"""What ``help()``, an editor and a type checker see of every public function and class."""

import functools
import importlib.util
import inspect
import pkgutil
import typing

import numpy as np
import pytest
import torch
from torch import Tensor

import otkd
from otkd import functional
from otkd.functional.report import Report
from otkd.ot.options import Objective, SolverSettings

NEEDS_COST = ("sinkhorn", "transport_kl", "wasserstein")

MODULES = (
    *(otkd, functional, otkd.ot, otkd.costs, otkd.supports, otkd.teachers, otkd.losses),
    otkd.alignment,
    *(
        importlib.import_module(f"otkd.integrations.{found.name}")
        for found in pkgutil.iter_modules([f"{otkd.__path__[0]}/integrations"])
        if importlib.util.find_spec("transformers")
    ),
)


def public(module):
    """What a module offers by name: its ``__all__``, else what is defined in it."""
    own = [
        name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
    ]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield value


def callables(value):
    """A function, or the constructor and the public methods that a class has written."""
    if inspect.isfunction(value):
        yield value
    elif not getattr(value, "_is_protocol", False):
        for name, member in vars(value).items():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                yield member


PUBLIC = {
    f"{c.__module__}.{c.__qualname__}": c for m in MODULES for v in public(m) for c in callables(v)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_callable_is_annotated_in_full(name):
    function = PUBLIC[name]
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters if p not in ("self", "cls")]
    hints = typing.get_type_hints(function)
    assert set(parameters) <= set(hints)
    assert "return" in hints
    assert inspect.Parameter.empty not in hints.values()


OF_TENSORS = [  # functions of mathematics; an integration hands on what models give it
    name
    for name, function in PUBLIC.items()
    if "." not in function.__qualname__ and not name.startswith("otkd.integrations")
]


@pytest.mark.parametrize("name", OF_TENSORS)
def test_tensors_of_public_functions_have_shapes(name):
    hints = typing.get_type_hints(PUBLIC[name])
    for parameter, hint in hints.items():
        kinds = typing.get_args(hint) or (hint,)
        assert parameter in ("cost", "teacher_logits", "teacher", "return") or Tensor not in kinds


@pytest.mark.parametrize("name", otkd.list_losses())
def test_help_shows_every_setting_of_a_loss(name):
    loss = otkd.losses.loss_class(name)
    parameters = inspect.signature(loss).parameters
    assert {"reduction", "temperature", "teacher_temperature", "rescale_t2", "vocab_size"} <= set(
        parameters
    )
    assert all(p.kind != p.VAR_KEYWORD for p in parameters.values())


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


POSITIONAL = {
    otkd.SinkhornLoss: ["cost", "embedding"],
    otkd.TransportKLLoss: ["cost", "embedding"],
    otkd.WassersteinLoss: ["cost"],
    otkd.BatchSinkhornLoss: ["cost"],
    otkd.JSDLoss: ["beta"],
    otkd.SkewKLLoss: ["alpha"],
    otkd.SkewReverseKLLoss: ["alpha"],
    otkd.AdaptiveKLLoss: ["head_mass"],
    otkd.AlphaBetaLoss: ["alpha", "beta"],
    otkd.SinKDLoss: ["alpha", "sinkhorn_weight"],
    otkd.WeightedLoss: ["terms"],
    otkd.costs.EmbeddingCost: ["source", "target"],
    otkd.costs.MatrixCost: ["matrix"],
    otkd.costs.OrdinalCost: ["p"],
    otkd.costs.PowerCost: ["base", "p"],
    otkd.supports.TopK: ["k"],
    otkd.supports.NearestNeighbours: ["k"],
    otkd.ot.sinkhorn: ["a", "b", "cost"],
    otkd.ot.sinkhorn_divergence: ["a", "b", "cost"],
    otkd.ot.wasserstein: ["a", "b", "cost"],
    Objective: [],
    SolverSettings: [],
    Report: [],
}


@pytest.mark.parametrize("callable_", POSITIONAL, ids=lambda callable_: callable_.__name__)
def test_settings_are_given_by_name(callable_):
    by_position = [
        parameter.name
        for parameter in inspect.signature(callable_).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    assert by_position == POSITIONAL[callable_]


def test_losses_without_parameters_take_nothing_by_position():
    for name in otkd.list_losses():
        build = otkd.losses.loss_class(name)
        if build not in POSITIONAL:
            with pytest.raises(TypeError, match="positional"):
                build(2.0)


X = torch.randn(5, 3)
A = torch.full((5,), 0.2)
COST = otkd.costs.DiscreteCost()
SOLVED = [
    lambda **options: otkd.SinkhornLoss(embedding=X, **options),
    otkd.BatchSinkhornLoss,
    lambda **options: otkd.functional.sinkhorn_divergence(X, X, cost=COST, **options),
    lambda **options: otkd.functional.batch_sinkhorn_distance(X, X, **options),
    lambda **options: otkd.ot.sinkhorn_divergence(A, A, COST, **options),
]
TEMPERED = [
    *(otkd.losses.loss_class(name) for name in otkd.list_losses() if name not in NEEDS_COST),
    lambda **options: otkd.SinkhornLoss(embedding=X, **options),
    lambda **options: otkd.TransportKLLoss(embedding=X, **options),
    lambda **options: otkd.WassersteinLoss(COST, **options),
    *(
        functools.partial(getattr(functional, name), X, X)
        for name in functional.__all__
        if name not in ("sinkhorn_divergence", "transport_kl_divergence", "wasserstein_distance")
    ),
]
NO_NUMBERS = (
    True,
    "2",
    None,
    1j,
    [2.0],
    torch.ones(2),
    torch.ones(()).requires_grad_(),
    X[0, 0] > 9,
)
REFUSED = [
    *((build, "debias", value) for build in SOLVED for value in (1000, 1, 0.5)),
    *((otkd.BatchSinkhornLoss, "debias", value) for value in ("yes", None)),
    *((build, "max_iterations", value) for build in SOLVED for value in (3.7, True, "3", 2.0)),
    *(
        (build, name, value)
        for build in SOLVED
        for name in ("epsilon", "tolerance")
        for value in NO_NUMBERS
    ),
    *(
        (build, "temperature", value)
        for build in TEMPERED
        for value in NO_NUMBERS
        if not (value is None and build is otkd.SinKDLoss)
    ),
    *((otkd.KLLoss, "rescale_t2", value) for value in (1, 4.0, "no")),
    *((otkd.JSDLoss, "beta", value) for value in NO_NUMBERS),
    *((otkd.SkewKLLoss, "alpha", value) for value in NO_NUMBERS),
    *((otkd.SkewReverseKLLoss, "alpha", value) for value in NO_NUMBERS),
    *((otkd.AdaptiveKLLoss, "head_mass", value) for value in NO_NUMBERS),
    *((otkd.AlphaBetaLoss, name, value) for name in ("alpha", "beta") for value in NO_NUMBERS),
    *(
        (otkd.SinKDLoss, name, value)
        for name in ("alpha", "sinkhorn_weight")
        for value in NO_NUMBERS
    ),
    *(
        (otkd.supports.TopK, name, value)
        for name in ("k", "clusters")
        for value in (2.5, True, "3", 2.0)
    ),
    *((otkd.supports.NearestNeighbours, "k", value) for value in (2.5, True, "3", 2.0)),
    (otkd.supports.TopK, "tail", 0),
    (otkd.costs.OrdinalCost, "p", True),
    (otkd.BatchSinkhornLoss, "gather", 1),
    (otkd.BatchSinkhornLoss, "sample_cost", True),
]


@pytest.mark.parametrize(("build", "name", "value"), REFUSED)
def test_settings_of_another_type_are_refused(build, name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        build(**{name: value})


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, torch.tensor])
def test_scalars_of_numpy_and_torch_are_numbers(kind):
    loss = otkd.SinkhornLoss(
        embedding=X, temperature=kind(2), epsilon=kind(1), support=otkd.supports.Dense()
    )
    assert (loss.temperature, loss.objective.epsilon) == (2, 1)
    assert {type(loss.temperature), type(loss.objective.epsilon)} <= {int, float}
    assert otkd.JSDLoss(np.float32(0.25)).formula.beta == 0.25
    if kind is not np.float32 and kind is not np.float64:
        assert otkd.supports.TopK(kind(3)) == otkd.supports.TopK(3)
    value = functional.kl_divergence(X, X.flip(0), temperature=kind(2))
    torch.testing.assert_close(value, functional.kl_divergence(X, X.flip(0), temperature=2.0))
