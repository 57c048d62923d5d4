import dataclasses
import os
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import otkd
import otkd.ot.divergence
from otkd.costs import EmbeddingCost, MatrixCost
from otkd.supports import TopK
from otkd.teachers import DenseTeacher, StoredTeacher, TopKTeacher
from tests import naive
from tests.problems import logits, points, seeds

pytestmark = pytest.mark.usefixtures("seeded")

VOCAB = 12
EXACT = {"tolerance": 1e-9, "max_iterations": 5000}
close = torch.testing.assert_close


def embedding(seed=7, vocab=VOCAB):
    return points(seed, vocab, 3)


def topk_loss(k=4, cost=None, **options):
    options = {"epsilon": 0.2, "reduction": "none", **EXACT, **options}
    cost = EmbeddingCost(embedding()) if cost is None else cost
    return otkd.SinkhornLoss(cost, support=TopK(k), **options)


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def stored_divergence(student, teacher, cost, k, stored, epsilon=0.5, temperature=1.0):
    """By the definition, one position after the other, with the autograd of every iteration."""
    kernel_mean = torch.exp(-cost / epsilon).mean()
    values = []
    pairs = zip(
        (student / temperature).softmax(-1), (teacher / temperature).softmax(-1), strict=True
    )
    for q, p in pairs:
        kept = p.topk(stored).indices.tolist()
        # Of the student's heavy tokens those that the teacher cannot have so heavy.
        lightest = p[kept].sort().values[1:2].tolist()
        most = min([1 - p[kept].sum().item(), *lightest])
        head = sorted({*kept, *(t for t in q.topk(k).indices.tolist() if q[t] > most + 1e-12)})
        rest = [token for token in range(len(q)) if token not in head]
        a = torch.stack([*(q[token] for token in head), q[rest].sum()])
        b = torch.stack([p[t] if t in kept else torch.zeros_like(p[0]) for t in head])
        b = torch.cat([b, (1 - b.sum())[None]])
        atoms = torch.zeros(len(head) + 1, len(head) + 1, dtype=cost.dtype)
        atoms[:-1, :-1] = cost[head][:, head]
        atoms[-1, :-1] = atoms[:-1, -1] = cost.mean(-1)[head]
        atoms[-1, -1] = -epsilon * kernel_mean.log()
        values.append(naive.divergence(a, b, (atoms,) * 3, epsilon, iterations=60))
    return torch.stack(values)


@settings(max_examples=15)
@given(seed=seeds, k=st.integers(1, 6), stored=st.integers(1, 9), heat=st.sampled_from([1.0, 2.5]))
def test_value_and_gradient_are_those_of_the_definition(seed, k, stored, heat):
    student, teacher = logits(seed, 2, VOCAB), logits(seed + 1, 2, VOCAB)
    cost = EmbeddingCost(embedding())
    loss = topk_loss(k, cost, temperature=heat, epsilon=0.5)
    value, gradient = value_and_gradient(
        loss, student, TopKTeacher.from_logits(teacher, stored, heat)
    )
    student.requires_grad_()
    matrix = cost(VOCAB, VOCAB).double()
    expected = stored_divergence(student, teacher, matrix, k, stored, temperature=heat)
    close(value, expected.detach(), rtol=1e-5, atol=1e-7)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    close(gradient, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [2, VOCAB])
@pytest.mark.parametrize(
    "options", [{}, {"debias": False}, {"value": "sharp"}, {"marginal_relaxation": 0.5}]
)
def test_with_every_token_stored_it_is_the_loss_over_all_of_them(k, options):
    student, teacher = logits(1, 3, 2, VOCAB), logits(2, 3, 2, VOCAB)
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    stored = TopKTeacher.from_logits(teacher, VOCAB + 5)
    assert stored.k == VOCAB
    broken = student.masked_fill(~mask[..., None], torch.nan)
    for loss in (topk_loss(k, **options), topk_loss(k, **options, teacher_temperature=1.0)):
        live = value_and_gradient(topk_loss(VOCAB, **options), student, teacher, mask=mask)
        found = value_and_gradient(loss, broken, stored, mask=mask)
        close(found, live, rtol=1e-6, atol=1e-8)


