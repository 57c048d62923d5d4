"""The training objective that a name means in a run, and the options that it depends on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import otkd
from otkd.losses.sinkd import SoftCrossEntropyLoss, UnrolledBatchSinkhornLoss
from otkd.study.messages import StudyError
from otkd.study.settings import option
from otkd.study.wasd import Wasd

if TYPE_CHECKING:
    from otkd.study.protocols import Objective
    from otkd.study.settings import Settings

WASD = "wasd"  # an objective of studies of language models, not a loss of the package
SEQKD = "seqkd"  # likewise: cross-entropy with the teacher's own answers
# The teacher's embeddings of classes or tokens give these losses the distances between them.
NEED_EMBEDDING = ("sinkhorn", "transport_kl", "wasserstein", WASD)
HYBRID = "hybrid"  # of two vocabularies; it needs a map between them
_PERMUTATION_SEED = 0
# The options of batch transport.
_TRANSPORT = ("batch_cost", "batch_temperature", "epsilon", "sample_cost", "debias", "iterations")
_PRICE = ("price", "smoothing", "direction")


def objective_options(name: str, settings: Settings) -> dict[str, Any]:
    """The options that the objective called ``name`` depends on, for result files.

    Raises:
        ValueError: for an unknown name; the message has the nearest one.
    """
    options = {option: getattr(settings, option) for option in _option_names(name, settings.author)}
    if options.get("sinkhorn_weight", 0.0) is None:
        default = otkd.SinKDLoss.author() if settings.author else otkd.SinKDLoss()
        options["sinkhorn_weight"] = default.weights["sinkhorn"]
    # Results that were made before these options existed are results with their defaults.
    if not options.get("sample_cost"):
        options.pop("sample_cost", None)
    if options.get("token_cost") == "embedding":
        options.pop("token_cost")
    return options


def _option_names(name: str, author: bool) -> list[str]:
    if name in ("ce", SEQKD):
        return ["answer_tokens"] if name == SEQKD else []
    parts = name.split("+")
    if len(parts) > 1 and not {"ce", "sinkd", SEQKD}.isdisjoint(parts):
        raise ValueError(
            f"{name}: a sum cannot contain ce, sinkd or seqkd, which have their own weight of the "
            "hard labels: use --alpha"
        )
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name}: a sum can contain a loss only once")
    names = [option for part in parts for option in _options_of_one(part, author)]
    return ["alpha", *dict.fromkeys(names)]


def _loss_class(name: str) -> type[nn.Module]:
    others = {WASD: Wasd, HYBRID: otkd.HybridLogitLoss}
    if name in others:
        return others[name]
    try:
        return otkd.loss_class(name)
    except ValueError as error:
        more = f"and of language models {HYBRID}, {SEQKD} and {WASD}"
        raise ValueError(f"{error}, {more}") from None


def _options_of_one(name: str, author: bool) -> list[str]:
    takes = inspect.signature(_loss_class(name)).parameters
    names: list[str] = []
    if name == "sinkd":
        names += ["sinkhorn_weight", "author", *_TRANSPORT]
    if name == "batch_sinkhorn":
        names += _TRANSPORT
    elif "temperature" in takes:
        names += ["temperature", "anneal", "rescale_t2"]
    if "epsilon" in takes and "epsilon" not in names:
        names.append("epsilon")
    if name == "transport_kl":
        names += _PRICE
    if name in NEED_EMBEDDING:
        names.append("token_cost")
    # The public code has a single cost and no debiasing.
    unknown = ("batch_cost", "sample_cost", "debias") if author and name == "sinkd" else ()
    return [option for option in names if option not in unknown]


def check_effect(given: Collection[str], objectives: Sequence[Objective]) -> None:
    """Refuse an option of losses that has no effect on any of ``objectives``.

    Raises:
        StudyError: naming the option.
    """
    tried = [variant for objective in objectives for variant in objective.tried()]
    taken = {name for each in tried for name in _option_names(each.loss, each.settings.author)}
    if any(each.settings.rouge_rows is not None for each in tried):
        taken.add("answer_tokens")
    losses = (*otkd.list_losses(), WASD, SEQKD)
    every = {name for loss in losses for name in _option_names(loss, False)}
    for name in sorted(every.intersection(given) - taken):
        named = ", ".join(dict.fromkeys(each.loss for each in tried))
        raise StudyError(f"{option(name)} has no effect on {named}: leave it out.")
    annealed = [each.settings for each in tried if each.settings.anneal and "anneal" in given]
    if annealed and all(1 in (each.epochs, each.temperature) for each in annealed):
        raise StudyError(
            "--anneal lowers the temperature to 1 from epoch to epoch, so it has no effect with "
            "--epochs 1 or --temperature 1: change them, or leave it out."
        )


def check_objectives(
    objectives: Sequence[Objective], build: Callable[[str, Mapping[str, Any]], nn.Module]
) -> None:
    """Build every objective once, with each of its candidates, so that mistakes are found early.

    Args:
        objectives: of an experiment.
        build: a loss from its name and options; the teacher's embeddings are not known yet.

    Raises:
        StudyError: for an unknown loss or an option that it refuses.
    """
    for each in (variant for objective in objectives for variant in objective.tried()):
        each.settings.check()
        try:
            options = objective_options(each.loss, each.settings)
            build(each.loss, options)
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise StudyError(str(error.args[0] if error.args else error)) from error


def needs_features(options: Mapping[str, Any]) -> bool:
    """Whether an objective with these options reads the states of student and teacher."""
    return options.get("batch_cost") == "hidden"


def needs_answers(name: str) -> bool:
    """Whether an objective is trained on the teacher's own answers."""
    return name == SEQKD


