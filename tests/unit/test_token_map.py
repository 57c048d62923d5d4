"""Which tokens of the student a token of the teacher stands for."""

import itertools

import pytest
import torch
from hypothesis import given

from otkd.alignment import TokenMap, common_positions, shared_tokens, token_ends, token_map
from otkd.alignment.matching import LONGER_SHARE
from otkd.alignment.pieces import vocabulary_of
from tests.problems import generator, seeds

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.small_tokenizers import MAKERS, SENTENCES, tokenizer_of  # noqa: E402

close = torch.testing.assert_close
NAMES = [name for name in MAKERS if "Llama" not in name]  # whose tokens are SentencePiece's
every_pair = pytest.mark.parametrize(
    ("student", "teacher"), list(itertools.permutations(NAMES, 2)), ids=str
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path))
    return tmp_path / "token_maps"


def dense(found):
    """The matrix, ``(teacher_tokens, student_tokens)``."""
    matrix = torch.zeros(found.vocab_size[1], found.vocab_size[0], dtype=torch.float64)
    matrix[found.teacher, found.student] = found.weight.double()
    return matrix


def kind_of(found, token):
    return found.KINDS[found.kinds[token]]


@pytest.mark.parametrize("name", MAKERS)
def test_identical_tokenizers_have_the_identity(name):
    tokenizer = tokenizer_of(name)
    found = token_map(tokenizer, tokenizer)
    size = len(tokenizer)
    assert found.vocab_size == (size, size)
    assert found.student.tolist() == found.teacher.tolist() == list(range(size))
    assert (found.weight == 1).all()
    assert {kind_of(found, token) for token in range(size)} == {"exact", "role"}
    counted = token_map(tokenizer, tokenizer, texts=SENTENCES)
    close(dense(counted), torch.eye(size, dtype=torch.float64))
    assert [ids.tolist() for ids in found.exact] == [list(range(size))] * 2


@every_pair
def test_rows_are_stochastic_and_exact_pairs_are_the_shared_tokens(student, teacher):
    one, other = tokenizer_of(student), tokenizer_of(teacher)
    found = token_map(one, other)
    matrix = dense(found)
    mapped = torch.tensor([kind_of(found, token) != "nothing" for token in range(len(other))])
    close(matrix.sum(1), mapped.double())
    shared = shared_tokens(one, other)
    pairs = set(zip(*(ids.tolist() for ids in found.exact), strict=True))
    expected = set(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))
    assert expected <= pairs
    for s, t in pairs - expected:  # a single byte, which has two tokens in both vocabularies
        assert one.convert_ids_to_tokens(s) == other.convert_ids_to_tokens(t)
        assert one.convert_ids_to_tokens(s).startswith("<0x")
    for s, t in pairs:
        assert matrix[t].argmax() == s
        assert matrix[t, s] in (1, torch.tensor(1 - LONGER_SHARE).double())


@every_pair
def test_the_first_token_is_that_of_the_tokenisation(student, teacher):
    one, other = tokenizer_of(student), tokenizer_of(teacher)
    found, raw = token_map(one, other), vocabulary_of(other).raw
    comma = one(",", add_special_tokens=False).input_ids
    checked = 0
    for token in (found.kinds == found.KINDS.index("first")).nonzero().squeeze(-1).tolist():
        try:
            text = raw[token].decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        # After a comma, no space is added, and a letter begins no word of byte-level BPE.
        if student != "wordpiece" or text.startswith(" "):
            ids = one(f",{text}", add_special_tokens=False).input_ids
            if ids[: len(comma)] == comma and ids[len(comma)] != one.unk_token_id:
                assert found.target[token] == ids[len(comma)], text
                checked += 1
    few = "byte-level, small", "byte-level, space", "unigram"
    assert checked > 3 or teacher.startswith(few)  # few tokens


def of_words(words, **special):
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[U]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.normalizer = tokenizers.normalizers.Lowercase()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[U]", **special
    )