def test_heads_of_both_sides_alike_are_the_loss_of_live_logits():
    # Where the student's heaviest tokens are stored, nothing is lost.
    teacher = logits(3, 4, VOCAB)
    student = teacher + 0.01 * logits(4, 4, VOCAB)
    same = teacher.topk(6).indices.sort().values == student.topk(6).indices.sort().values
    assert same.all()
    live = value_and_gradient(topk_loss(6), student, teacher)
    found = value_and_gradient(topk_loss(6), student, TopKTeacher.from_logits(teacher, 6))
    close(found, live, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("k", "count"), [(1, 1), (2, 5), (5, 5), (VOCAB, VOCAB)])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("dtype", "atol", "slope"), [(torch.float64, 1e-8, 1e-7), (torch.float16, 1e-4, 1e-2)]
)
def test_no_loss_where_the_student_is_the_teacher(k, count, kept, dtype, atol, slope):
    teacher = logits(5, 6, VOCAB)
    loss = topk_loss(k, tolerance=1e-9 if dtype == torch.float64 else 1e-6)
    stored = TopKTeacher.from_logits(teacher, count, dtype=dtype)
    if kept:
        stored = loss.with_self_term(stored)
    value, gradient = value_and_gradient(loss, teacher, stored)
    close(value, torch.zeros(6, dtype=torch.float64), rtol=0, atol=atol)
    assert gradient.abs().max() < slope
    if count < VOCAB:  # tells the teacher from another one
        assert (loss(logits(6, 6, VOCAB), stored) > 0.01).all()


def bridge():
    return EmbeddingCost(embedding(), embedding(8, VOCAB + 3))


@pytest.mark.parametrize("two", [False, True])
def test_a_stored_self_term_is_not_solved_again(solves, two, tmp_path):
    cost = bridge() if two else None
    student, teacher = logits(1, 3, 4, VOCAB), logits(2, 3, 4, VOCAB + 3 if two else VOCAB)
    teacher[0, 1] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    loss, stored = topk_loss(4, cost), TopKTeacher.from_logits(teacher, 5)
    expected = value_and_gradient(loss, student, stored, mask=mask)
    assert len(solves) == 3
    kept = loss.with_self_term(stored)
    assert solves[3:] == [11]
    assert kept.self_potential.shape == (3, 4, 6)
    assert kept.self_potential.isnan().any(-1).nonzero().tolist() == [[0, 1]]
    kept.save(tmp_path / "teacher.safetensors")
    for one in (kept, TopKTeacher.load(tmp_path / "teacher.safetensors")):
        del solves[:]
        found = value_and_gradient(loss, student, one, mask=mask)
        assert solves == [11, 11]
        assert loss.last_report.converged
        close(found, expected, rtol=1e-6, atol=1e-8)
    assert loss.last_report.support == repr(loss.support)
    assert 0 < loss.last_report.worst_coverage < 1
    # A student's head of any width, and any part of the stored teacher.
    wider = topk_loss(7, cost)
    expected = wider(student[1:, 2], stored[1:, 2])
    close(wider(student[1:, 2], kept[1:, 2]), expected, rtol=1e-6, atol=1e-8)


def test_a_stored_self_term_early_stopped_is_what_a_step_would_solve():
    student, teacher = logits(1, 5, VOCAB), logits(2, 5, VOCAB)
    loss = topk_loss(4, tolerance=1e-2, epsilon=0.05)
    stored = TopKTeacher.from_logits(teacher, VOCAB)
    close(loss(student, loss.with_self_term(stored)), loss(student, stored), rtol=1e-3, atol=1e-5)


