"""The tokens of completions that a data set gives, in place of those that a student generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.data_utils import is_conversational


class GivenCompletions:
    """Tokens of the ``completion`` of each example, as the student would have generated them.

    The tokens follow those of the prompt and end with an end-of-sequence token, unless they are cut
    at ``longest``. A text is tokenised together with its prompt; if a token then spans the two, the
    completion is tokenised alone. Messages are rendered by the chat template after the prompt.

    Args:
        tokenizer: of student and teacher.
        ends: the tokens that end a sequence; the first is appended to texts.
        longest: largest number of tokens, or None.
        template: options of ``apply_chat_template``.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        longest: int | None,
        template: Mapping[str, Any],
    ) -> None:
        self._tokenizer = tokenizer
        self._ends = list(ends)
        self._longest = longest
        self._template = template

    def tokens(self, example: Mapping[str, Any], prompt_ids: list[int]) -> list[int]:
        """The tokens of an example after those of its prompt.

        Raises:
            ValueError: see :func:`check_completion`; if the chat template renders the prompt
                differently when a completion follows.
        """
        check_completion(example)
        chat = is_conversational({"prompt": example["prompt"]})
        found = (
            self._of_messages(example, prompt_ids) if chat else self._of_text(example, prompt_ids)
        )
        return found[: self._longest]

    def _of_text(self, example: Mapping[str, Any], prompt_ids: list[int]) -> list[int]:
        prompt, completion = example["prompt"], example["completion"]
        found = _after(prompt_ids, self._tokenizer(prompt + completion)["input_ids"])
        if not found:
            found = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        return found if found[-1:] and found[-1] in self._ends else [*found, self._ends[0]]

    def _of_messages(self, example: Mapping[str, Any], prompt_ids: list[int]) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            [*example["prompt"], *example["completion"]],
            tokenize=True,
            return_dict=True,
            **self._template,
        )
        found = _after(prompt_ids, rendered["input_ids"])
        if not found:
            raise ValueError(
                "off_policy=True needs a chat template that renders a prompt in the same way when "
                "a completion follows, but this one does not for the prompt "
                f"{_short(example['prompt'])}: "
                "give prompt and completion as texts, rendered as the student is to see them"
            )
        # Templates write a line break after the last token of a turn, which is never generated.
        last = max((i for i, token in enumerate(found) if token in self._ends), default=None)
        return found if last is None else found[: last + 1]


def check_completion(example: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless an example has a completion of the kind of its prompt.

    That is a non-empty text, or one message of the assistant.
    """
    prompt, given = example["prompt"], example.get("completion")
    if is_conversational({"prompt": prompt}):
        message = given[0] if isinstance(given, list) and len(given) == 1 else None
        right = (
            isinstance(message, dict)
            and message.get("role") == "assistant"
            and bool(message.get("content"))
        )
        wanted = (
            "one message of the role 'assistant' with a content, because the prompt is messages"
        )
    else:
        right = isinstance(given, str) and bool(given)
        wanted = "a non-empty text, because the prompt is a text"
    if not right:
        raise ValueError(
            f"off_policy=True trains on the column 'completion', which must be {wanted}, but it is "
            f"{_short(given)} for the prompt {_short(prompt)}"
        )


def _after(prompt_ids: list[int], ids: list[int]) -> list[int]:
    """The ids after those of the prompt; none if they do not start with the prompt."""
    length = len(prompt_ids)
    return ids[length:] if ids[:length] == prompt_ids else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
