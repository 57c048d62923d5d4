import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otkd
from otkd.alignment import (
    AnchorMap,
    SharedTokens,
    align_embeddings,
    aligned_cost,
    fit_map,
    shared_tokens,
)
from otkd.costs import EmbeddingCost
from tests.problems import generator, logits, points, seeds

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("seeded")
close = torch.testing.assert_close

METHODS = ("procrustes", "least_squares")
SPECIAL = {"bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token"}

# What each token of a vocabulary stands for, written by hand. None: it is special.
BYTE_LEVEL = {
    "<|end|>": None,
    "Ġthe": " the",
    "the": "the",
    "Ġ": " ",
    "ĠĠĠ": "   ",
    "ing": "ing",
    "Ġing": " ing",
    ",": ",",
    "Ġ,": " ,",
    "Ġ7": " 7",
    "7": "7",
    "cafÃ©": "café",
    "ĠcafÃ©": " café",
    "Ã": "<0xC3>",
    "©": "<0xA9>",
    "Ċ": "\n",
    "ä¸Ń": "中",
    "âĤ¬": "€",
    "##": "##",
    "ĠThe": " The",
}
SENTENCEPIECE = {
    "<s>": None,
    "</s>": None,
    "<unk>": None,
    "<0x2C>": None,  # "," has a token of its own
    "<0x0A>": "\n",
    "<0xC3>": "<0xC3>",
    "▁the": " the",
    "the": "the",
    "▁": " ",
    "▁▁▁": "   ",
    "ing": "ing",
    ",": ",",
    "▁,": " ,",
    "▁7": " 7",
    "café": "café",
    "中": "中",
    "▁中": " 中",
    "€": "€",
    "▁new▁york": " new york",
}
WORDPIECE = {
    "[PAD]": None,
    "[UNK]": None,
    "[CLS]": None,
    "[SEP]": None,
    "[MASK]": None,
    "##,": None,  # the bare one comes first
    "the": " the",
    "##the": "the",
    "##ing": "ing",
    ",": ",",
    "#": "#",
    "##": " ##",
    "7": " 7",
    "##7": "7",
    "café": " café",
    "##é": "é",
    "中": "中",
    "—": "—",
    "€": " €",
    "a": " a",
}
PLAIN = {"the": "the", ",": ",", "café": "café", " the": " the", "</s>": None}
FAMILIES = {
    "byte-level": (BYTE_LEVEL, {"eos_token": "<|end|>"}),
    "sentencepiece": (
        SENTENCEPIECE,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "wordpiece": (
        WORDPIECE,
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    ),
    "plain": (PLAIN, {"eos_token": "</s>"}),
}


def written(vocabulary, **special):
    """A tokenizer with these very tokens; alignment asks for the vocabulary alone."""
    model = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, "")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), **special
    )


def family(name):
    vocabulary, special = FAMILIES[name]
    return written(vocabulary, **special)


SENTENCES = ["the cat sat on the mat, singing", "a café in the old town — 7 cats, 7 mats"] * 4


def trained(kind):
    """A tokenizer of the library, trained on a few sentences."""
    pre, models = tokenizers.pre_tokenizers, tokenizers.models
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=["[UNK]"], show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


# Shared tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("student", FAMILIES)
def test_tokens_meet_that_stand_for_the_same_text(student, teacher):
    shared = shared_tokens(family(student), family(teacher))
    pieces = [list(FAMILIES[name][0]) for name in (student, teacher)]
    texts = [FAMILIES[name][0] for name in (student, teacher)]
    found = {
        (pieces[0][i], pieces[1][j], text)
        for text, i, j in zip(shared.strings, shared.student, shared.teacher, strict=True)
        if not (text.startswith("<") and text[1:-1] + "_token" in SPECIAL | {"mask_token"})
    }
    expected = {
        (one, other, text)
        for one, text in texts[0].items()
        for other, its_text in texts[1].items()
        if text is not None and text == its_text
    }
    assert found == expected
    assert len(found) >= 3
    assert shared.student.dtype == shared.teacher.dtype == torch.long
    assert (shared.student.diff() > 0).all()  # ascending, each once
    assert len(shared.teacher.unique()) == len(shared) == len(shared.student)


