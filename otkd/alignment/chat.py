"""Chats as the texts that two chat templates make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[str, tuple[int, int]]:
    """A chat as the text of a tokenizer's chat template, and where its last answer is.

    Two templates put the same answer between different tokens. The ends that
    :func:`~otkd.alignment.token_ends` counts from the start of the answer can be compared:

        text, span = render_chat(tokenizer, messages)
        ends = token_ends(tokenizer, text, span=span, add_special_tokens=False)

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        messages: dictionaries with ``"role"`` and ``"content"``; the last one is the answer.
        options: passed to ``apply_chat_template``, for example ``tools`` or ``chat_template``.

    Returns:
        The text, and ``(start, stop)`` of the last message's content in it, in characters.

    Raises:
        ValueError: if there is no message, its content is not text, or the template changes it.
    """
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise ValueError(
            "messages must end with the answer, {'role': 'assistant', 'content': text}, got "
            f"{messages[-1] if messages else messages!r}"
        )
    answer = messages[-1]["content"]
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    start = _prompt_length(tokenizer, messages, text, options)
    start = text.rfind(answer) if start is None else text.find(answer, start)
    if start < 0 or not answer:
        raise ValueError(
            f"the chat template of {type(tokenizer).__name__} does not contain the answer "
            f"{answer[:40]!r} as it is: remove whitespace at its ends, or parts that the template "
            "removes"
        )
    return text, (start, start + len(answer))


def _prompt_length(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str, options: Mapping[str, Any]
) -> int | None:
    """Where the answer may begin; None if the template writes the prompt otherwise."""
    if len(messages) == 1:
        return None
    prompt = tokenizer.apply_chat_template(
        list(messages[:-1]), tokenize=False, **{**options, "add_generation_prompt": True}
    )
    return len(prompt) if text.startswith(prompt) else None