def test_a_self_term_of_other_settings_is_solved_again(solves):
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    stored = TopKTeacher.from_logits(teacher, 5)
    kept = topk_loss().with_self_term(stored)
    learnable = EmbeddingCost(torch.nn.Parameter(embedding()), learnable=True)
    others = {
        "another cost, epsilon": [{"epsilon": 0.3}, {"cost": EmbeddingCost(embedding(9))}],
        "marginal_relaxation or debias": [
            {"debias": "teacher"},
            {"debias": "teacher", "marginal_relaxation": (1.0, None)},
        ],
        "the cost is learnable": [{"cost": learnable}],
        "dual value": [{"value": "sharp"}],
        "marginal_relaxation": [{"marginal_relaxation": 1.0}],
    }
    for reason, cases in others.items():
        for options in cases:
            loss = topk_loss(**options)
            expected = loss(student, stored)
            del solves[:]
            with pytest.warns(
                UserWarning, match=f"not used, and is solved in every step instead: .*{reason}"
            ):
                close(loss(student, kept), expected, rtol=0, atol=0)
            assert len(solves) == (2 if options.get("debias") == "teacher" else 3)
    loss = topk_loss(debias=False)  # has no such term: nothing to say
    close(loss(student, kept), loss(student, stored), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"debias": None}, "debias=None"),
        ({"value": "sharp"}, "value='sharp'"),
        ({"marginal_relaxation": 1.0}, "marginal_relaxation is set"),
        ({"support": TopK(4, tail=False)}, "no tail"),
        ({"support": TopK(4, clusters=2)}, "the tail is stored as a single mass"),
        ({"support": "auto"}, r"support is Dense\(.*\), not a TopK"),
        (
            {"cost": EmbeddingCost(torch.nn.Parameter(embedding()), learnable=True)},
            "cost is learnable",
        ),
    ],
)
def test_self_terms_that_cannot_be_kept(options, reason):
    loss = otkd.SinkhornLoss(**{"cost": EmbeddingCost(embedding()), "support": TopK(4), **options})
    with pytest.raises(ValueError, match=f"cannot be stored: .*{reason}"):
        loss.with_self_term(TopKTeacher.from_logits(logits(1, 2, VOCAB), 4))