def roles(student, teacher):
    shared = shared_tokens(student, teacher)
    names = student.get_vocab(), teacher.get_vocab()
    first, second = ({i: piece for piece, i in vocab.items()} for vocab in names)
    return {
        text: (first[i], second[j])
        for text, i, j in zip(
            shared.strings, shared.student.tolist(), shared.teacher.tolist(), strict=True
        )
        if text.startswith("<")
    }


def test_special_tokens_meet_by_their_role_alone():
    vocabulary = ["</s>", "<s>", "<pad>", "[MASK]", "Ġa", "Ġb"]
    one = written(vocabulary, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    other = written(
        ["<pad>", "<s>", "<end>", "</s>", "▁a"],
        eos_token="<end>",
        unk_token="<s>",
        pad_token="</s>",
    )
    assert roles(one, other) == {"<eos>": ("</s>", "<end>"), "<pad>": ("<pad>", "</s>")}
    # One token in many roles is an anchor once, as the first of them.
    lone = written(["<|end|>", "Ġa"], eos_token="<|end|>", pad_token="<|end|>", bos_token="<|end|>")
    assert roles(lone, one) == {"<eos>": ("<|end|>", "</s>")}
    assert roles(one, lone) == {"<eos>": ("</s>", "<|end|>")}
    assert roles(one, family("wordpiece")) == {"<pad>": ("<pad>", "[PAD]")}


def test_added_tokens_are_read_as_they_are_written():
    one, other = family("byte-level"), family("sentencepiece")
    for tokenizer in (one, other):
        tokenizer.add_tokens(["<|user|>", "naïve"])
    shared = shared_tokens(one, other)
    for text in ("<|user|>", "naïve"):
        place = shared.strings.index(text)
        assert shared.student[place] == one.convert_tokens_to_ids(text)
        assert shared.teacher[place] == other.convert_tokens_to_ids(text)


@pytest.mark.parametrize("teacher", ["byte-level", "wordpiece", "sentencepiece"])
@pytest.mark.parametrize("student", ["byte-level", "wordpiece", "sentencepiece"])
def test_trained_tokenizers(student, teacher):
    one, other = trained(student), trained(teacher)
    shared = shared_tokens(one, other)
    for text in (" the", " cat", ",", "s"):
        assert text in shared.strings
    for text, i, j in zip(shared.strings, shared.student, shared.teacher, strict=True):
        decoded = [t.decode([int(k)]).removeprefix("##") for t, k in ((one, i), (other, j))]
        if "�" not in decoded[0] + decoded[1] and text != " [UNK]":  # a part of a character
            assert decoded[0].strip() == decoded[1].strip() == text.strip()
    # The ids are those by which the tokenizers write the text.
    lookup = dict(zip(shared.strings, shared.student.tolist(), strict=True))
    assert one.encode("the cat", add_special_tokens=False).ids == [lookup[" the"], lookup[" cat"]]


def test_no_tokenizer():
    with pytest.raises(TypeError, match=r"with get_vocab\(\), got dict"):
        shared_tokens({"a": 1}, family("plain"))


# Maps --------------------------------------------------------------------------------------------


def semi_orthogonal(seed, rows, columns):
    square = torch.linalg.qr(points(seed, max(rows, columns), max(rows, columns)))[0]
    return square[:rows, :columns]


@given(seed=seeds, widths=st.sampled_from([(4, 4), (3, 7)]), scale=st.sampled_from([0.02, 3.0]))
def test_procrustes_recovers_a_rotation_with_scale_and_shift(seed, widths, scale):
    source = points(seed, 40, widths[0]) + 5
    weight, bias = scale * semi_orthogonal(seed + 1, *widths), points(seed + 2, widths[1], 1)[:, 0]
    fitted = fit_map(source, source @ weight + bias)
    close(fitted.weight, weight)
    close(fitted.bias, bias)
    assert fitted.residual < 1e-10
    assert fitted.anchors == 40
    others = points(seed + 3, 6, widths[0]).reshape(2, 3, -1)
    close(fitted.apply(others), others @ weight + bias)


@given(seed=seeds, widths=st.sampled_from([(4, 4), (3, 5), (6, 2)]))
def test_no_other_semi_orthogonal_map_fits_as_well(seed, widths):
    source, target = points(seed, 20, widths[0]) - 1, points(seed + 1, 20, widths[1]) + 2
    fitted = fit_map(source, target)
    x, y = source - source.mean(0), target - target.mean(0)
    scale = torch.linalg.svdvals(fitted.weight)
    close(scale, scale[:1].expand_as(scale))
    best = (x @ (fitted.weight / scale[0]) * y).sum()
    for other in range(20):
        assert best >= (x @ semi_orthogonal(seed + other, *widths) * y).sum()
    errors = [(x @ fitted.weight * factor - y).norm() for factor in (0.99, 1.0, 1.01)]
    assert errors[1] == min(errors)
    close(fitted.apply(source).mean(0), target.mean(0))


@given(seed=seeds, ridge=st.sampled_from([1e-6, 1e-2, 3.0]))
def test_least_squares_is_ridge_regression(seed, ridge):
    source, target = points(seed, 30, 4) + 3, points(seed + 1, 30, 6)
    fitted = fit_map(source, target, method="least_squares", ridge=ridge)
    # Ordinary least squares with a row of √λ for every unknown, by another algorithm.
    x, y = source - source.mean(0), target - target.mean(0)
    penalty = ridge * x.square().sum(0).mean()
    rows = torch.cat([x, penalty.sqrt() * torch.eye(4, dtype=x.dtype)])
    weight = torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(4, 6)])).solution
    close(fitted.weight, weight)
    close(fitted.bias, target.mean(0) - source.mean(0) @ weight)


