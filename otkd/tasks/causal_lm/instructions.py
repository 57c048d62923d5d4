"""Instructions and their answers: read from files, checked row by row, and tokenised."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otkd.reductions import IGNORE_INDEX
from otkd.scalars import as_whole
from otkd.tasks.causal_lm.alpaca import alpaca_prompt
from otkd.tasks.hub import hub_rows
from otkd.tasks.tasks import DataError
from otkd.tasks.tsv import text_lines

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Instruction:
    """A prompt and the answers to it.

    Attributes:
        where: the file and line, or the data set and row, for messages.
        messages: the prompt as chat messages.
        instruction: the same as an instruction and its input, which may be empty; None if the
            prompt is a conversation of several messages.
        answers: at least one. Models are trained on the first.
    """

    where: str
    messages: tuple[Message, ...]
    instruction: tuple[str, str] | None
    answers: tuple[str, ...]

    @property
    def text(self) -> str | None:
        """The prompt in the Alpaca template, in which a conversation cannot be written."""
        return None if self.instruction is None else alpaca_prompt(*self.instruction)

    def answered(self, answer: str) -> dict[str, Any]:
        """The row of a file with this prompt and another answer."""
        if self.instruction is not None:
            names = ("instruction", "input", "output")
            return dict(zip(names, (*self.instruction, answer), strict=True))
        return {"messages": [*self.messages, {"role": "assistant", "content": answer}]}

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The messages if the tokenizer has a chat template, otherwise the text.

        Raises:
            DataError: for a conversation of several messages without a chat template.
        """
        if tokenizer.chat_template is not None:
            return [*self.messages]
        text = self.text
        if text is None:
            raise DataError(
                f"{self.where}: a conversation of {len(self.messages)} messages needs a tokenizer "
                "with a chat template; without one, give a single message of the user."
            )
        return text

    def prompt_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens of the prompt, up to where the answer starts.

        Raises:
            DataError: if the chat template refuses the messages, or there is none for them.
        """
        prompt = self.prompt(tokenizer)
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        from jinja2 import TemplateError

        try:
            encoded: Any = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            raise DataError(
                f"{self.where}: the tokenizer's chat template refuses the messages: {error}"
            ) from error
        return list(encoded["input_ids"])


def read_instructions(source: str | Path, split: str = "train") -> list[Instruction]:
    """The rows of a JSONL file, or of a part of a data set on the Hugging Face hub.

    A row has ``instruction``, an optional ``input`` and ``output``, which is a text or a list of
    equally good texts; or ``messages``, each with ``role`` and ``content``, of which the last is
    the assistant's answer. Other columns are ignored, and so are empty lines.

    Args:
        source: a file, or the name of a data set if there is no such file.
        split: the part of a data set.

    Raises:
        DataError: if the source cannot be read or is empty; for a row that is no JSON object, lacks
            a column, or has an empty prompt or answer. The message names the row.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".json", ".jsonl"):
        lines = [(f"{path}, line {n}", text) for n, text in text_lines(path) if text.strip()]
        rows = [(where, json_row(where, text)) for where, text in lines]
    else:
        rows = [
            (f"{source}, row {n}", row) for n, row in enumerate(hub_rows(str(source), split), 1)
        ]
    if not rows:
        raise DataError(f"{source} has no rows; expected one JSON object per line.")
    return [_instruction(where, row) for where, row in rows]


