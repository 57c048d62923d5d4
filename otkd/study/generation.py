"""Answers that models generate in a study of instructions: checks, and their Rouge-L."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from otkd.study import models
from otkd.study.messages import StudyError
from otkd.study.objectives import needs_answers
from otkd.tasks.causal_lm import fitting_prompts
from otkd.tasks.causal_lm.answers import batches_of, check_rouge, generated_rouge_l

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.study.experiment import Experiment


def generates(experiment: Experiment) -> bool:
    """Whether a model generates answers in a study."""
    seqkd = any(needs_answers(each.loss) for each in experiment.objectives)
    return seqkd or experiment.settings.rouge_rows is not None


def check_generation(experiment: Experiment) -> None:
    """Check that there are prompts to answer, and that the models can read prompt and answer.

    Raises:
        StudyError: naming the option that asks for too much.
        DataError: if a package is missing.
    """
    if not generates(experiment):
        return
    chosen = experiment.settings
    if not experiment.task.instructions:
        raise StudyError(
            "seqkd and --rouge-rows need prompts, which only the task instructions has."
        )
    if chosen.rouge_rows is not None:
        check_rouge()
        if chosen.rouge_rows > experiment.data.dev_rows:
            raise StudyError(
                f"--rouge-rows {chosen.rouge_rows}: the task has only {experiment.data.dev_rows} "
                "development prompts."
            )
    longest = chosen.max_length - 1
    for source in filter(None, (experiment.teacher_source, chosen.student)):
        config = models.load("AutoConfig", source)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and longest + chosen.answer_tokens > context:
            raise StudyError(
                f"--answer-tokens {chosen.answer_tokens} after a prompt of up to {longest} tokens "
                f"are more than the {context} tokens that {source} reads: lower it, or "
                "--max-length."
            )


def rouge_batches(experiment: Experiment) -> int:
    """The steps of progress of :func:`measure_rouge`; 0 if Rouge-L is not measured."""
    return batches_of(_prompts(experiment))


def measure_rouge(
    experiment: Experiment, model: PreTrainedModel, on_steps: Callable[[int], None]
) -> dict[str, float]:
    """Rouge-L, from 0 to 1, of answers to the first development prompts, if a number is given."""
    chosen, tokenizer = experiment.settings, experiment.teacher_tokenizer
    if chosen.rouge_rows is None:
        return {}
    value = generated_rouge_l(
        model,
        tokenizer,
        fitting_prompts(_prompts(experiment), tokenizer, chosen.max_length - 1),
        max_new_tokens=chosen.answer_tokens,
        seed=chosen.rouge_seed,
        on_batches=on_steps,
    )
    return {"rouge_l": value / 100}


def _prompts(experiment: Experiment) -> list[Any]:
    if experiment.settings.rouge_rows is None:
        return []
    (rows,) = experiment.data.dev.values()
    return [*rows[: experiment.settings.rouge_rows]]