@pytest.mark.parametrize("method", METHODS)
def test_the_residual_is_that_of_anchors_not_fitted_on(method):
    source, noise = points(1, 200, 30), points(2, 200, 30)
    image = 2 * source @ semi_orthogonal(3, 30, 30)
    assert fit_map(source, image, method=method).residual < 2e-3
    half = fit_map(source, image + 2 * noise, method=method).residual
    assert 0.6 < half < 0.95
    assert fit_map(source, noise, method=method).residual > 0.95
    # With hardly more anchors than unknowns a fit reaches all that it sees.
    few = fit_map(source[:32], noise[:32], method="least_squares", ridge=1e-9)
    missed = few.apply(source[:32]) - noise[:32]
    assert missed.norm() < 0.5 * noise[:32].norm()
    assert few.residual > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_anchors_are_summed_in_blocks(method, monkeypatch):
    source, target = points(1, 50, 4) + 1, points(2, 50, 3)
    whole = fit_map(source, target, method=method)
    state = torch.get_rng_state()
    monkeypatch.setattr("otkd.alignment.maps._BLOCK", 7)
    blocks = fit_map(source, target, method=method)
    close(blocks.weight, whole.weight)
    close(blocks.bias, whole.bias)
    assert blocks.residual == pytest.approx(whole.residual)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_of_a_map(dtype):
    source = points(1, 40, 4).to(dtype).requires_grad_()
    target = (source.detach().double() @ semi_orthogonal(2, 4, 5) + 1).to(dtype).requires_grad_()
    fitted = fit_map(source, target)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert fitted.weight.dtype == fitted.bias.dtype == fitted.apply(source).dtype == expected
    assert not fitted.weight.requires_grad
    assert fitted.residual < 10 * torch.finfo(dtype).eps


