"""A stored teacher that keeps what debiasing by the teacher alone needs."""

import dataclasses
import itertools
import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import otkd
import otkd.ot.transport
from otkd.costs import EmbeddingCost, MatrixCost
from otkd.supports import Dense, TopK
from otkd.teachers import DenseTeacher, TopKTeacher
from otkd.teachers.self_term import SelfTermSettings
from tests.problems import logits, points, seeds

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore::otkd.supports.CoverageWarning"),
    # A stored term that is not used would not be noticed by its value.
    pytest.mark.filterwarnings("error:the stored self-term"),
]

VOCAB = 30
F32, F64, F16 = torch.float32, torch.float64, torch.float16
TOLERANCE = {F64: 1e-10, F32: 1e-4}
KINDS = [
    {"smoothing": 1.0},
    {"smoothing": 0.1},
    {"smoothing": 0.6, "direction": "reverse"},
    {"smoothing": 0.1, "direction": "reverse"},
]
every_kind = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values()))
)
close = torch.testing.assert_close


def transport_kl(dtype=F64, k=4, cost=None, **options):
    cost = EmbeddingCost(points(7, VOCAB, 4)) if cost is None else cost
    limits = {"tolerance": TOLERANCE[dtype], "max_iterations": 2000}
    options = {"price": 10.0, "support": TopK(k), "reduction": "none", **limits, **options}
    return otkd.TransportKLLoss(cost, **options)


def teacher_tangent(dtype=F64, **options):
    options = {"epsilon": 0.2, "debias": "teacher", **options}
    limits = {"tolerance": TOLERANCE[dtype], "max_iterations": 2000, "reduction": "none"}
    return otkd.SinkhornLoss(embedding=points(7, VOCAB, 4), support=TopK(4), **limits, **options)


