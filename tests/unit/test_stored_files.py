"""Stored teachers from elsewhere: from files, from servers, and made by hand."""

import dataclasses
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import otkd
from otkd.costs import EmbeddingCost
from otkd.supports import TopK
from otkd.teachers import DenseTeacher, TopKTeacher
from tests.problems import logits, points

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore::otkd.supports.CoverageWarning"),
]

VOCAB = 12
close = torch.testing.assert_close


def topk_loss(**options):
    cost = EmbeddingCost(points(7, VOCAB, 3))
    return otkd.SinkhornLoss(cost, epsilon=0.2, support=TopK(4), reduction="none", **options)


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def swapped(tensor):
    return tensor[torch.tensor([1, 0, *range(2, len(tensor))])]


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t | {"tokens": swapped(t["tokens"]), "log_masses": swapped(t["log_masses"])},
        lambda t, m: t | {"self_potential": t["self_potential"] * 1.01},
        lambda t, m: t | {"self_potential": torch.full_like(t["self_potential"], torch.nan)},
        lambda t, m: t | {"log_masses": t["log_masses"] - 1e-3},
        lambda t, m: t | {"more": torch.ones(1)},
        lambda t, m: {name: x for name, x in t.items() if name != "self_potential"},
        lambda t, m: m.update(temperature="1.5") or t,
        lambda t, m: m.update(vocab_size="13") or t,
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, change):
    path = tmp_path / "teacher.safetensors"
    stored = topk_loss().with_self_term(TopKTeacher.from_logits(logits(1, 4, VOCAB), 3))
    stored.save(path)
    tensors, metadata = contents(path)
    safetensors.torch.save_file(change(dict(tensors), metadata), path, metadata)
    with pytest.raises(ValueError, match=r"changed after it was saved.*write it again"):
        TopKTeacher.load(path)
    safetensors.torch.save_file(tensors, path, contents_of_saved(stored, tmp_path))
    assert torch.equal(TopKTeacher.load(path).self_potential, stored.self_potential)


def contents_of_saved(stored, folder):
    stored.save(folder / "other.safetensors")
    return contents(folder / "other.safetensors")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_file_that_was_changed_is_refused(tmp_path, dtype):
    path = tmp_path / "teacher.safetensors"
    stored = DenseTeacher(logits(1, 4, VOCAB, dtype=dtype), logits(2, 4, 5, dtype=dtype))
    stored.save(path)
    tensors, metadata = contents(path)
    for name in tensors:
        changed = tensors | {name: swapped(tensors[name])}
        safetensors.torch.save_file(changed, path, metadata)
        with pytest.raises(ValueError, match="changed after it was saved"):
            DenseTeacher.load(path)
    DenseTeacher(torch.empty(0, VOCAB)).save(path)
    assert len(DenseTeacher.load(path)) == 0


def test_a_file_of_an_older_version_is_read_if_it_is_sound(tmp_path):
    path = tmp_path / "teacher.safetensors"
    stored = topk_loss().with_self_term(
        TopKTeacher.from_logits(logits(1, 4, 2, VOCAB), 3).with_length(3)
    )
    stored.save(path)
    tensors, metadata = contents(path)
    del metadata["checksum"]
    safetensors.torch.save_file(tensors, path, metadata)
    assert torch.equal(TopKTeacher.load(path).tokens, stored.tokens)
    for value in (torch.nan, torch.inf):
        tensors["self_potential"][2, 1, 0] = value
        safetensors.torch.save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"self_potential is not finite .*with_self_term"):
            TopKTeacher.load(path)
    safetensors.torch.save_file({"logits": logits(1, 4, VOCAB)}, path)
    assert len(DenseTeacher.load(path)) == 4


def test_a_self_term_of_other_masses_is_not_used():
    student, loss = logits(3, 8, VOCAB), topk_loss()
    stored = loss.with_self_term(TopKTeacher.from_logits(logits(1, 8, VOCAB), 3))
    expected = loss(student, dataclasses.replace(stored, self_potential=None, self_settings=None))
    close(loss(student, stored), expected, rtol=1e-3, atol=1e-4)
    potential = stored.self_potential
    for other in (
        swapped(potential),
        potential.flip(0),
        potential + 0.3,
        potential.masked_fill(torch.arange(8)[:, None] == 5, torch.nan),
    ):
        with pytest.warns(
            UserWarning, match="does not belong to these masses; compute it again with"
        ):
            found = loss(student, dataclasses.replace(stored, self_potential=other))
        close(found, expected, rtol=1e-3, atol=1e-4)


def test_without_safetensors_the_error_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["safetensors"] = None
import torch
from otkd.teachers import DenseTeacher, TopKTeacher
stored = TopKTeacher.from_logits(torch.ones(2, 3), 2)
for call in (
    lambda: stored.save("new/a"),
    lambda: DenseTeacher(torch.ones(2, 3)).save("new/a"),
    lambda: TopKTeacher.load("a"),
    lambda: DenseTeacher.load("a"),
):
    try:
        call()
    except ImportError as error:
        assert "safetensors, which is not installed: pip install" in str(error), error
    else:
        raise AssertionError("it did")