@given(seed=seeds, k=st.integers(1, VOCAB), heat=st.sampled_from([0.5, 1.0, 3.0]))
def test_what_is_stored(seed, k, heat):
    teacher = logits(seed, 2, 3, VOCAB)
    stored = TopKTeacher.from_logits(teacher, k, heat)
    p = (teacher / heat).softmax(-1)
    assert stored.tokens.dtype == torch.int32
    assert stored.shape == teacher.shape
    close(stored.log_masses, p.gather(-1, stored.tokens.long()).log())
    close(stored.log_masses, p.sort(descending=True).values[..., :k].log())
    close(stored.tail_mass, 1 - stored.log_masses.exp().sum(-1), rtol=0, atol=1e-12)
    close(stored.masses().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    dense = stored.logits()
    q = (dense / heat).softmax(-1)
    close(q.gather(-1, stored.tokens.long()), stored.log_masses.exp())
    others = q.scatter(-1, stored.tokens.long(), torch.nan).flatten(0, 1)
    for row, rest in zip(others, stored.tail_mass.flatten(), strict=True):
        even = row[~row.isnan()]
        close(even, (rest / max(1, VOCAB - k)).expand(VOCAB - k), rtol=1e-6, atol=1e-12)


def test_logits_with_every_token_stored_are_the_teachers():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    teacher[1, 4] = -torch.inf
    for heat in (1.0, 3.0):
        stored = TopKTeacher.from_logits(teacher, VOCAB, heat)
        for name in ("kl", "rkl", "jsd", "uld"):
            loss = otkd.get_loss(name, temperature=heat)
            close(loss(student, stored), loss(student, teacher), rtol=1e-6, atol=1e-9)
        dense = otkd.SinkhornLoss(EmbeddingCost(embedding()), temperature=heat)
        assert torch.isfinite(dense(student, stored))
        assert dense.last_report.support.startswith("Dense(")
        close(dense(student, stored), dense(student, teacher))


def test_a_tail_of_several_atoms_is_not_stored():
    loss = otkd.SinkhornLoss(EmbeddingCost(embedding()), support=TopK(2, clusters=3))
    student, stored = logits(1, 2, VOCAB), TopKTeacher.from_logits(logits(2, 2, VOCAB), 4)
    for call in (loss, loss.explain):
        with pytest.raises(ValueError, match=r"use TopK\(clusters=1\)"):
            call(student, stored)


def test_auto_support_reads_a_stored_teacher_where_it_chooses_topk():
    vocab = 2100
    cost = EmbeddingCost(embedding(7, vocab))
    student, teacher = logits(1, 2, vocab, scale=4), logits(2, 2, vocab, scale=4)
    stored = TopKTeacher.from_logits(teacher, 40)
    auto = otkd.SinkhornLoss(cost, reduction="none")
    found = value_and_gradient(auto, student, stored)
    expected = value_and_gradient(
        otkd.SinkhornLoss(cost, reduction="none", support=TopK(64)), student, stored
    )
    close(found, expected, rtol=0, atol=0)
    spread = auto(student, stored.logits())
    assert (found[0] - spread).abs().min() > 1e-5  # not by way of dense logits


def test_padded_vocabularies():
    student, teacher = logits(1, 3, VOCAB + 4), logits(2, 3, VOCAB)
    stored = TopKTeacher.from_logits(teacher, 5)
    loss = topk_loss(vocab_size=VOCAB)
    close(loss(student, stored), topk_loss()(student[:, :VOCAB], stored), rtol=0, atol=0)
    padded = TopKTeacher.from_logits(logits(2, 3, VOCAB + 4), 5)
    with pytest.raises(ValueError, match=r"mass on padding tokens \(from 12 on\).*rebuild it from"):
        loss(student, padded)
    with pytest.raises(ValueError, match="the student has 16 tokens and the teacher 12"):
        topk_loss()(student, stored)
    with pytest.raises(ValueError, match="same batch shape"):
        topk_loss()(student[:2, :VOCAB], stored)


def test_another_temperature_raises():
    student, stored = logits(1, 3, VOCAB), TopKTeacher.from_logits(logits(2, 3, VOCAB), 5, 2.0)
    cost = EmbeddingCost(embedding())
    for loss in (topk_loss(), otkd.KLLoss(), otkd.SinkhornLoss(cost, temperature=2.1)):
        with pytest.raises(
            ValueError, match=r"at temperature 2.0, but .* set teacher_temperature=2.0"
        ):
            loss(student, stored)
    with pytest.raises(ValueError, match=r"at temperature 2\.0"):
        topk_loss().with_self_term(stored)
    hot = topk_loss(teacher_temperature=2.0)
    assert torch.isfinite(hot(student, hot.with_self_term(stored))).all()
    assert torch.isfinite(otkd.KLLoss(temperature=2.0)(student, stored))


def test_tokens_of_no_mass_and_masses_above_one():
    teacher = logits(2, 2, VOCAB)
    teacher[0, 2:] = -torch.inf
    stored = TopKTeacher.from_logits(teacher, 4)
    assert stored.tail_mass[0] == 0
    student = logits(1, 2, VOCAB)
    value, gradient = value_and_gradient(topk_loss(), student, stored)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(otkd.KLLoss()(student, stored))
    above = dataclasses.replace(stored, log_masses=stored.log_masses + 0.02)  # a rounding
    close(above.masses()[0], stored.masses()[0])
    close(above.masses().sum(-1), torch.ones(2, dtype=torch.float64))


def test_damaged_positions_that_count_raise():
    student = logits(1, 3, VOCAB)
    loss, stored = topk_loss(), TopKTeacher.from_logits(logits(2, 3, VOCAB), 4)
    mask = torch.tensor([True, False, True])

    def changed(**changes):
        parts = {"tokens": stored.tokens.clone(), "log_masses": stored.log_masses.clone()}
        for name, (place, value) in changes.items():
            parts[name][1, place] = value
        return dataclasses.replace(stored, **parts)

    expected = loss(student, stored, mask=mask)
    cases = [
        ("no softmax|without a softmax", changed(log_masses=(2, torch.nan))),
        ("no softmax|without a softmax", changed(log_masses=(slice(None), -torch.inf))),
        ("add up to", changed(log_masses=(slice(None), 0.0))),
        ("tokens from -2 to", changed(tokens=(0, -2))),
        ("to 12, but its vocabulary has 12 tokens", changed(tokens=(0, VOCAB))),
        ("a repeated token", changed(tokens=(0, stored.tokens[1, 1].item()))),
    ]
    for message, broken in cases:
        with pytest.raises(ValueError, match=message):
            loss(student, broken)
        close(loss(student, broken, mask=mask), expected, rtol=0, atol=0)


def test_indexing():
    stored = topk_loss().with_self_term(TopKTeacher.from_logits(logits(1, 6, 3, VOCAB), 4))
    assert isinstance(stored, StoredTeacher)
    assert len(stored) == 6
    names = ("tokens", "log_masses", "self_potential")
    boolean = torch.arange(6) % 2 == 0
    for index in (2, slice(1, 4), torch.tensor([5, 0, 0]), boolean, [1, 3], (slice(None), 1)):
        part = stored[index]
        for name in names:
            assert torch.equal(getattr(part, name), getattr(stored, name)[index])
        assert part.self_settings == stored.self_settings
        close(part.logits(), stored.logits()[index])
    with pytest.raises(IndexError):
        stored[6]
    for index in ((..., slice(2)), (0, 0, slice(1))):
        with pytest.raises((IndexError, ValueError)):
            stored[index]
    assert stored.to("cpu") is stored
    moved = stored.to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in names} == {"meta"}
    with pytest.raises(AttributeError):
        stored.vocab_size = 3