LOSSES = {
    **{f"{kind}": lambda kind=kind, **o: transport_kl(**kind, **o) for kind in KINDS},
    "balanced": teacher_tangent,
    "one rho": lambda **o: teacher_tangent(marginal_relaxation=0.5, **o),
    "a rho a side": lambda **o: teacher_tangent(marginal_relaxation=(0.3, 2.0), **o),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@every_loss
def test_only_the_student_is_solved_in_a_step(make, solves, tmp_path):
    student, teacher = logits(1, 3, 4, VOCAB), logits(2, 3, 4, VOCAB)
    teacher[0, 1] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    loss, stored = make(), TopKTeacher.from_logits(teacher, 6)
    expected = value_and_gradient(loss, student, stored, mask=mask)
    assert solves == [11, 11]
    del solves[:]
    kept = loss.with_self_term(stored)
    assert kept.self_potential.isnan().any(-1).nonzero().tolist() == [[0, 1]]
    kept.save(tmp_path / "teacher.safetensors")
    for one in (kept, TopKTeacher.load(tmp_path / "teacher.safetensors")):
        del solves[:]
        found = value_and_gradient(loss, student, one, mask=mask)
        assert solves == [11]
        assert loss.last_report.converged
        close(found, expected, rtol=1e-6, atol=1e-8)
    # Parts, and a student's head of another width.
    for other in (loss, make(support=TopK(9))) if isinstance(loss, otkd.TransportKLLoss) else ():
        found = value_and_gradient(other, student[1:, 2], kept[1:, 2])
        close(found, value_and_gradient(other, student[1:, 2], stored[1:, 2]), rtol=1e-6, atol=1e-8)


@every_kind
@pytest.mark.parametrize(
    ("price", "dtype"), [*itertools.product([3.0, 30.0, 300.0], [F64, F32])], ids=str
)
def test_value_and_gradient_are_those_without_a_stored_term(kind, price, dtype):
    teacher = logits(2, 12, VOCAB, dtype=dtype, scale=3.0)
    # Far students, and near ones at growing distances.
    student = torch.cat([logits(1, 6, VOCAB, dtype=dtype, scale=3.0), teacher[6:]])
    steps = 10.0 ** torch.arange(-5, 1, dtype=dtype)
    student[6:] += steps[:, None] * logits(3, 6, VOCAB, dtype=dtype, scale=1.0)
    loss = transport_kl(dtype, price=price, **kind)
    stored = TopKTeacher.from_logits(teacher, 6)
    kept = loss.with_self_term(stored)
    assert kept.self_potential.dtype == dtype
    found = value_and_gradient(loss, student, kept)
    assert loss.last_report.converged
    slack = 1e-8 if dtype == F64 else 5e-4
    close(found, value_and_gradient(loss, student, stored), rtol=slack, atol=slack)
    assert (found[0] >= (-1e-12 if dtype == F64 else -2e-6)).all()


@every_loss
@pytest.mark.parametrize("count", [1, 5, VOCAB])
@pytest.mark.parametrize(
    ("dtype", "precision", "slope"),
    [(F64, F64, 1e-9), (F32, F32, 2e-6), (F32, F16, 1e-12), (F32, torch.bfloat16, 1e-12)],
    ids=str,
)
def test_no_loss_where_the_student_is_the_teacher(make, count, dtype, precision, slope):
    teacher = logits(5, 6, VOCAB, dtype=dtype)
    loss = make(dtype=dtype)
    kept = loss.with_self_term(TopKTeacher.from_logits(teacher, count, dtype=precision))
    value, gradient = value_and_gradient(loss, teacher, kept)
    assert value.abs().max() < slope
    assert gradient.abs().max() < slope
    if count < VOCAB:  # tells the teacher from another one
        assert (loss(logits(6, 6, VOCAB, dtype=dtype), kept) > 1e-3).all()


@given(seed=seeds, kind=st.sampled_from(KINDS), k=st.integers(1, 6), count=st.integers(1, VOCAB))
def test_it_is_a_divergence_for_any_teacher_and_head(seed, kind, k, count):
    student, teacher = logits(seed, 2, VOCAB, scale=3), logits(seed + 1, 2, VOCAB, scale=3)
    loss, stored = transport_kl(k=k, **kind), TopKTeacher.from_logits(teacher, count)
    kept = loss.with_self_term(stored)
    value = loss(student, kept)
    assert (value > 0).all()
    close(value, loss(student, stored), rtol=1e-7, atol=1e-8)


@every_kind
def test_a_student_with_mass_where_the_teacher_has_none(kind):
    """The tangent then has a slope at atoms that are not stored, and at those without mass."""
    teacher = logits(2, 4, VOCAB)
    teacher[0, 3:] = -torch.inf
    teacher[1] -= 60 * torch.arange(VOCAB)
    student = logits(1, 4, VOCAB)
    student[:, -1] += 20  # a token that is not stored
    student[3] = teacher[3]
    for dtype, slack in ((F64, 1e-8), (F32, 5e-4)):
        for count in (3, VOCAB):
            loss = transport_kl(dtype, **kind)
            stored = TopKTeacher.from_logits(teacher.to(dtype), count)
            found = value_and_gradient(loss, student.to(dtype), loss.with_self_term(stored))
            expected = value_and_gradient(loss, student.to(dtype), stored)
            close(found, expected, rtol=slack, atol=slack)
            # In reverse, such a token costs no more than the tangent has there.
            assert "direction" in kind or found[0][0] > 1


@every_kind
def test_ragged_lengthened_joined_and_cut_teachers(kind):
    loss = transport_kl(**kind)
    teacher = logits(2, 4, 3, VOCAB)
    teacher[..., -2:] = -torch.inf
    log_p = teacher.log_softmax(-1)
    entries = [
        [{t: log_p[i, j, t].item() for t in log_p[i, j].topk(i + j + 1).indices.tolist()}
         for j in range(3)]
        for i in range(4)
    ]  # fmt: skip
    stored = TopKTeacher.from_logprobs(entries, VOCAB, dtype=F64)
    parts = [TopKTeacher.from_logprobs(entries[i : i + 2], VOCAB, dtype=F64) for i in (0, 2)]
    assert parts[0].k < parts[1].k
    student = logits(1, 4, 3, VOCAB)
    expected = value_and_gradient(loss, student, stored)
    joined = TopKTeacher.cat([loss.with_self_term(part) for part in parts])
    for kept in (loss.with_self_term(stored), joined, joined.flatten()):
        shape = kept.tokens.shape[:-1]
        found = value_and_gradient(loss, student.reshape(*shape, VOCAB), kept)
        close([x.reshape(y.shape) for x, y in zip(found, expected, strict=True)], [*expected])
    long, mask = joined.with_length(5), torch.arange(5).expand(4, 5) < 3
    more = torch.cat([student, logits(9, 4, 2, VOCAB)], 1)
    close(loss(more, long, mask=mask)[:, :3], expected[0])
    # Padding tokens are cut off after the term was stored for the real ones.
    small = EmbeddingCost(points(7, VOCAB, 4)[: VOCAB - 2])
    cut = transport_kl(cost=small, vocab_size=VOCAB - 2, **kind)
    whole = TopKTeacher.from_logits(teacher, VOCAB)
    kept = cut.with_self_term(whole.sliced(VOCAB - 2))
    close(cut(student, kept), cut(student, whole), rtol=1e-7, atol=1e-9)


def test_costs_of_both_signs():
    """The normal form of a position depends on the student's tokens, and the potentials do not."""
    matrix = EmbeddingCost(points(7, VOCAB, 4))(VOCAB, VOCAB).double()
    signed = MatrixCost((matrix - 0.3).fill_diagonal_(0))
    assert (signed.matrix < 0).any()
    student, stored = logits(1, 5, VOCAB), TopKTeacher.from_logits(logits(2, 5, VOCAB), 3)
    for kind in KINDS:
        loss = transport_kl(cost=signed, price=2.0, **kind)
        found = value_and_gradient(loss, student, loss.with_self_term(stored))
        close(found, value_and_gradient(loss, student, stored), rtol=1e-7, atol=1e-8)
    for cost in ("discrete", "ordinal"):
        loss = transport_kl(cost=cost)
        close(loss(student, loss.with_self_term(stored)), loss(student, stored))


OTHERS = {
    "price": {"price": 11.0},
    "smoothing": {"smoothing": 0.4},
    "direction": {"direction": "reverse"},
    "cost": {"cost": EmbeddingCost(points(8, VOCAB, 4))},
}


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_a_term_of_other_settings_is_solved_again(changed, solves):
    student, stored = logits(1, 3, VOCAB), TopKTeacher.from_logits(logits(2, 3, VOCAB), 5)
    kept = transport_kl(smoothing=0.5).with_self_term(stored)
    loss = transport_kl(**{"smoothing": 0.5, **changed})
    expected = loss(student, stored)
    del solves[:]
    with pytest.warns(UserWarning, match=r"solved in every step instead: .*price, smoothing or"):
        close(loss(student, kept), expected, rtol=0, atol=0)
    assert solves == [3, 3]
    loss = transport_kl(debias=None, price=11.0)  # has no such term: nothing to say
    close(loss(student, kept), loss(student, stored), rtol=0, atol=0)


def test_very_high_prices_are_told_apart():
    settings = [transport_kl(price=price).objective for price in (1e6, 2e6)]
    known = [SelfTermSettings(x.epsilon, (1.0,), "teacher", x.penalties) for x in settings]
    assert known[0].fits(known[0])
    assert not known[0].fits(known[1])


@every_loss
def test_a_term_of_other_masses_is_solved_again(make):
    student, loss = logits(3, 8, VOCAB), make()
    stored = loss.with_self_term(TopKTeacher.from_logits(logits(1, 8, VOCAB), 5))
    expected = loss(student, dataclasses.replace(stored, self_potential=None, self_settings=None))
    for other in (stored.self_potential.flip(0) + 0.3, stored.self_potential * torch.nan):
        with pytest.warns(UserWarning, match="does not belong to these masses"):
            found = loss(student, dataclasses.replace(stored, self_potential=other))
        close(found, expected, rtol=0, atol=0)


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_files_say_for_which_loss_the_term_is(tmp_path):
    path = tmp_path / "teacher.safetensors"
    student, stored = logits(1, 3, VOCAB), TopKTeacher.from_logits(logits(2, 3, VOCAB), 5)
    for loss in (transport_kl(), transport_kl(smoothing=0.5, direction="reverse")):
        kept = loss.with_self_term(stored)
        kept.save(path)
        read = TopKTeacher.load(path)
        assert read.self_settings == kept.self_settings
        assert read.self_settings.debias == "teacher"
        assert read.self_settings.penalties == loss.objective.penalties
    assert math.isinf(read.self_settings.penalties[0])
    # Earlier versions stored only the symmetric term, and wrote neither debiasing nor penalties.
    old = otkd.SinkhornLoss(embedding=points(7, VOCAB, 4), support=TopK(4), reduction="none")
    old.with_self_term(stored).save(path)
    tensors, metadata = contents(path)
    metadata.pop("checksum")
    metadata["self_settings"] = json.dumps(json.loads(metadata["self_settings"])[:2])
    safetensors.torch.save_file(tensors, path, metadata)
    read = TopKTeacher.load(path)
    close(old(student, read), old(student, stored), rtol=1e-3, atol=1e-5)
    with pytest.warns(UserWarning, match="not used"):
        transport_kl()(student, read)
    for damaged in ('[0.1, [1.0], "teacher"]', '[0.1, [1.0], "teacher", ["much"]]'):
        safetensors.torch.save_file(tensors, path, metadata | {"self_settings": damaged})
        with pytest.raises(ValueError, match=r"settings in .* are missing or damaged"):
            TopKTeacher.load(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"debias": None}, "debias=None"),
        ({"support": TopK(4, tail=False)}, "no tail"),
        ({"support": TopK(4, clusters=2)}, "the tail is stored as a single mass"),
        ({"support": Dense()}, r"support is Dense\(.*\), not a TopK"),
        (
            {"cost": EmbeddingCost(points(7, VOCAB, 4), points(8, VOCAB, 4)), "debias": "teacher"},
            "debias='teacher' requires one vocabulary",
        ),
    ],
)
def test_terms_that_cannot_be_kept(options, reason):
    stored = TopKTeacher.from_logits(logits(1, 2, VOCAB), 4)
    with pytest.raises(ValueError, match=f"cannot be stored: .*{reason}"):
        transport_kl(**options).with_self_term(stored)
    with pytest.raises(TypeError, match="needs a TopKTeacher, got DenseTeacher"):
        transport_kl().with_self_term(DenseTeacher(logits(1, 2, VOCAB)))


