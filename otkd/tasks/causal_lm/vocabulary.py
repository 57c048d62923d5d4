"""A causal language model with the tokens of another tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otkd.alignment import TokenMap

_ROLES = ("pad_token_id", "bos_token_id", "eos_token_id")


@torch.no_grad()
def with_vocabulary(model: PreTrainedModel, token_map: TokenMap) -> PreTrainedModel:
    """Give a model the student's tokens of a map, with embeddings made from those that it has.

    A token that both tokenizers have keeps its row of the input embedding and of the output head.
    The row of any other token s is the mean of those of the teacher's tokens t that stand for it,
    Σ_t M_ts·E_t / Σ_t M_ts, or the mean of all rows if there is none. The ids of special tokens in
    the configurations become those of the student's tokenizer.

    It makes a student with its own tokenizer from layers of its teacher:

        student = with_vocabulary(student_of(teacher), token_map(student_tokenizer, tokenizer))

    Args:
        model: of the map's teacher, or made from it by :func:`student_of`; it is changed.
        token_map: from :func:`otkd.alignment.token_map`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has fewer tokens than the map's teacher.

    Example:
        >>> import otkd
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> row = model.get_input_embeddings().weight[4].clone()
        >>> found = otkd.alignment.TokenMap.of_pairs([0, 1], [2, 4], vocab_size=(3, 9))
        >>> model = with_vocabulary(model, found)
        >>> model.config.vocab_size, torch.equal(model.get_input_embeddings().weight[1], row)
        (3, True)
    """
    students, teachers = token_map.vocab_size
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = len(tables[0].weight)
    if rows < teachers:
        raise ValueError(
            f"the map is for {teachers} tokens of the teacher, but the model has {rows}: make the "
            "map with the tokenizer of this model as the teacher's"
        )
    made = [rows_of_student(table.weight[:teachers], token_map) for table in tables if table]
    bias = None if tables[-1] is None else getattr(tables[-1], "bias", None)
    made_bias = None if bias is None else rows_of_student(bias[:teachers, None], token_map)[:, 0]
    model.resize_token_embeddings(students, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for table, weight in zip(tables, made, strict=False):
        table.weight.copy_(weight)
    if made_bias is not None:
        tables[-1].bias.copy_(made_bias)
    for config in (model.config, model.generation_config):
        for name in _ROLES:
            if getattr(config, name, None) is not None:
                setattr(config, name, _in_student(getattr(config, name), token_map))
    return model


@torch.no_grad()
def rows_of_student(table: Tensor, token_map: TokenMap) -> Tensor:
    """The rows of the student's tokens from those of the teacher's; see :func:`with_vocabulary`.

    Args:
        table: one row for each token of the teacher, ``(teacher_tokens, width)``.
        token_map: from :func:`otkd.alignment.token_map`.

    Returns:
        ``(student_tokens, width)``.
    """
    found = token_map.to(table.device)
    weights = torch.sparse_coo_tensor(
        torch.stack([found.student, found.teacher]),
        found.weight,
        found.vocab_size,
        check_invariants=True,
    )
    sums = weights @ table.float()
    total = table.new_zeros(found.vocab_size[0], dtype=torch.float32)
    total = total.index_add_(0, found.student, found.weight).unsqueeze(-1)
    made = torch.where(total > 0, sums / total, table.float().mean(0))
    student, teacher = found.exact
    made[student] = table[teacher].float()
    return made.to(table.dtype)


def _in_student(ids: int | list[int], token_map: TokenMap) -> int | list[int] | None:
    """The student's ids of special tokens; None for one that its tokenizer does not have."""
    if isinstance(ids, list):
        found = [_in_student(token, token_map) for token in ids]
        return [token for token in found if isinstance(token, int)] or None
    exact = dict(zip(*(each.tolist() for each in reversed(token_map.exact)), strict=True))
    return exact.get(ids)
