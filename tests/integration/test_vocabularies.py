"""A model with another tokenizer's tokens, and metrics that do not depend on the tokenizer."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers.convert_slow_tokenizer import bytes_to_unicode

from otkd.alignment import TokenMap, align_positions, token_map
from otkd.tasks.causal_lm import byte_metrics, student_of, with_vocabulary
from tests.models import tiny_gpt2, tiny_llama
from tests.small_tokenizers import tokenizer_of

STUDENT, TEACHER = tokenizer_of("byte-level, small"), tokenizer_of("sentencepiece")
TEXTS = ("the cat sat", "mats, singing", "a café and 7 cats", "中 the singer")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path))


def rows_of(model):
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    return [table.weight.detach().clone() for table in tables]


def few_pairs():
    return TokenMap.of_pairs([5, 1], [7, 2], (len(STUDENT), len(TEACHER)))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("make", [lambda: token_map(STUDENT, TEACHER), few_pairs])
def test_rows_are_those_of_the_same_tokens_or_means(build, make):
    teacher = build(1, vocab=len(TEACHER) + 3)  # padded
    before, found = rows_of(teacher), make()
    student = with_vocabulary(student_of(teacher, 1), found)
    matrix = torch.zeros(found.vocab_size[1], found.vocab_size[0])
    matrix[found.teacher, found.student] = found.weight
    pairs = dict(zip(*(ids.tolist() for ids in found.exact), strict=True))
    for old, new in zip(before, rows_of(student), strict=True):
        assert len(new) == len(STUDENT)
        old, means = old[: len(TEACHER)], 0
        for token, row in enumerate(new):
            weights = matrix[:, token]
            if token in pairs:
                expected = old[pairs[token]]
            elif weights.any():
                expected, means = weights @ old / weights.sum(), means + 1
            else:
                expected = old.mean(0)
            torch.testing.assert_close(row, expected)
        assert means == 0 if make is few_pairs else means > 3
    head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
    assert (head.weight is embedding.weight) == teacher.config.tie_word_embeddings
    assert all(torch.equal(*pair) for pair in zip(rows_of(teacher), before, strict=True))


def test_the_identity_changes_nothing():
    model, ids = tiny_llama(0, vocab=len(STUDENT)).eval(), torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
        after = with_vocabulary(model, token_map(STUDENT, STUDENT))(ids).logits
    torch.testing.assert_close(after, before)


def test_special_tokens_have_the_ids_of_the_students_tokenizer():
    teacher = tiny_llama(0, vocab=len(TEACHER))
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = TEACHER.eos_token_id
    teacher.generation_config.bos_token_id = TEACHER.bos_token_id
    teacher.generation_config.pad_token_id = TEACHER.unk_token_id
    model = with_vocabulary(teacher, token_map(STUDENT, TEACHER))
    assert model.config.vocab_size == len(STUDENT)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == STUDENT.eos_token_id
    assert model.generation_config.bos_token_id == STUDENT.bos_token_id
    assert model.generation_config.pad_token_id is None  # the student has no unknown token
    few = TokenMap.of_pairs([0], [0], (2, len(TEACHER) + 1))
    with pytest.raises(ValueError, match=r"map is for \d+ tokens of the teacher, but"):
        with_vocabulary(tiny_llama(0, vocab=len(TEACHER)), few)


# Bytes


def models():
    return tiny_llama(0, vocab=len(STUDENT)), tiny_llama(1, vocab=len(TEACHER))


def read(model, tokenizer, text):
    """The ids, and log-probabilities of the next token after each."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        return ids, model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def table_of(tokenizer):
    """Which byte each token begins with, ``(tokens, 257)``; special tokens have the last class."""
    table = torch.zeros(len(tokenizer), 257, dtype=torch.float64)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for piece, token in tokenizer.get_vocab().items():
        if token in tokenizer.all_special_ids:
            byte = 256
        elif tokenizer is STUDENT:
            byte = letters[piece[0]]
        else:
            byte = int(piece[3:5], 16) if piece.startswith("<0x") else piece[0].encode()[0]
            byte = ord(" ") if piece[0] == "▁" else byte
        table[token, byte] = 1
    return table


def naive_metrics(pair, texts):
    """Bits of both, their bytes, and the divergences of the next byte at each position."""
    bits, size, divergences, tables = [0.0, 0.0], 0, [], [table_of(STUDENT), table_of(TEACHER)]
    for text in texts:
        found = align_positions(text, STUDENT, TEACHER)
        size += int(found.offsets[-1] - found.offsets[0])
        both = [read(*each, text) for each in zip(pair, (STUDENT, TEACHER), strict=True)]
        for side, places in enumerate((found.student, found.teacher)):
            ids, log_probs = both[side]
            for place in range(int(places[0]) + 1, int(places[-1]) + 1):
                bits[side] -= log_probs[place - 1, ids[place]].item() / math.log(2)
        for places in zip(found.student.tolist(), found.teacher.tolist(), strict=True):
            if places[0] + 1 < len(both[0][0]):  # a token follows
                q, p = (both[i][1][places[i]].exp() @ tables[i] for i in (0, 1))
                divergences.append(torch.where(p > 0, p * (p / q).log(), 0.0).sum().item())
    return [each / size for each in bits], size, divergences


def test_bits_and_bytes_are_those_of_a_plain_computation():
    pair = models()
    bits, size, divergences = naive_metrics(pair, TEXTS)
    found = byte_metrics(*pair, STUDENT, TEACHER, [{"text": t} for t in TEXTS], batch_size=3)
    assert (found.bytes, found.positions) == (size, len(divergences))
    assert found.student_bits_per_byte == pytest.approx(bits[0], rel=1e-5)
    assert found.teacher_bits_per_byte == pytest.approx(bits[1], rel=1e-5)
    expected = sum(divergences) / len(divergences)
    assert found.first_byte_kl == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_a_byte_that_the_student_cannot_write_is_infinitely_improbable():
    limited = tokenizer_of("unigram")  # it does not fall back to bytes
    pair = tiny_llama(0, vocab=len(limited)), tiny_llama(1, vocab=len(TEACHER))
    tokenizers, texts = (limited, TEACHER), [{"text": text} for text in TEXTS[:2]]
    assert byte_metrics(*pair, *tokenizers, texts).first_byte_kl == math.inf
    found = byte_metrics(*reversed(pair), *reversed(tokenizers), texts)
    assert 0 < found.first_byte_kl < 10


def test_answers_alone_are_measured_and_equal_models_do_not_differ():
    model = tiny_llama(0, vocab=len(STUDENT)).train()
    prompt, answer = (STUDENT(text).input_ids for text in ("the mats:", " cats and a singer"))
    example = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    found = byte_metrics(model, model, STUDENT, STUDENT, [example, example])
    assert model.training
    assert found.bytes == 2 * len(" cats and a singer")
    assert found.positions == 2 * len(answer)
    assert found.student_bits_per_byte == found.teacher_bits_per_byte > 0
    assert found.first_byte_kl == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="no two common positions"):
        byte_metrics(model, model, STUDENT, STUDENT, [{"text": ""}])