def test_length():
    stored = topk_loss().with_self_term(TopKTeacher.from_logits(logits(1, 2, 4, VOCAB), 3))
    short, long = stored.with_length(3), stored.with_length(6)
    student = logits(2, 2, 6, VOCAB)
    mask = torch.arange(6).expand(2, 6) < 4
    close(topk_loss()(student[:, :3], short), topk_loss()(student[:, :3], stored[:, :3]))
    found = topk_loss()(student, long, mask=mask)
    close(found[:, :4], topk_loss()(student[:, :4], stored), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="without a softmax"):
        topk_loss()(student, long)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [False, True])
def test_round_trip(tmp_path, dtype, kept):
    stored = TopKTeacher.from_logits(logits(1, 4, 3, VOCAB), 5, 1.7, dtype=dtype)
    if kept:
        stored = topk_loss(temperature=1.7, tolerance=1e-4).with_self_term(stored)
    path = tmp_path / "new" / "teacher.safetensors"
    for one in (stored, stored[:, 1]):  # the second over the first
        one.save(path)
        loaded = TopKTeacher.load(os.fspath(path))
        for field in dataclasses.fields(TopKTeacher):
            wrote, read = getattr(one, field.name), getattr(loaded, field.name)
            if isinstance(wrote, torch.Tensor):
                assert torch.equal(wrote, read)
                assert wrote.dtype == read.dtype
            else:
                assert wrote == read
    assert (loaded.self_potential is None) != kept
    assert [file.name for file in path.parent.iterdir()] == ["teacher.safetensors"]