import os
assert not os.path.exists("new")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


class Logprob:
    """What vLLM gives for a token."""

    def __init__(self, logprob):
        self.logprob, self.rank, self.decoded_token = logprob, 1, "text"


def test_logprobs_of_a_server():
    teacher = logits(1, 2, 3, VOCAB)
    log_p = teacher.log_softmax(-1)
    counts = [[5, 1, 3], [4, 2]]
    entries = [
        [
            {t: log_p[i, j, t].item() for t in log_p[i, j].topk(count).indices.tolist()}
            for j, count in enumerate(example)
        ]
        for i, example in enumerate(counts)
    ]
    stored = TopKTeacher.from_logprobs(entries, VOCAB, dtype=torch.float64)
    assert stored.shape == (2, 3, VOCAB)
    assert stored.k == 5
    student = logits(2, 2, 3, VOCAB)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for make in (otkd.KLLoss, otkd.ReverseKLLoss, otkd.UniversalLogitLoss):
        loss = make(reduction="none")
        found = loss(student, stored, mask=mask)
        for i, example in enumerate(counts):
            for j, count in enumerate(example):
                alone = loss(student[i, j], TopKTeacher.from_logits(teacher[i, j], count))
                close(found[i, j], alone, rtol=1e-6, atol=1e-9)
        with pytest.raises(ValueError, match=r"1 of 6 positions|not finite"):
            loss(student, stored)  # the second example ends before
    pairs = [[list(entry.items()) for entry in example] for example in entries]
    objects = [[{t: Logprob(x) for t, x in e.items()} for e in example] for example in entries]
    for other in (pairs, objects):
        same = TopKTeacher.from_logprobs(other, VOCAB, dtype=torch.float64)
        assert torch.equal(same.tokens, stored.tokens)
        close(same.log_masses, stored.log_masses, equal_nan=True)
    one = TopKTeacher.from_logprobs([None, *entries[0][1:]], VOCAB)
    assert one.shape == (3, VOCAB)
    assert one.log_masses[0].isnan().all()
    kept = TopKTeacher.from_logprobs(entries, VOCAB, k=2)
    close(kept.masses()[0, 0, :2], log_p[0, 0].exp().topk(2).values.float())
    assert TopKTeacher.from_logprobs([None, None], VOCAB).log_masses.isnan().all()


def test_a_ragged_teacher_in_a_file_and_in_a_batch(tmp_path):
    entries = [[{3: -0.1}], [{1: -1.0, 2: -2.0, 0: -3.0}]]
    whole = TopKTeacher.from_logprobs(entries, VOCAB)
    parts = [TopKTeacher.from_logprobs([entry], VOCAB) for entry in entries]
    joined = TopKTeacher.cat(parts)
    assert torch.equal(joined.tokens, whole.tokens)
    assert torch.equal(joined.log_masses, whole.log_masses)
    whole.with_length(2).save(tmp_path / "teacher.safetensors")
    loaded = TopKTeacher.load(tmp_path / "teacher.safetensors")
    assert torch.equal(loaded.with_length(1).tokens, whole.tokens)
    student, mask = logits(1, 2, 2, VOCAB), torch.tensor([[1, 0], [1, 0]])
    for loss in (otkd.KLLoss(reduction="none"), topk_loss()):
        close(loss(student, loaded, mask=mask)[:, :1], loss(student[:, :1], whole))


@pytest.mark.parametrize(
    ("error", "message", "entries"),
    [
        (ValueError, r"position 1 holds a token twice", [{1: -1.0}, [(2, -1.0), (2, -2.0)]]),
        (ValueError, r"example 1, position 0: token 12 is outside", [[{1: -1.0}], [{12: -1}]]),
        (ValueError, r"token -1 is outside the vocabulary of 12", [{-1: -1.0}]),
        (ValueError, r"position 0: the log-probability of token 3 must be at most 0", [{3: 0.7}]),
        (ValueError, r"must be at most 0, got nan", [{3: float("nan")}]),
        (ValueError, r"add up to 1.213; natural logarithms", [{1: -0.5, 2: -0.5}]),
        (ValueError, r"position 1 has no tokens: use None", [{1: -0.5}, {}]),
        (
            TypeError,
            r"tokens must be whole numbers, got 'the'.*convert_tokens_to_ids",
            [{"the": -1}],
        ),
        (TypeError, r"log-probability of token 4 must be a number, got 'much'", [{4: "much"}]),
        (TypeError, r"needs a list with an entry", {1: -0.5}),
        (TypeError, r"needs a list with an entry", []),
        (TypeError, r"must be None, \{token: logprob\} or a list of pairs", [[3]]),
    ],
)
def test_refused_logprobs(error, message, entries):
    with pytest.raises(error, match=message):
        TopKTeacher.from_logprobs(entries, VOCAB)
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopKTeacher.from_logprobs([{1: -1.0}], VOCAB, k=0)