def build_objective(
    name: str,
    options: Mapping[str, Any],
    embedding: Tensor | None = None,
    widths: tuple[int, int] | None = None,
) -> nn.Module:
    """The loss that trains a student.

    ``ce`` is hard labels only, ``seqkd`` is the same on the teacher's answers, and ``sinkd`` has a
    hard-label term of its own; for any other loss it is ``alpha · loss + (1 − alpha) · ce``. Names
    joined by ``+`` are a sum of losses.

    Args:
        name: ``seqkd``, ``wasd``, a registry name, or several of them joined by ``+``.
        options: from :func:`objective_options`.
        embedding: of classes or tokens, one row each, needed by the losses of ``NEED_EMBEDDING``.
        widths: of the states of student and teacher, needed by the cost between states.

    Raises:
        ValueError: for options that the loss refuses.
    """
    if name == "sinkd":
        return _sinkd(options, common_options(options), widths)
    return composed(name, options, lambda part: _term(part, options, embedding, widths))


def composed(name: str, options: Mapping[str, Any], term: Callable[[str], nn.Module]) -> nn.Module:
    """``alpha`` times the losses in ``name``, and 1 − ``alpha`` times that of the hard labels.

    Those that are hard labels alone have no ``alpha``.
    """
    if name in ("ce", SEQKD):
        return otkd.get_loss("ce")
    alpha = options["alpha"]
    terms: dict[str, Any] = {part: (alpha, term(part)) for part in name.split("+")}
    if alpha < 1:
        terms["ce"] = (1 - alpha, "ce")
    return otkd.WeightedLoss(terms)


def annealed_terms(name: str, objective: nn.Module) -> list[nn.Module]:
    """The terms of an objective whose temperature is annealed: those of the soft labels."""
    terms: Any = objective.terms
    named = [terms[part] for part in ("kl" if name == "sinkd" else name).split("+")]
    return [term for term in named if not isinstance(term, otkd.BatchSinkhornLoss)]


def common_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that most losses have, by argument."""
    return {key: options[key] for key in ("temperature", "rescale_t2") if key in options}


def own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the loss called ``name`` alone, by argument, without costs."""
    takes = inspect.signature(_loss_class(name)).parameters
    return {key: options[key] for key in ("epsilon", *_PRICE) if key in options and key in takes}


def _term(
    name: str,
    options: Mapping[str, Any],
    embedding: Tensor | None,
    widths: tuple[int, int] | None,
) -> nn.Module:
    if name == "batch_sinkhorn":
        return _batch_transport(options, widths)
    if name == HYBRID:
        raise ValueError(f"{name} compares two vocabularies: give the student one of its own")
    own = own_options(name, options)
    if name in NEED_EMBEDDING:
        if embedding is None:
            raise ValueError(f"the objective {name!r} needs the teacher's embeddings")
        kind = options.get("token_cost", "embedding")
        if "prefix" in kind:
            raise ValueError(f"--token-cost {kind} is for two vocabularies: choose another")
        if kind == "permuted":
            embedding = permuted(embedding)
        if name == WASD:
            return _wasd(kind, embedding, options)
        own["cost"] = _token_cost(name, kind, embedding)
    return otkd.get_loss(name, **common_options(options), **own)


def _token_cost(name: str, kind: str, embedding: Tensor) -> otkd.costs.Cost:
    if kind == "discrete":
        return otkd.costs.DiscreteCost()
    metric = "euclidean" if name == "wasserstein" else "sqeuclidean"
    return otkd.costs.EmbeddingCost(embedding, metric=metric)


def permuted(embedding: Tensor) -> Tensor:
    """The rows in an order that is the same in every study: a control of the geometry."""
    generator = torch.Generator().manual_seed(_PERMUTATION_SEED)
    return embedding[torch.randperm(len(embedding), generator=generator)]


def _wasd(kind: str, embedding: Tensor, options: Mapping[str, Any]) -> nn.Module:
    if kind == "discrete":
        raise ValueError(
            "wasd needs the distances between tokens, which choose its neighbours: use "
            "--token-cost embedding or permuted"
        )
    # As in the paper, the temperature is the student's.
    return Wasd(embedding, teacher_temperature=1.0, **common_options(options))


def _sinkd(
    options: Mapping[str, Any], common: Mapping[str, Any], widths: tuple[int, int] | None
) -> nn.Module:
    if not options["author"]:
        soft, transport = otkd.KLLoss(**common), _batch_transport(options, widths)
    else:
        # SinKDLoss.author() with the options of its parts.
        of_soft: dict[str, Any] = {"rescale_t2": False, **_without_none(common)}
        soft = SoftCrossEntropyLoss(**of_soft)
        transport = UnrolledBatchSinkhornLoss(
            temperature=options["batch_temperature"],
            epsilon=options["epsilon"],
            **_without_none({"iterations": options["iterations"]}),
        )
    return otkd.SinKDLoss(
        options["alpha"], options["sinkhorn_weight"], soft_loss=soft, transport=transport
    )


def _batch_transport(options: Mapping[str, Any], widths: tuple[int, int] | None) -> nn.Module:
    projection = None
    if needs_features(options) and widths is not None and widths[0] != widths[1]:
        projection = nn.Linear(*widths, bias=False)
    return otkd.BatchSinkhornLoss(
        cost=options["batch_cost"],
        temperature=options["batch_temperature"],
        epsilon=options["epsilon"],
        sample_cost=options.get("sample_cost", 0.0),
        debias=options["debias"],
        **_without_none({"max_iterations": options["iterations"], "projection": projection}),
    )


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