def test_a_save_that_fails_leaves_the_older_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    first = TopKTeacher.from_logits(logits(1, 2, VOCAB), 3)
    first.save(path)

    def half_written(tensors, filename, *arguments, **options):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half_written)
        with pytest.raises(OSError, match="no space left"):
            TopKTeacher.from_logits(logits(2, 2, VOCAB), 3).save(path)
    assert torch.equal(TopKTeacher.load(path).tokens, first.tokens)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_bad_files(tmp_path):
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(FileNotFoundError):
        TopKTeacher.load(path)
    with pytest.raises(ValueError, match="is a folder, not a safetensors file"):
        TopKTeacher.load(tmp_path)
    stored = TopKTeacher.from_logits(logits(1, 2, VOCAB), 3)
    stored.save(path)
    whole = path.read_bytes()
    for content in (b"", b"not a table", whole[:-5], whole[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"teacher.safetensors .*safetensors file"):
            TopKTeacher.load(path)
    DenseTeacher(torch.ones(2, 3)).save(path)
    with pytest.raises(ValueError, match=r"holds \['logits'\], but no tensor named 'tokens'"):
        TopKTeacher.load(path)
    stored.save(path)
    with pytest.raises(ValueError, match="but no tensor named 'logits'"):
        DenseTeacher.load(path)

    tensors = {"tokens": stored.tokens, "log_masses": stored.log_masses}
    settings = {"vocab_size": str(VOCAB), "temperature": "1.0"}
    twice = torch.tensor([[1, 2, 1], [3, 4, 5]])
    bad = [
        ("missing or damaged: KeyError", tensors, {"vocab_size": "12"}),
        ("missing or damaged: ValueError", tensors, settings | {"temperature": "warm"}),
        ("missing or damaged", tensors, settings | {"self_settings": "[0.1"}),
        ("given together", tensors, settings | {"self_settings": "[0.1, [1.0]]"}),
        ("tokens from 0 to|vocab_size=2 tokens", tensors, settings | {"vocab_size": "2"}),
        ("above 0, got 0.0", tensors, settings | {"temperature": "0"}),
        ("a repeated token", tensors | {"tokens": twice}, settings),
        ("add up to 1.5", tensors | {"log_masses": torch.full((2, 3), 0.5).log()}, settings),
        ("of one shape", tensors | {"tokens": twice[:1]}, settings),
        ("int32 or int64", tensors | {"tokens": twice.half()}, settings),
    ]
    for message, contents, metadata in bad:
        safetensors.torch.save_file(contents, path, metadata)
        with pytest.raises(ValueError, match=f"{path.name} .*({message})"):
            TopKTeacher.load(path)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("int32 or int64", {"tokens": torch.ones(2, 3)}),
        ("floating-point log_masses", {"log_masses": torch.ones(2, 3, dtype=torch.int32)}),
        ("of one shape", {"log_masses": torch.zeros(2, 2)}),
        ("between 1 and vocab_size=2", {"vocab_size": 2}),
        ("temperature must be", {"temperature": 0.0}),
        ("given together", {"self_potential": torch.zeros(2, 4)}),
    ],
)
def test_refused_parts(message, changes):
    parts = {"tokens": torch.arange(3).expand(2, 3), "log_masses": torch.zeros(2, 3) - 5}
    with pytest.raises(ValueError, match=message):
        TopKTeacher(**{**parts, "vocab_size": VOCAB, **changes})


