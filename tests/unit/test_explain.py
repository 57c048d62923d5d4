import json

import pytest
import torch
import transformers

import otkd
from otkd.costs import EmbeddingCost
from otkd.losses.explain import Explanation, Move
from otkd.ot import sinkhorn
from otkd.supports import Dense, TopK
from otkd.teachers import DenseTeacher, TopKTeacher
from tests.models import VOCAB, tiny_llama
from tests.problems import logits, points

pytestmark = pytest.mark.usefixtures("seeded")

OTHERS = "(other tokens)"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "is", "not", "wet", "dry", "雨", "été"]
WORDS += [f"word{number}" for number in range(len(WORDS), VOCAB)]
close = torch.testing.assert_close


def tokenizer(words=WORDS):
    return transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def embedding(seed=7, vocab=VOCAB):
    return points(seed, vocab, 3)


def loss_with(support, **options):
    options = {"epsilon": 0.2, "tolerance": 1e-9, "max_iterations": 5000, **options}
    return otkd.SinkhornLoss(**{"cost": EmbeddingCost(embedding()), "support": support, **options})


def marginals(explanation):
    rows, columns = {}, {}
    for move in explanation.moves:
        rows[move.source] = rows.get(move.source, 0) + move.mass
        columns[move.target] = columns.get(move.target, 0) + move.mass
    return rows, columns


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("value", ["dual", "sharp"])
@pytest.mark.parametrize(("index", "place"), [(4, (1, 1)), (-1, (1, 2)), ((0, -2), (0, 1))])
def test_every_token_against_its_definition(debias, value, index, place):
    student, teacher = logits(1, 2, 3, VOCAB), logits(2, 2, 3, VOCAB)
    loss = loss_with(Dense(), debias=debias, value=value, temperature=1.5, reduction="none")
    found = loss.explain(student, teacher, position=index, top=None)
    q, p = (side[place].div(1.5).softmax(-1) for side in (student, teacher))
    cost = loss.cost(VOCAB, VOCAB).double()
    solution = sinkhorn(q, p, cost, epsilon=0.2, tolerance=1e-9)
    plan = solution.plan()
    assert len(found.moves) == VOCAB**2
    assert sum(move.mass for move in found.moves) == pytest.approx(1)
    for move in found.moves:
        assert move.mass == pytest.approx(plan[move.source, move.target].item(), abs=1e-6)
        assert move.cost == pytest.approx(cost[move.source, move.target].item(), abs=1e-5)
    for sums, masses in zip(marginals(found), (q, p), strict=True):
        assert sums == pytest.approx(dict(enumerate(masses.tolist())), abs=1e-8)
    assert [move.mass for move in found.moves] == sorted(m.mass for m in found.moves)[::-1]
    total = sum(move.mass * move.cost for move in found.moves)
    assert total == pytest.approx(solution.transport_cost.item(), rel=1e-5)
    assert found.transport_cost == pytest.approx(total)
    assert found.moved_mass == pytest.approx(1 - plan.diagonal().sum().item(), abs=1e-6)
    assert found.value == pytest.approx(loss(student, teacher)[place].item(), abs=1e-8)
    assert found.marginal_error <= 1e-9


