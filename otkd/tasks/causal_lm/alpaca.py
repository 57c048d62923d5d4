"""The template of Alpaca for the prompts of models without a chat template."""

from __future__ import annotations

# The template of Alpaca, as MiniLLM uses it for Dolly: with a line break after the last heading.
_HEAD = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"


def alpaca_prompt(instruction: str, context: str) -> str:
    """A prompt in this template, up to where the answer starts; ``context`` may be empty."""
    parts = [_HEAD, _CONTEXT if context else "", _REQUEST, f"### Instruction:\n{instruction}\n\n"]
    if context:
        parts.append(f"### Input:\n{context}\n\n")
    return "".join([*parts, "### Response:\n"])