def test_refused_anchors():
    x, y = points(1, 20, 4), points(2, 20, 6)
    bad = x.clone()
    bad[7, 2] = torch.nan
    for error, message, source, target, options in (
        (ValueError, "method must be one of", x, y, {"method": "affine"}),
        (ValueError, "ridge= is only used by method='least_squares'", x, y, {"ridge": 0.1}),
        (
            ValueError,
            "ridge must be a finite number above 0",
            *(x, y),
            {"method": "least_squares", "ridge": 0.0},
        ),
        (ValueError, "row 7 of the source anchors holds NaN", bad, y, {}),
        (ValueError, "row 7 of the target anchors holds NaN", y, bad, {}),
        (ValueError, "row for every anchor, got 20 and 19", x, y[1:], {}),
        (ValueError, "from width 4 to 6 needs at least 5 anchors, got 4", x[:4], y[:4], {}),
        (ValueError, "from width 6 to 4 needs at least 5 anchors, got 4", y[:4], x[:4], {}),
        (
            ValueError,
            "'least_squares' from width 6 to 4 needs at least 7 anchors, got 6",
            *(y[:6], x[:6], {"method": "least_squares"}),
        ),
        (ValueError, "all source anchors are equal", torch.ones(9, 4), y[:9], {}),
        (ValueError, "all target anchors are equal", x[:9], torch.ones(9, 4), {}),
        (ValueError, r"must be a matrix \(tokens, width\), got \(4,\)", x[0], y, {}),
        (TypeError, "target anchors must be a floating-point tensor", x, y.long(), {}),
        (TypeError, "source anchors must be .* got list", x.tolist(), y, {}),
    ):
        with pytest.raises(error, match=message):
            fit_map(source, target, **options)
    fit_map(x[:5], y[:5])
    with pytest.raises(ValueError, match="the map is for rows of width 4, got 6"):
        fit_map(x, y).apply(y)


# Whole embeddings --------------------------------------------------------------------------------


class Pair:
    """Two models that mean the same by the same text, in spaces turned against each other."""

    def __init__(self, padding: int = 3):
        self.student_tokenizer, self.teacher_tokenizer = trained("byte-level"), trained("wordpiece")
        self.shared = shared_tokens(self.student_tokenizer, self.teacher_tokenizer)
        n, m = (t.get_vocab_size() for t in (self.student_tokenizer, self.teacher_tokenizer))
        self.student = points(1, n + padding, 6)
        self.teacher = points(2, m + 2 * padding, 9)
        self.weight = 0.3 * semi_orthogonal(3, 6, 9)
        self.teacher[self.shared.teacher] = self.student[self.shared.student] @ self.weight - 4
        self.tokenizers = self.student_tokenizer, self.teacher_tokenizer
        self.ids = self.shared.student, self.shared.teacher


def test_all_tokens_follow_the_shared_ones():
    pair = Pair()
    mapped, fitted = align_embeddings(pair.student, pair.teacher, *pair.tokenizers)
    assert isinstance(fitted, AnchorMap)
    assert isinstance(pair.shared, SharedTokens)
    close(mapped, pair.student @ pair.weight - 4)  # padding, too
    assert fitted.residual < 1e-10
    assert fitted.anchors == len(pair.shared)
    for ids in (pair.ids, tuple(side.tolist() for side in pair.ids)):
        again, _ = align_embeddings(pair.student, pair.teacher, anchors=ids)
        close(again, mapped, rtol=0, atol=0)