@pytest.mark.parametrize("teacher_kind", ["logits", "dense", "topk"])
@pytest.mark.parametrize("tail", [True, False])
def test_heads_and_the_atom_of_all_others(teacher_kind, tail):
    student, teacher = logits(1, 4, VOCAB), logits(2, 4, VOCAB)
    loss = loss_with(TopK(4, tail=tail), reduction="none")
    given = {
        "logits": teacher,
        "dense": DenseTeacher(teacher),
        "topk": TopKTeacher.from_logits(teacher, 4),
    }
    found = loss.explain(student, given[teacher_kind], position=2, top=None)
    q, p = student[2].softmax(-1), teacher[2].softmax(-1)
    kept = p.topk(4).indices.tolist()
    heavy = q.topk(4).indices.tolist()
    if teacher_kind == "topk":  # of which more must be certain to be heavier than in the teacher
        most = min(p[kept].sort().values[1].item(), 1 - p[kept].sum().item())
        heavy = [token for token in heavy if q[token] > most]
    head = sorted({*kept, *heavy})
    assert 4 < len(head) < VOCAB
    a = {token: q[token].item() for token in head}
    b = {token: p[token].item() for token in head}
    if teacher_kind == "topk":
        b = {token: mass if token in kept else 0.0 for token, mass in b.items()}
    for masses in (a, b):
        if tail:
            masses[OTHERS] = 1 - sum(masses.values())
        else:
            total = sum(masses.values())
            masses.update({token: mass / total for token, mass in masses.items()})
    rows, columns = marginals(found)
    assert rows == pytest.approx(a, abs=1e-8)
    assert columns == pytest.approx(b, abs=1e-8)
    costs = loss.cost(VOCAB, VOCAB).double()
    atoms = [*head, OTHERS] if tail else head
    table = torch.zeros(len(atoms), len(atoms), dtype=torch.float64)
    for i, x in enumerate(atoms):
        for j, y in enumerate(atoms):
            row, column = (slice(None) if z == OTHERS else z for z in (x, y))
            table[i, j] = costs[row, column].mean()
    if tail:
        table[-1, -1] = -0.2 * costs.div(-0.2).exp().mean().log()
    masses = (torch.tensor(list(side.values()), dtype=torch.float64) for side in (a, b))
    solution = sinkhorn(*masses, table, epsilon=0.2, tolerance=1e-9)
    total = sum(move.mass * move.cost for move in found.moves)
    assert total == pytest.approx(solution.transport_cost.item(), rel=1e-5)
    stays = sum(move.mass for move in found.moves if move.source == move.target)
    assert found.moved_mass == pytest.approx(1 - stays)
    assert found.value == pytest.approx(loss(student, given[teacher_kind])[2].item(), abs=1e-8)


def test_tokens_by_name():
    model = tiny_llama(0)
    ids = torch.tensor([[1, 5, 6, 8, 2], [1, 5, 6, 7, 9]])
    with torch.no_grad():
        student, teacher = model(ids).logits, tiny_llama(1)(ids).logits
    loss = otkd.SinkhornLoss(embedding=model.get_input_embeddings().weight, support=TopK(6))
    numbers = loss.explain(student, teacher, position=(1, 3))
    named = loss.explain(student, teacher, tokenizer(), (1, 3))
    assert len(named.moves) == 20
    names = {OTHERS: OTHERS, **dict(enumerate(WORDS))}
    for one, other in zip(named.moves, numbers.moves, strict=True):
        assert one == Move(names[other.source], names[other.target], other.mass, other.cost)
    assert any(isinstance(move.source, int) for move in numbers.moves)
    short = loss.explain(student, teacher, tokenizer(WORDS[:8]), top=None)
    seen = {move.source for move in short.moves}
    assert seen <= {OTHERS, *WORDS[:8], *range(8, VOCAB)}


def test_several_atoms_of_others():
    student, teacher = logits(1, 2, VOCAB), logits(2, 2, VOCAB)
    found = loss_with(TopK(4, clusters=3)).explain(student, teacher, top=None)
    rows, columns = marginals(found)
    others = {f"(other tokens {number})" for number in (1, 2, 3)}
    for sums, masses in ((rows, student), (columns, teacher)):
        assert {name for name in sums if isinstance(name, str)} == others
        p = masses[0].softmax(-1)
        rest = 1 - sum(p[token].item() for token in sums if token not in others)
        assert sum(sums[name] for name in others) == pytest.approx(rest, abs=1e-8)
    stays = sum(move.mass for move in found.moves if move.source == move.target)
    assert found.moved_mass == pytest.approx(1 - stays)


