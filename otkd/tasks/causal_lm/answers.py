"""Answers that a causal language model samples, and their Rouge-L."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from otkd.extras import missing
from otkd.scalars import as_whole
from otkd.tasks.causal_lm.padding import padding_collator
from otkd.tasks.tasks import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from otkd.tasks.causal_lm.instructions import Instruction

BATCH = 8


def batches_of(prompts: Sequence[object], batch_size: int = BATCH) -> int:
    """The number of batches in which answers to ``prompts`` are generated."""
    return -(-len(prompts) // batch_size)


def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int | None,
    batch_size: int = BATCH,
    temperature: float = 1.0,
) -> Iterator[list[str]]:
    """Sample an answer to every prompt, batch by batch, from all tokens of the vocabulary.

    Each batch has a random state of its own, which depends on the seed and on its number only: the
    batches that follow an interruption are those of an uninterrupted run, if ``prompts`` are cut
    at a multiple of ``batch_size`` and the seed is advanced by the number of batches.

    Args:
        model: in any mode; it generates in evaluation mode, and its mode is restored.
        tokenizer: with a padding token. Prompts are padded on the left.
        prompts: the tokens of each.
        max_new_tokens: largest number of tokens of an answer.
        seed: the batch with the number i is sampled with ``seed + i``; None takes the most
            probable token at every step.
        batch_size: prompts of a batch.
        temperature: divides the logits, if tokens are sampled.

    Yields:
        The texts of a batch, without special tokens.
    """
    from transformers import GenerationConfig

    batch_size = as_whole("batch_size", batch_size, least=1)
    generates = cast("Any", model)
    ends: Any = generates.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = {*ends, cast("int", tokenizer.eos_token_id)}
    from_all = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        do_sample=seed is not None,
        **(from_all if seed is not None else {}),
        repetition_penalty=1.0,
        max_new_tokens=as_whole("max_new_tokens", max_new_tokens, least=1),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )
    collate = padding_collator(tokenizer, "left")
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()
    try:
        for number, start in enumerate(range(0, len(prompts), batch_size)):
            rows = [
                {"input_ids": [*prompt], "attention_mask": [1] * len(prompt)}
                for prompt in prompts[start : start + batch_size]
            ]
            batch = collate(rows).to(model.device)
            with torch.random.fork_rng(devices), torch.no_grad():
                if seed is not None:
                    torch.manual_seed(seed + number)
                found = generates.generate(**batch, generation_config=settings)
            answers = found[:, batch["input_ids"].shape[1] :]
            yield tokenizer.batch_decode(answers, skip_special_tokens=True)
    finally:
        model.train(training)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean Rouge-L of answers, from 0 to 100: the F-measure of ``rouge-score`` with stemming.

    An answer has the value of the best of its references. This is the metric of MiniLLM and of
    Self-Instruct (Wang et al. 2023).

    Args:
        answers: one per row.
        references: of each row, at least one.

    Raises:
        DataError: if ``rouge-score`` is not installed.
        ValueError: if there are no rows, or answers and references differ in number.

    Example:
        >>> round(rouge_l(["The capital is Paris."], [["Paris", "Paris is the capital"]]), 2)
        50.0
    """
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    if not answers or len(answers) != len(references):
        raise ValueError(
            f"expected as many answers as rows of references, and at least one, got {len(answers)} "
            f"and {len(references)}"
        )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in row)
        for answer, row in zip(answers, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def check_rouge() -> None:
    """Raise ``DataError`` if ``rouge-score`` is not installed."""
    message = missing("Rouge-L", "rouge_score", extra="recipes")
    if message:
        raise DataError(message)


def generated_rouge_l(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[Instruction, list[int]]],
    *,
    max_new_tokens: int,
    seed: int | None,
    batch_size: int = BATCH,
    on_batches: Callable[[int], object],
) -> float:
    """Rouge-L of a model's answers, with those of the rows as references.

    Args:
        model: see :func:`sampled_answers`, also for the arguments that are not described here.
        tokenizer: of the model.
        prompts: rows with the tokens of their prompts, from :func:`fitting_prompts`.
        max_new_tokens: largest number of tokens of an answer.
        seed: of sampling, or None.
        batch_size: prompts of a batch.
        on_batches: counts the batches.
    """
    answers: list[str] = []
    for batch in sampled_answers(
        model,
        tokenizer,
        [tokens for _, tokens in prompts],
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    ):
        answers += batch
        on_batches(1)
    return rouge_l(answers, [row.answers for row, _ in prompts])