def test_a_weighted_loss_uses_the_term_of_its_part(solves):
    student, stored = logits(1, 3, VOCAB), TopKTeacher.from_logits(logits(2, 3, VOCAB), 5)
    both = otkd.WeightedLoss({"kl": (0.5, "kl"), "near": (2.0, transport_kl(reduction="mean"))})
    expected = both(student, stored)
    kept = both.terms["near"].with_self_term(stored)
    del solves[:]
    close(both(student, kept), expected)
    assert solves == [3]


def test_a_run_of_the_trainer_uses_it(tmp_path, solves):
    transformers = pytest.importorskip("transformers")
    from otkd.integrations.transformers import DistillationTrainer
    from tests.models import VOCAB as WORDS
    from tests.models import tiny_llama

    rows = [torch.arange(2, 2 + length) * 3 % WORDS for length in (6, 3, 5, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, 0)
    labels = torch.nn.utils.rnn.pad_sequence(rows, True, -100)
    examples = [
        {"input_ids": x, "labels": y, "attention_mask": (y >= 0).long()}
        for x, y in zip(padded, labels, strict=True)
    ]
    with torch.no_grad():
        teacher = tiny_llama(1).eval()(input_ids=padded).logits
    loss = otkd.TransportKLLoss("discrete", smoothing=0.5, support=TopK(3), tolerance=1e-6)

    def weights(given):
        del solves[:]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.5,
            max_steps=2,
            per_device_train_batch_size=2,
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        model = tiny_llama(0)
        DistillationTrainer(
            model, arguments, train_dataset=examples, loss=loss, teacher=given
        ).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), len(solves)

    stored = TopKTeacher.from_logits(teacher, 3)
    (plain, twice), (found, once) = weights(stored), weights(loss.with_self_term(stored))
    assert (twice, once) == (4, 2)
    close(found, plain, rtol=1e-3, atol=1e-4)