def test_the_rules_one_by_one():
    student = of_words(
        ["[U]", "un", "##un", "##s", "unlike", "cats", ",", "[END]", "<tool>", "<x>"],
        eos_token="[END]",
        additional_special_tokens=["<tool>", "<x>"],
    )
    pieces = [
        "<end>",
        "Ġun",
        "un",
        "ĠUn",
        "Ġunsaid",
        "unsaid",
        "Ċ",
        "ĠĊ",
        "Ġ,",
        "ca",
        "Ġcat",
        "<tool>",
    ]
    pieces += ["<y>", "Ġc", "Ġu", "Ġun,"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.BPE({**vocab, "Ġ": 16, "c": 17, "u": 18}, [("Ġ", "c"), ("Ġ", "u")])
    teacher = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        eos_token="<end>",
        additional_special_tokens=["<tool>", "<y>"],
    )
    found = token_map(student, teacher)
    names = student.convert_ids_to_tokens(range(10))
    matrix = dense(found)
    written = {
        piece: (
            kind_of(found, token),
            {names[s]: round(w, 4) for s, w in enumerate(matrix[token].tolist()) if w},
        )
        for piece, token in vocab.items()
    }
    few = LONGER_SHARE
    assert written == {
        "<end>": ("role", {"[END]": 1}),
        "Ġun": ("exact", {"un": 1}),
        "un": ("exact", {"##un": 1}),
        "ĠUn": ("first", {"un": 1}),  # the student reads it in lower case
        "Ġunsaid": ("first", {"un": 1}),
        "unsaid": ("first", {"##un": 1}),
        "Ċ": ("nothing", {}),
        "ĠĊ": ("nothing", {}),
        "Ġ,": ("first", {",": 1}),
        "ca": ("nothing", {}),
        "Ġcat": ("nothing", {}),
        "<tool>": ("exact", {"<tool>": 1}),
        "<y>": ("nothing", {}),
        "Ġc": ("longer", {"cats": 1}),
        "Ġu": ("longer", {"unlike": 1}),
        "Ġun,": ("first", {"un": 1}),
    }
    back = token_map(teacher, student)
    assert kind_of(back, names.index("cats")) == "first"
    assert dense(back)[names.index("cats"), vocab["Ġc"]] == 1
    assert dense(back)[names.index("un"), vocab["Ġun"]] == pytest.approx(1 - few)
    assert dense(back)[names.index("un"), vocab["Ġunsaid"]] > 0  # ĠUn is none of it


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("byte-level", "byte-level, small"), ("sentencepiece", "byte-level"), ("wordpiece",) * 2],
)
def test_texts_are_counted_at_common_positions(student, teacher):
    one, other = tokenizer_of(student), tokenizer_of(teacher)
    texts = ["the cats sat, singing", "", "7 mats on the café", "中 x"]
    counts = dense(token_map(one, other))
    for text in texts:
        sides = [
            token_ends(tokenizer, text, add_special_tokens=False) for tokenizer in (one, other)
        ]
        found = common_positions(*sides)
        places = [(-1, -1), *zip(found.student.tolist(), found.teacher.tolist(), strict=True)]
        for i, j in places[:-1] if text else ():
            if sides[0].ids[i + 1] not in one.all_special_ids:
                counts[sides[1].ids[j + 1], sides[0].ids[i + 1]] += 1
    expected = counts / counts.sum(1, keepdim=True).clamp(min=1e-300)
    counted = token_map(one, other, texts=texts)
    close(dense(counted), expected, rtol=1e-6, atol=1e-7)


@given(seed=seeds)
def test_push_is_a_product_with_the_matrix(seed):
    draw = generator(seed)
    teacher, student = (torch.randint(0, n, (20,), generator=draw) for n in (6, 4))
    weight = torch.rand(20, generator=draw)
    kinds, target = torch.zeros(6, dtype=torch.uint8), torch.full((6,), -1)
    found = TokenMap.of_weights(student, teacher, weight, target, kinds, (4, 6))
    matrix = torch.zeros(6, 4, dtype=torch.float64)
    matrix.index_put_((teacher, student), weight.double(), accumulate=True)
    matrix = (matrix / matrix.sum(1, keepdim=True)).nan_to_num(0)
    close(dense(found), matrix, rtol=1e-6, atol=1e-7)
    masses = torch.rand(2, 3, 6, generator=draw, dtype=torch.float64)
    close(found.push(masses), masses @ matrix, rtol=1e-6, atol=1e-7)


def test_push_needs_the_size_of_the_teacher():
    found = TokenMap.of_pairs([0], [1], (2, 3))
    with pytest.raises(ValueError, match=r"for 3 tokens .*, got 4: .* vocab_size=\(2, 3\)"):
        found.push(torch.rand(4))


# Files -------------------------------------------------------------------------------------------


def test_a_map_is_saved_with_a_checksum(tmp_path):
    found = token_map(tokenizer_of("byte-level"), tokenizer_of("wordpiece"))
    path = tmp_path / "map.safetensors"
    found.save(path)
    loaded = TokenMap.load(path)
    for name, value in vars(found).items():
        assert (
            getattr(loaded, name) == value
            if name == "vocab_size"
            else (torch.equal(getattr(loaded, name), value))
        )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        TokenMap.load(path)