def test_two_vocabularies():
    cost = EmbeddingCost(embedding(), embedding(8, 12))
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, 12)
    theirs = [f"##{number}" for number in range(12)]
    for support in (Dense(), TopK(4)):
        loss = loss_with(support, cost=cost)
        found = loss.explain(student, teacher, (tokenizer(), tokenizer(theirs)), 1, top=None)
        assert {move.source for move in found.moves} <= {*WORDS, OTHERS}
        assert {move.target for move in found.moves} <= {*theirs, OTHERS}
        assert found.moved_mass == pytest.approx(1)
        columns = marginals(found)[1]
        p = teacher[1].softmax(-1)
        heaviest = theirs[p.argmax()]
        assert columns[heaviest] == pytest.approx(p.max().item(), abs=1e-8)
        with pytest.raises(TypeError, match="must be a pair"):
            loss.explain(student, teacher, tokenizer())
        assert isinstance(loss.explain(student, teacher).moves[0].source, (int, str))


def test_other_positions_may_hold_anything_and_nothing_is_left_behind():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    loss = loss_with(TopK(4))
    expected = loss.explain(student, teacher, position=1)
    broken = student.clone()
    broken[[0, 2]] = torch.nan
    broken.requires_grad_()
    assert loss.explain(broken, teacher, position=1) == expected
    assert broken.grad is None
    assert loss.last_report is None
    with pytest.raises(ValueError, match="without a softmax"):
        loss.explain(broken, teacher, position=0)
    assert loss.explain(student[1], teacher[1]).moves == expected.moves
    assert loss.explain(student[1], teacher[1], position=()).moves == expected.moves
    for kind in (torch.float32, torch.bfloat16):
        rough = loss_with(TopK(4), tolerance=1e-5).explain(student.to(kind), teacher.to(kind))
        assert rough.value == pytest.approx(loss.explain(student, teacher).value, abs=0.02)


def test_unbalanced_plans_have_other_marginals():
    student, teacher = logits(1, 3, VOCAB), logits(2, 3, VOCAB)
    found = loss_with(Dense(), marginal_relaxation=0.05).explain(student, teacher, top=None)
    rows, _ = marginals(found)
    gap = sum(abs(rows[i] - mass) for i, mass in enumerate(student[0].softmax(-1).tolist()))
    assert gap > 0.01


def test_as_text_and_dictionaries():
    moves = (
        Move("wet", "雨", 0.25, 1.5),
        Move("a\nb", OTHERS, 0.125, 0.0),
        Move(3, "x", 0.0, 10.0),
    )
    table = Explanation(moves, 0.1, 0.2, 0.3, 1e-5)
    assert str(table).splitlines() == [
        "value 0.1, transport cost 0.2, moved mass 0.3, marginal error 1.0e-05",
        "from  to                mass     cost",
        "wet   雨              0.2500   1.5000",
        "a\\nb  (other tokens)  0.1250   0.0000",
        "3     x               0.0000  10.0000",
    ]
    assert table.to_dicts()[0] == {"source": "wet", "target": "雨", "mass": 0.25, "cost": 1.5}
    assert json.loads(json.dumps(table.to_dicts()))[2]["source"] == 3
    assert len(str(Explanation((), 0.0, 0.0, 0.0, 0.0)).splitlines()) == 2


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (IndexError, "no position 6 in a batch of shape", {"position": 6}),
        (IndexError, "no position", {"position": (2, 0)}),
        (IndexError, "no position -7", {"position": -7}),
        (IndexError, "does not have the 2 dimensions", {"position": (1,)}),
        (ValueError, "top must be", {"top": -1}),
        (TypeError, "convert_ids_to_tokens, which str does not", {"tokenizer": "bert"}),
        (TypeError, "a tokenizer or a pair", {"tokenizer": (None, None, None)}),
    ],
)
def test_refused(error, message, options):
    loss = loss_with(Dense())
    with pytest.raises(error, match=message):
        loss.explain(logits(1, 2, 3, VOCAB), logits(2, 2, 3, VOCAB), **options)


def test_a_support_without_a_plan_says_so(monkeypatch):
    monkeypatch.setattr("otkd.supports.dense.LARGEST_DENSE", VOCAB - 1)
    cost = otkd.costs.EmbeddingCost(logits(0, VOCAB, 3))
    loss = otkd.SinkhornLoss(cost, support=Dense())
    with pytest.raises(ValueError, match=r"Dense\(\) does not store the whole plan .* use"):
        loss.explain(logits(1, 2, VOCAB), logits(2, 2, VOCAB))