def test_padding_rows_are_never_anchors():
    pair = Pair()
    mapped, _ = align_embeddings(pair.student, pair.teacher, *pair.tokenizers)
    changed = pair.student.clone(), pair.teacher.clone()
    for embedding, tokenizer in zip(changed, pair.tokenizers, strict=True):
        embedding[tokenizer.get_vocab_size() :] += 1000
    moved, fitted = align_embeddings(*changed, *pair.tokenizers)
    real = pair.student_tokenizer.get_vocab_size()
    close(moved[:real], mapped[:real], rtol=0, atol=0)
    assert fitted.residual < 1e-10


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("method", METHODS)
def test_the_cost_is_that_of_the_mapped_embedding(method, metric):
    pair = Pair()
    options = {"method": method, "ridge": 0.1 if method == "least_squares" else None}
    student = pair.student.clone().requires_grad_()
    teacher = pair.teacher.clone().requires_grad_()
    cost = aligned_cost(student, teacher, *pair.tokenizers, **options, metric=metric)
    mapped, _ = align_embeddings(student, teacher, *pair.tokenizers, **options)
    assert not mapped.requires_grad
    expected = EmbeddingCost(mapped, pair.teacher, metric=metric)
    shape = len(mapped), len(pair.teacher)
    close(cost(*shape), expected(*shape))
    assert not cost.one_vocabulary
    assert not cost.learns
    assert not cost(*shape).requires_grad
    again = aligned_cost(student, teacher, anchors=pair.ids, **options, metric=metric)
    close(again(*shape), cost(*shape))


@pytest.mark.parametrize("support", [otkd.supports.Dense(), otkd.supports.TopK(12)])
def test_a_student_that_says_the_same_in_its_own_tokens_has_no_loss(support):
    n, width = 24, 5
    student, order = points(1, n, width), torch.randperm(n, generator=generator(2))
    teacher = (2 * student @ semi_orthogonal(3, width, 8) + 1)[order]
    anchors = order[:12], torch.arange(12)  # token order[i] of the student is the teacher's i
    cost = aligned_cost(student, teacher, anchors=anchors)
    loss = otkd.SinkhornLoss(
        cost, epsilon=0.3, support=support, tolerance=1e-8, max_iterations=2000
    )
    said = logits(4, 6, n)
    assert loss(said, said[:, order]) < 1e-6
    assert loss(said, said) > 0.1


def test_refused_embeddings():
    pair = Pair()
    holed = pair.teacher.clone()
    holed[5] = torch.nan
    ids = torch.arange(10)

    def refuses(message, *args, error=ValueError, **options):
        for function in (align_embeddings, aligned_cost):
            with pytest.raises(error, match=message):
                function(*args, **options)

    both = pair.student, pair.teacher
    refuses("row 5 of the teacher embedding holds NaN", pair.student, holed, *pair.tokenizers)
    refuses("pass both tokenizers, or anchors=", *both)
    refuses("pass both tokenizers, or anchors=", *both, pair.student_tokenizer)
    refuses("not both", *both, pair.student_tokenizer, anchors=(ids, ids))
    refuses("token 999 of the student's anchors is outside", *both, anchors=([*range(9), 999], ids))
    refuses("token -1 of the teacher's anchors is outside", *both, anchors=(ids, ids - 1))
    refuses("anchors must be a sequence of token ids", *both, anchors=(ids, ids.double()))
    refuses("anchors must be a sequence of token ids", *both, anchors=(ids, ids > 3))
    refuses("anchors must be a sequence of token ids", *both, anchors=(ids, ids[None]))
    refuses("row for every anchor, got 10 and 9", *both, anchors=(ids, ids[1:]))
    refuses("needs at least 7 anchors, got 3", *both, anchors=(ids[:3], ids[:3]))
    refuses("needs at least 7 anchors, got 0", *both, anchors=([], []))
    refuses(
        "outside the 100 rows of the student's", pair.student[:100], pair.teacher, *pair.tokenizers
    )
    refuses("student embedding must be a floating", both[0].long(), both[1], error=TypeError)
    nothing = written(["▁xyz"])
    refuses("needs at least 7 anchors, got 0", *both, pair.student_tokenizer, nothing)


# The example -------------------------------------------------------------------------------------


def test_the_example_runs():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", root / "examples" / "two_vocabularies.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(": ", 1) for line in done.stdout.strip().splitlines())
    assert int(lines["shared tokens"].split(",")[0]) > 20
    assert "' the'" in lines["shared tokens"]
    assert 0 < float(lines["residual on held-out anchors"]) < 1
    before, after = (float(x) for x in lines["loss before and after a step"].split(" -> "))
    assert 0 < after < before