def test_the_map_is_kept_by_the_hash_of_both_tokenizers(cache):
    one, other = tokenizer_of("byte-level"), tokenizer_of("wordpiece")
    found = token_map(one, other)
    (path,) = cache.iterdir()
    one(["the", "the cat"], padding=False, truncation=True, max_length=1)  # changes no token
    TokenMap.of_pairs([5], [6], found.vocab_size).save(path)
    assert token_map(one, other).student.tolist() == [5]  # it is read
    path.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="cannot be used and is computed again"):
        again = token_map(one, other)
    assert torch.equal(again.student, found.student)
    token_map(other, one)
    changed = transformers.PreTrainedTokenizerFast(
        tokenizer_object=one.backend_tokenizer, eos_token="<|start|>"
    )
    token_map(changed, other)
    assert len(list(cache.iterdir())) == 3


def projection():
    indices = torch.tensor([[2, -1], [0, 2], [-1, -1]])
    likelihoods = torch.tensor([[1.0, 9.0], [0.5, 3.0], [9.0, 9.0]])
    return {"indices": indices, "likelihoods": likelihoods}


@pytest.mark.parametrize("form", ["mapping", "projection.pt", "projection.safetensors"])
def test_a_projection_of_x_token(form, tmp_path):
    from safetensors.torch import save_file

    given_form = projection()
    if form.endswith("pt"):
        given_form = tmp_path / form
        torch.save(projection(), given_form)
    elif form.endswith("tensors"):
        given_form = tmp_path / form
        save_file(projection(), given_form)
    found = TokenMap.from_projection(given_form, 4)
    assert found.vocab_size == (3, 4)
    expected = torch.tensor([[0, 1, 0], [0, 0, 0], [0.25, 0.75, 0], [0, 0, 0]])
    close(dense(found), expected.double())
    assert [kind_of(found, token) for token in range(4)] == ["first", "nothing"] * 2
    assert found.target.tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": None}, "holds 'indices' and 'likelihoods'"),
        ({"likelihoods": torch.ones(3, 1)}, r"must both be \(student_tokens, k\), got \(3, 2\)"),
        ({"indices": torch.full((3, 2), 4)}, "token 4 of the teacher, but teacher_tokens=4"),
        ({"likelihoods": -torch.ones(3, 2)}, "likelihoods must be finite and at least 0"),
    ],
)
def test_wrong_projections(change, message):
    with pytest.raises(ValueError, match=message):
        TokenMap.from_projection({**projection(), **change}, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": torch.tensor([0, 2])}, "student from 0 to 2, but .* has 2 tokens"),
        ({"teacher": torch.tensor([1, 0])}, "sorted by the teacher's token"),
        ({"weight": torch.tensor([1.0, 0.5])}, "must add up to 1"),
        ({"weight": torch.tensor([2.0, -1.0])}, "finite and at least 0"),
    ],
)
def test_wrong_maps(fields, message):
    sound = {
        "teacher": torch.tensor([0, 1]),
        "student": torch.tensor([0, 1]),
        "weight": torch.ones(2),
        "target": torch.tensor([0, 1]),
        "kinds": torch.zeros(2, dtype=torch.uint8),
        "vocab_size": (2, 2),
    }
    TokenMap(**sound)
    with pytest.raises(ValueError, match=message):
        TokenMap(**sound | fields)


def unigram_of(*scores):
    vocab = [("<unk>", 0.0), *scores]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_unigram_writes_the_most_probable_tokens_and_not_the_longest():
    student = unigram_of(("▁", -9.0), ("▁a", -1.0), ("▁ab", -9.0), ("bc", -1.0), ("c", -9.0))
    teacher = unigram_of(("▁abc", -1.0), ("▁ab", -1.0), ("▁x", -1.0), ("xc", -1.0), ("▁", -9.0))
    found = token_map(student, teacher)
    kinds = [kind_of(found, token) for token in range(len(teacher))]
    assert kinds == ["role", "first", "exact", "first", "nothing", "exact"]  # x is unknown
    written = [token for token in found.target.tolist() if token >= 0]
    assert student.convert_ids_to_tokens(written) == ["<unk>", "▁a", "▁ab", "▁", "▁"]
    # Of the tokens that the teacher lacks, "▁a" begins with its "▁".
    longer = found.student[found.teacher == teacher.convert_tokens_to_ids("▁")].tolist()
    assert student.convert_ids_to_tokens(longer) == ["▁", "▁a"]