def test_refused_arguments():
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopKTeacher.from_logits(logits(1, 2, VOCAB), 0)
    with pytest.raises(ValueError, match="temperature must be"):
        TopKTeacher.from_logits(logits(1, 2, VOCAB), 2, -1.0)
    with pytest.raises(TypeError, match="floating-point"):
        TopKTeacher.from_logits(torch.ones(2, 3, dtype=torch.int64), 2)
    stored = topk_loss().with_self_term(TopKTeacher.from_logits(logits(1, 2, VOCAB), 3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\), one for every token and the tail"):
        dataclasses.replace(stored, self_potential=stored.self_potential[:, 1:])


def test_any_cost_with_a_matrix_reads_it():
    matrix = MatrixCost(EmbeddingCost(embedding())(VOCAB, VOCAB))
    student, stored = logits(1, 3, VOCAB), TopKTeacher.from_logits(logits(2, 3, VOCAB), 4)
    for cost in ("discrete", "ordinal", matrix):
        loss = topk_loss(cost=cost)
        kept = loss.with_self_term(stored)
        close(loss(student, kept), loss(student, stored), rtol=1e-6, atol=1e-8)
        if cost is matrix:
            expected = topk_loss()(student, stored)
            close(loss(student, stored), expected, rtol=1e-5, atol=1e-6)


def test_a_weighted_loss_hands_a_stored_teacher_on():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    stored = TopKTeacher.from_logits(teacher, 4)
    terms = {"kl": (0.5, otkd.KLLoss()), "sinkhorn": (2.0, topk_loss(reduction="mean"))}
    expected = sum(weight * loss(student, stored) for weight, loss in terms.values())
    close(otkd.WeightedLoss(terms)(student, stored), expected)


def test_the_trainer_takes_it_as_a_teacher(tmp_path):
    transformers = pytest.importorskip("transformers")
    from otkd.integrations.transformers import DistillationTrainer
    from tests.models import VOCAB as WORDS
    from tests.models import tiny_llama

    lengths = (6, 3, 5, 4)  # not all of the length that is stored
    rows = [torch.arange(2, 2 + length) * 3 % WORDS for length in lengths]
    examples = [{"input_ids": row, "labels": row, "attention_mask": row * 0 + 1} for row in rows]
    fillings = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def pad(features):
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        return {
            name: pad_sequence([feature[name] for feature in features], True, filling)
            for name, filling in fillings.items()
        }

    with torch.no_grad():
        teacher = tiny_llama(1).eval()(input_ids=pad(examples)["input_ids"]).logits

    def weights(given, k=3):
        trainer = DistillationTrainer(
            tiny_llama(0),
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                optim="sgd",
                learning_rate=0.5,
                per_device_train_batch_size=2,
                save_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=examples,
            data_collator=pad,
            loss=otkd.SinkhornLoss("discrete", support=TopK(k)),
            teacher=given,
        )
        with warnings.catch_warnings():
            # A self-term that does not fit would be told.
            warnings.filterwarnings("error", message="the stored self-term")
            trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    live = weights(teacher)
    # Read as it is: made dense, a stored top-3 would have a flat tail and another union.
    stored = TopKTeacher.from_logits(teacher, 3)
    loss = otkd.SinkhornLoss("discrete", support=TopK(3))
    assert (weights(stored) - weights(stored.logits())).abs().max() > 0
    close(weights(loss.with_self_term(stored)), weights(stored), rtol=1e-3, atol=1e-3)
    everything = TopKTeacher.from_logits(teacher, WORDS)
    close(weights(everything, WORDS), weights(teacher, WORDS), rtol=1e-3, atol=1e-3)
    few = weights(TopKTeacher.from_logits(teacher, 2))
    assert torch.isfinite(few).all()
    assert (few - live).abs().max() > 1e-3


def test_other_losses_refuse_what_is_no_distribution():
    student = logits(1, 2, VOCAB)
    tokens = torch.arange(3).expand(2, 3)
    for message, changes in (
        ("add up to", {"log_masses": torch.zeros(2, 3)}),
        ("repeated", {"tokens": torch.zeros(2, 3, dtype=torch.int64)}),
        ("tokens from", {"tokens": tokens + VOCAB - 2}),
    ):
        parts = {"tokens": tokens, "log_masses": torch.zeros(2, 3) - 5, **changes}
        stored = TopKTeacher(**parts, vocab_size=VOCAB)
        for loss in (otkd.KLLoss(), topk_loss()):
            with pytest.raises(ValueError, match=message):
                loss(student, stored)


def test_stored_positions_that_do_not_count_may_hold_anything():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    sound, mask = TopKTeacher.from_logits(teacher, 3), torch.tensor([1, 0, 1])
    tokens, masses = sound.tokens.clone(), sound.log_masses.clone()
    tokens[1], masses[1] = 0, 0  # one token three times, with a mass of 3
    padded = TopKTeacher(tokens, masses, VOCAB)
    for loss in (otkd.KLLoss(), topk_loss()):
        close(loss(student, padded, mask=mask), loss(student, sound, mask=mask))


def test_stored_teachers_of_batches_become_one():
    teacher, loss = logits(1, 5, 3, VOCAB), topk_loss()
    whole = TopKTeacher.from_logits(teacher, 4)
    parts = [TopKTeacher.from_logits(teacher[rows], 4) for rows in (slice(0, 2), slice(2, 5))]
    for make in (lambda s: s, lambda s: loss.with_self_term(s)):
        joined, expected = TopKTeacher.cat([make(part) for part in parts]), make(whole)
        for name in ("tokens", "log_masses", "self_potential"):
            left, right = getattr(joined, name), getattr(expected, name)
            assert right is None if left is None else torch.allclose(left, right)
        assert repr(joined) == repr(expected)
    assert repr(whole) == f"TopKTeacher((5, 3, {VOCAB}), k=4, temperature=1.0)"
    with pytest.raises(ValueError, match="got none"):
        TopKTeacher.cat([])
    for other in (
        whole.with_length(2),
        TopKTeacher.from_logits(teacher, 4, 2.0),
        loss.with_self_term(whole),
    ):
        with pytest.raises(ValueError, match="can only be concatenated"):
            TopKTeacher.cat([whole, other])
