"""Rows of instructions: what is read, what is refused by name, and what a model is trained on."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers

from otkd.tasks import DataError
from otkd.tasks.causal_lm import (
    encode_instructions,
    fitting_prompts,
    padding_collator,
    read_instructions,
    rouge_l,
    sampled_answers,
)
from otkd.tasks.causal_lm.instructions import digest_of
from tests.models import VOCAB, save_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} w3 {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant w3 {% endif %}"
)
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, VOCAB)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder, VOCAB)
    return transformers.AutoTokenizer.from_pretrained(folder, chat_template=TEMPLATE)


@pytest.fixture
def read(tmp_path):
    """Reads rows that are written to a file, one object or text per line."""

    def read(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return read_instructions(tmp_path / "rows.jsonl")

    return read


def row(instruction="w5 w6", output="w7 w8", **more):
    return {"instruction": instruction, "output": output, **more}


def talk(*contents):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


# Reading


def test_the_three_forms_of_a_row(read):
    plain, with_input, messages = read(row(), "", row(input="w9"), talk("w5", "w6"))
    assert [r.where.rpartition(", ")[2] for r in (plain, with_input, messages)] == [
        "line 1",
        "line 3",
        "line 4",
    ]
    assert plain.messages[0] == {"role": "user", "content": "w5 w6"}
    assert plain.answers == ("w7 w8",)
    assert with_input.messages[0]["content"] == "w5 w6\n\nw9"
    assert messages.answers == ("w6",)
    assert plain.text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nw5 w6\n\n### Response:\n"
    )
    assert "paired with an input" in with_input.text
    assert with_input.text.endswith("### Input:\nw9\n\n### Response:\n")
    assert "\nw5\n" in messages.text


def test_another_answer_makes_a_row_of_the_same_prompt(read):
    rows = read(row(), row(input="w9"), talk("w5", "w6"), talk("w5", "w6", "w7", "w8"))
    again = read(*(each.answered("w12") for each in rows))
    assert [each.messages for each in again] == [each.messages for each in rows]
    assert [each.text for each in again] == [each.text for each in rows]
    assert all(each.answers == ("w12",) for each in again)


def test_several_answers_are_kept(read):
    assert read(row(output=["w7", "w8"]))[0].answers == ("w7", "w8")


def test_a_data_set_of_the_hub_is_read_likewise(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([row(input=""), row(output=" ")])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    with pytest.raises(DataError, match="some/name, row 2: the answer"):
        read_instructions("some/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows.select([0]))
    assert read_instructions("some/name")[0].where == "some/name, row 1"


WRONG = {
    "not JSON": ('{"instruction": ', "not JSON"),
    "no object": ("[1, 2]", "not a JSON object"),
    "no output": ({"instruction": "w5"}, "no column 'output'; the row has instruction"),
    "no column at all": ({}, "no column 'instruction' or 'output'; the row has none"),
    "empty answer": (row(output=""), "the answer .output. is ''"),
    "blank answer": (row(output=" \n"), "not empty"),
    "no answers": (row(output=[]), "the answer"),
    "a number": (row(output=3), "the answer .output. is 3"),
    "empty instruction": (row(instruction=" "), "the instruction not empty"),
    "no answer of the assistant": (talk("w5"), "after at least one other"),
    "the user last": (talk("w5", "w6", "w7"), "the assistant's answer"),
    "no role": ({"messages": [{"content": "w5"}, {"content": "w6"}]}, "role and content"),
    "empty message": (talk("", "w6"), "message of the user is empty"),
    "empty last message": (talk("w5", " "), "the answer .last message."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_named_by_file_and_line(read, name):
    wrong, message = WRONG[name]
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: .*{message}"):
        read(row(), "", wrong)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        read_instructions(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        read_instructions(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(DataError, match=r"bytes\.jsonl, line 1: the byte 0xff"):
        read_instructions(tmp_path / "bytes.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no/such-name is no file, and no data set of the hub"):
        read_instructions("no/such-name")


# Tokens


texts = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9).map(
    lambda ids: " ".join(f"w{i}" for i in ids)
)


@given(prompt=texts, answer=texts, length=st.integers(22, 40))
def test_only_the_answer_and_its_end_have_labels(chat, tmp_path_factory, prompt, answer, length):
    path = tmp_path_factory.getbasetemp() / "one.jsonl"
    path.write_text(json.dumps(row(prompt, answer)))
    (encoded,) = encode_instructions(read_instructions(path), chat, length)
    whole = chat(f"user w3 {prompt} <eos> assistant w3 {answer} <eos>").input_ids[:length]
    counted = [i for i, label in enumerate(encoded["labels"]) if label != -100]
    first = len(chat(f"user w3 {prompt} <eos> assistant w3").input_ids)
    assert encoded["input_ids"] == whole
    assert counted == [*range(first, len(whole))]
    assert [encoded["labels"][i] for i in counted] == whole[first:]
    assert encoded["attention_mask"] == [1] * len(whole)


def test_without_a_chat_template_the_prompt_is_that_of_alpaca(read, tokenizer):
    rows = read(row())
    (encoded,) = encode_instructions(rows, tokenizer, 100)
    prompt = tokenizer(rows[0].text).input_ids
    assert encoded["input_ids"] == [*prompt, 7, 8, EOS]
    assert encoded["labels"] == [-100] * len(prompt) + [7, 8, EOS]


def test_a_conversation_needs_a_chat_template(read, tokenizer, chat):
    rows = read(row(), talk("w5", "w6", "w7", "w8"))
    with pytest.raises(DataError, match="line 2: a conversation of 3 messages needs"):
        encode_instructions(rows, tokenizer, 100)
    encoded = encode_instructions(rows, chat, 100)[1]
    assert encoded["input_ids"][-3:] == [3, 8, EOS]
    assert [x for x in encoded["labels"] if x != -100] == [8, EOS]


def test_messages_that_a_chat_template_refuses_are_named(read, tmp_path):
    save_tokenizer(tmp_path, VOCAB)
    template = "{{ raise_exception('roles must alternate') }}"
    strict = transformers.AutoTokenizer.from_pretrained(tmp_path, chat_template=template)
    with pytest.raises(DataError, match="chat template refuses the messages: roles must"):
        encode_instructions(read(row()), strict, 32)


def test_a_long_prompt_is_refused_by_name_or_left_out_with_a_warning(read, chat, caplog):
    rows = read(row(), row("w5 " * 20), row("w5 " * 30))
    with pytest.raises(DataError, match=r"line 2: the prompt has 25 tokens, but at most 11 fit"):
        encode_instructions(rows, chat, 12)
    assert len(encode_instructions(rows, chat, 12, skip_long=True)) == 1
    assert "line 2" in caplog.text
    assert "2 such rows are left out" in caplog.text
    assert [len(tokens) for _, tokens in fitting_prompts(rows, chat, 25, skip_long=True)] == [7, 25]
    with pytest.raises(DataError, match="3 of 3 rows"):
        fitting_prompts(rows, chat, 3, skip_long=True)


def test_a_tokenizer_that_ends_no_sequence_is_refused(read, tmp_path):
    save_tokenizer(tmp_path, VOCAB)
    endless = transformers.AutoTokenizer.from_pretrained(tmp_path)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_instructions(read(row()), endless, 30)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_side_that_was_asked_for(read, chat, side):
    encoded = encode_instructions(read(row(), row("w5 w6 w7")), chat, 30)
    batch = padding_collator(chat, side)([*encoded])
    place = 0 if side == "left" else -1
    assert batch["input_ids"][0, place] == chat.pad_token_id
    assert batch["attention_mask"][0].sum() == batch["attention_mask"].shape[1] - 1
    assert batch["labels"][0, place] == -100
    other = padding_collator(chat, "right" if side == "left" else "left")([*encoded])
    assert other["attention_mask"][0, place] == 1  # neither collator changed the other's tokenizer


def test_a_collator_needs_a_padding_token(tmp_path):
    save_tokenizer(tmp_path, VOCAB)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        padding_collator(tokenizer)
    with pytest.raises(ValueError, match="'left', 'right'"):
        padding_collator(tokenizer, "both")


def test_the_digest_depends_on_texts_alone(read):
    first = digest_of(read(row()))
    assert first == digest_of(read("", row()))
    assert first != digest_of(read(row(output="w7 w9")))


# Answers


def test_samples_depend_on_the_seed_and_the_number_of_their_batch(chat):
    model, prompts = tiny_llama().train(), [[5, 6], [7], [8, 9, 10], [11], [12]]
    options = {"max_new_tokens": 4, "batch_size": 2}

    def sample(prompts, seed):
        state = torch.random.get_rng_state()
        found = [*sampled_answers(model, chat, prompts, seed=seed, **options)]
        assert torch.equal(state, torch.random.get_rng_state())
        return found

    every = sample(prompts, 0)
    assert [len(batch) for batch in every] == [2, 2, 1]
    assert all(len(text.split()) <= 4 for batch in every for text in batch)
    assert sample(prompts, 0) == every
    assert sample(prompts[2:], 1) == every[1:]
    assert sample(prompts, 1) != every
    assert model.training


def test_a_prompt_is_continued_as_if_it_were_alone(chat):
    """Padding on the left changes nothing: a temperature near 0 picks the most probable tokens."""
    model, prompts = tiny_llama(), [[5, 6, 7, 8], [9]]
    options = {"max_new_tokens": 3, "seed": 0, "temperature": 1e-4}
    (together,) = sampled_answers(model, chat, prompts, **options)
    alone = [next(sampled_answers(model, chat, [prompt], **options))[0] for prompt in prompts]
    assert together == alone


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    # 3 of 4 tokens are in the subsequence "a c d", of 4 and of 5: 2·(3/4)(3/5)/(3/4 + 3/5).
    value = rouge_l(["a b c d"], [["a c x d y"]])
    assert value == pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)
    assert rouge_l(["running"], [["runs"]]) == 100  # stemmed
    assert rouge_l(["a", "b"], [["x", "a"], ["c"]]) == 50  # the best of the references
    with pytest.raises(ValueError, match="as many answers"):
        rouge_l(["a"], [])