def json_row(where: str, line: str) -> dict[str, Any]:
    """A line of JSON as a row; ``DataError`` if it is no object, or holds what is no text."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where}: {code} is half of a surrogate pair, which is no character: complete or "
            "remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); write one object per line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {_short(row)} is not a JSON object with named columns.")
    return row


def _instruction(where: str, row: dict[str, Any]) -> Instruction:
    if row.get("messages") is not None:
        return _conversation(where, row["messages"])
    missing = [name for name in ("instruction", "output") if row.get(name) is None]
    if missing:
        raise DataError(
            f"{where}: no column {' or '.join(map(repr, missing))}; the row has "
            f"{', '.join(row) or 'none'}. Expected instruction, input and output, or messages."
        )
    instruction, context = row["instruction"], row.get("input") or ""
    if not (isinstance(instruction, str) and isinstance(context, str) and instruction.strip()):
        raise DataError(f"{where}: instruction and input must be texts, the instruction not empty.")
    content = f"{instruction}\n\n{context}" if context else instruction
    outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
    return Instruction(
        where,
        ({"role": "user", "content": content},),
        (instruction, context),
        _answers(where, "output", outputs),
    )


def _conversation(where: str, messages: Any) -> Instruction:
    right = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not right or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: messages must be a list of objects with the texts role and content, the "
            "last of them the assistant's answer, after at least one other."
        )
    *prompt, answer = ({name: m[name] for name in ("role", "content")} for m in messages)
    single = len(prompt) == 1 and prompt[0]["role"] == "user"
    if single and not prompt[0]["content"].strip():
        raise DataError(f"{where}: the message of the user is empty.")
    return Instruction(
        where,
        tuple(prompt),
        (prompt[0]["content"], "") if single else None,
        _answers(where, "last message", [answer["content"]]),
    )


def _answers(where: str, name: str, outputs: list[Any]) -> tuple[str, ...]:
    if not outputs or not all(isinstance(text, str) and text.strip() for text in outputs):
        raise DataError(
            f"{where}: the answer ({name}) is {_short(outputs[0] if outputs else outputs)}; "
            "expected a text that is not empty. Complete the row or remove it."
        )
    return tuple(outputs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fitting_prompts(
    rows: Sequence[Instruction],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    *,
    skip_long: bool = False,
) -> list[tuple[Instruction, list[int]]]:
    """The rows with the tokens of their prompts, of which none has more than ``longest``.

    Args:
        rows: from :func:`read_instructions`.
        tokenizer: of the model that reads the prompts.
        longest: largest number of tokens of a prompt.
        skip_long: leave rows with longer prompts out, with one warning in the log, instead of
            refusing them.

    Raises:
        DataError: for a longer prompt, naming the row; if all of them are longer.
    """
    longest = as_whole("longest", longest, least=1)
    every = [(row, row.prompt_tokens(tokenizer)) for row in rows]
    kept = [(row, tokens) for row, tokens in every if len(tokens) <= longest]
    if len(kept) == len(every):
        return kept
    row, tokens = next((row, tokens) for row, tokens in every if len(tokens) > longest)
    found = f"{row.where}: the prompt has {len(tokens):,} tokens, but at most {longest:,} fit"
    if not skip_long or not kept:
        raise DataError(
            f"{found}, as an answer must follow within the largest length. "
            f"{len(every) - len(kept):,} of {len(every):,} rows have a longer prompt: shorten or "
            "remove them, or allow a larger length if the model reads it."
        )
    logger.warning("%s; %d such rows are left out", found, len(every) - len(kept))
    return kept


def encode_instructions(
    rows: Sequence[Instruction],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    skip_long: bool = False,
) -> Dataset:
    """Tokenise prompts and their first answers for training; only the answers have labels.

    An answer is tokenised by itself, as a model generates it, and ends with an end-of-sequence
    token, unless it is cut at ``max_length``.

    Args:
        rows: from :func:`read_instructions`.
        tokenizer: its chat template writes the prompts; without one they have the Alpaca template.
        max_length: largest number of tokens of a row.
        skip_long: see :func:`fitting_prompts`; a prompt must leave room for one token.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, which are −100 on the prompt.

    Raises:
        DataError: if a prompt does not fit, or the tokenizer has no end-of-sequence token.
    """
    from datasets import Dataset

    max_length = as_whole("max_length", max_length, least=2)
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("The tokenizer has no end-of-sequence token, which ends every answer.")
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row, prompt in fitting_prompts(rows, tokenizer, max_length - 1, skip_long=skip_long):
        answer = tokenizer(row.answers[0], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, end][:max_length]
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * len(ids))
        columns["labels"].append([IGNORE_INDEX] * len(prompt) + ids[len(prompt) :])
    return Dataset.from_dict(columns)


def digest_of(rows: Iterable[Instruction]) -> str:
    """A hash of prompts and answers, which shows whether two runs read the same rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content_of(row))
    return digest.hexdigest()[:16]


def content_of(row: Any) -> bytes:
    """Everything in a row, a dataclass, but where it is from; for hashes."""
    content = {name: value for name, value in asdict(row).items() if name != "where"}
    return json.dumps(content, sort_keys=True).encode()
