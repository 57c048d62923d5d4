"""Training with a teacher that has its own tokenizer."""

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

from transformers import DataCollatorWithFlattening

import otkd
from otkd.alignment import TokenMap, align_positions, prefix_cost, token_ends, token_map
from otkd.integrations.transformers import DistillationTrainer
from otkd.tasks.causal_lm import padding_collator
from tests.integration.test_trainer import arguments, logged, weights  # noqa: F401
from tests.models import tiny_bert, tiny_llama
from tests.small_tokenizers import tokenizer_of

STUDENT, TEACHER = tokenizer_of("byte-level, small"), tokenizer_of("sentencepiece")
TOKENIZERS = {"processing_class": STUDENT, "teacher_tokenizer": TEACHER}
TEXTS = (
    "the cat sat",
    "mats, singing",
    "on the mat\n",
    "a café and 7 cats",
    "中 the singer",
    "7 cats",
    "sat on them",
    "the mats",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path))


def pushforward(**options):
    return otkd.PushforwardLoss(token_map(STUDENT, TEACHER), **options)


def mixed():
    return otkd.WeightedLoss({"map": (0.75, pushforward()), "ce": (0.25, "ce")})


def student(seed=0):
    return tiny_llama(seed, vocab=len(STUDENT))


def teacher(seed=1):
    return tiny_llama(seed, vocab=len(TEACHER))


def texts():
    return [{"text": text} for text in TEXTS]


def tokens(*, prompt=0):
    """The texts in the student's tokens; so many of them at the start are not trained on."""
    rows = []
    for text in TEXTS:
        ids = STUDENT(text, add_special_tokens=False).input_ids
        labels = ([-100] * prompt + ids[prompt:])[: len(ids)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def collator(side="right"):
    tokenizer = tokenizer_of("byte-level, small")
    tokenizer.pad_token = tokenizer.eos_token
    return padding_collator(tokenizer, side)


@pytest.fixture
def train(arguments):  # noqa: F811
    """Trains for an epoch with all texts as one batch, unless options say otherwise."""

    def train(loss, rows, *, evaluates=None, model=None, **options):
        settings = {
            name: options.pop(name)
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
            if name in options
        }
        given = {
            "teacher": teacher(),
            **TOKENIZERS,
            "data_collator": collator(),
        } | options
        model = student() if model is None else model
        trainer = DistillationTrainer(
            model,
            arguments(
                **{"per_device_train_batch_size": len(TEXTS), "learning_rate": 1.0} | settings
            ),
            loss=loss,
            train_dataset=rows,
            **given,
        )
        before = weights(model)
        trainer.train()
        trainer.moved = weights(model) - before
        assert trainer.moved.abs().max() > 2e-3
        return trainer

    return train


def same(ours, theirs):
    torch.testing.assert_close(ours.moved, theirs.moved, rtol=1e-5, atol=1e-6)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)


def plain_parts(model, prompt=0):
    """Pairs of logits at the common positions, and the logits and labels of all tokens."""
    pairs, hard = [], []
    other = teacher().eval()
    for text in TEXTS:
        found = align_positions(text, STUDENT, TEACHER, add_special_tokens=False)
        ids, others = (
            torch.tensor([each(text, add_special_tokens=False).input_ids])
            for each in (STUDENT, TEACHER)
        )
        ours = model(ids).logits[0]
        with torch.no_grad():
            theirs = other(others).logits[0]
        # The next token is one of the student's, and no part of the prompt.
        kept = (found.student + 1 < ids.shape[1]) & (found.student + 1 >= prompt)
        pairs.append((ours[found.student[kept]], theirs[found.teacher[kept]]))
        hard.append((ours[:-1][max(prompt - 1, 0) :], ids[0, 1:][max(prompt - 1, 0) :]))
    return [torch.cat(each) for each in (*zip(*pairs, strict=True), *zip(*hard, strict=True))]


def plain_loss(model, loss, prompt=0, weight=0.0):
    ours, theirs, logits, labels = plain_parts(model, prompt)
    return (1 - weight) * loss(ours, theirs) + weight * cross_entropy(logits, labels)


def plain_step(loss, rate=1.0, **options):
    """The value before, and how the weights move in a step of gradient descent."""
    model = student()
    value = plain_loss(model, loss, **options)
    value.backward()
    return value.item(), torch.cat([-rate * p.grad.flatten() for p in model.parameters()])


LOSSES = {
    "pushforward": pushforward,
    "hybrid": lambda: otkd.HybridLogitLoss(token_map(STUDENT, TEACHER)),
    "uld": otkd.UniversalLogitLoss,
    "transport_kl": lambda: otkd.TransportKLLoss(
        prefix_cost(STUDENT, TEACHER), price=3.0, support=otkd.supports.Dense()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [texts, tokens])
def test_a_step_is_that_of_a_plain_loop_at_the_common_positions(train, name, rows):
    loss = LOSSES[name]()
    trainer = train(loss, rows())
    value, moved = plain_step(loss)
    assert logged(trainer, "loss") == pytest.approx([value], abs=1e-4)
    torch.testing.assert_close(trainer.moved, moved, rtol=1e-4, atol=1e-6)


def test_hard_labels_are_those_of_all_tokens_of_the_student(train):
    trainer = train(mixed(), tokens(prompt=2))
    value, moved = plain_step(pushforward(), prompt=2, weight=0.25)
    assert logged(trainer, "loss") == pytest.approx([value], abs=1e-4)
    torch.testing.assert_close(trainer.moved, moved, rtol=1e-4, atol=1e-6)
    ours, _, logits, _ = plain_parts(student(), 2)
    assert len(ours) < len(logits)  # there are tokens at which the teacher is not known


@pytest.mark.parametrize(("size", "steps"), [(2, 4), (3, 3), (1, 8)])
def test_accumulation_equals_the_full_batch(train, size, steps):
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    same(train(mixed(), tokens(prompt=3), **parts), train(mixed(), tokens(prompt=3)))


def test_microbatches_without_a_common_position_do_not_count(train):
    """One token, and a part of a character, of which the teacher reads nothing."""
    rows = tokens()[:3]
    for ids in (STUDENT("a").input_ids, STUDENT("🤦").input_ids[:2]):
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    whole = train(mixed(), rows, per_device_train_batch_size=5)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    same(train(mixed(), rows, **sizes), whole)


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean"])
def test_accumulation_of_other_reductions(train, reduction):
    def loss():
        factor = 0.01 if reduction == "sum" else 1.0
        ce = otkd.CrossEntropyLoss(reduction=reduction)
        found = otkd.UniversalLogitLoss(reduction=reduction)
        return otkd.WeightedLoss({"uld": (factor, found), "ce": (factor, ce)})

    parts = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    same(train(loss(), tokens(prompt=3), **parts), train(loss(), tokens(prompt=3)))


def test_two_equal_tokenizers_are_one(train):
    identity = TokenMap.of_pairs(*[list(range(len(STUDENT)))] * 2, (len(STUDENT),) * 2)
    of_two = otkd.WeightedLoss(
        {"kl": (0.5, otkd.PushforwardLoss(identity, "kl")), "ce": (0.5, "ce")}
    )
    of_one = otkd.WeightedLoss({"kl": (0.5, otkd.KLLoss()), "ce": (0.5, "ce")})
    rows, other = tokens(prompt=3), tiny_llama(1, vocab=len(STUDENT))
    two = train(of_two, rows, teacher=other, teacher_tokenizer=STUDENT)
    one = train(of_one, rows, teacher=other, teacher_tokenizer=None)
    same(two, one)


@pytest.mark.parametrize("kind", ["tensor", "dense", "top-k", "hidden", "column"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stored_teacher_has_the_positions_of_its_own_tokens(train, kind, packed):
    other = teacher().eval()
    filler = {"input_ids": [], "attention_mask": []}
    for text in TEXTS:
        ids = TEACHER(text, add_special_tokens=False).input_ids
        filler["input_ids"].append(torch.tensor(ids))
        filler["attention_mask"].append(torch.ones(len(ids), dtype=torch.long))
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
        for name, each in filler.items()
    }
    with torch.no_grad():
        found = other(**batch, output_hidden_states=True)
    rows = tokens(prompt=1)
    if kind == "column":
        lengths = batch["attention_mask"].sum(1)
        for row, logits, length in zip(rows, found.logits, lengths, strict=True):
            row["teacher_logits"] = logits[:length]
    stored = {
        "tensor": found.logits,
        "dense": otkd.DenseTeacher(found.logits),
        "top-k": otkd.TopKTeacher.from_logits(found.logits, len(TEACHER)),
        "hidden": otkd.HiddenStateTeacher(
            found.hidden_states[-1], other.get_output_embeddings().weight.detach()
        ),
        "column": None,
    }[kind]
    options = {"data_collator": DataCollatorWithFlattening()} if packed else {}
    if packed:
        rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows]
    same(
        train(pushforward(), rows, teacher=stored, **options),
        train(pushforward(), tokens(prompt=1)),
    )


@pytest.mark.parametrize("several", [False, True])
def test_packing_and_padding_on_the_left_change_nothing(train, several):
    options = {"teacher": [teacher(1), teacher(2)]} if several else {}
    rows = tokens(prompt=2)
    if several:
        rows = [row | {"teacher_index": i % 2} for i, row in enumerate(rows)]
    expected = train(mixed(), rows, **options)
    unmasked = [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows]
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    same(train(mixed(), unmasked, data_collator=flat, **options), expected)
    same(train(mixed(), rows, data_collator=collator("left"), **options), expected)


def test_a_mixture_of_teachers_with_one_tokenizer(train):
    twice = {"teacher": [teacher(), teacher()], "teacher_weights": [0.5, 0.5]}
    same(train(pushforward(), texts(), **twice), train(pushforward(), texts()))


# Two chat templates ------------------------------------------------------------------------------


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def chats(turns):
    """Examples with answers after prompts of each model's own, and all pairs of positions."""
    rows, pairs = [], []
    for number, text in enumerate(TEXTS):
        row = {"input_ids": [], "labels": [], "teacher_input_ids": [], "teacher_labels": []}
        found = []
        for turn in range(turns):
            answer, starts = text.split()[-1] if turn else text, []
            sides = ("", STUDENT, f"cats {number}:"), ("teacher_", TEACHER, f"mat\t{turn}")
            for side, tokenizer, prompt in sides:
                prompt = encoded(tokenizer, prompt)
                ids = [*encoded(tokenizer, answer), tokenizer.eos_token_id]
                row[f"{side}input_ids"] += prompt + ids
                row[f"{side}labels"] += [-100] * len(prompt) + ids
                starts.append(len(row[f"{side}input_ids"]) - len(ids))
            inside = align_positions(answer, STUDENT, TEACHER, add_special_tokens=False)
            # The ends of both prompts, or the teacher's space that it adds to each text.
            added = token_ends(TEACHER, answer, add_special_tokens=False).ends[0] == 0
            found.append((starts[0] - 1, starts[1] - 1 + added))
            places = zip(inside.student.tolist(), inside.teacher.tolist(), strict=True)
            found += [(starts[0] + i, starts[1] + j) for i, j in places]
        rows.append(row)
        pairs.append(found)
    return rows, pairs


@pytest.mark.parametrize("turns", [1, 2])
def test_answers_are_compared_behind_two_chat_templates(train, turns):
    rows, pairs = chats(turns)
    assert [row["input_ids"] for row in rows] != [row["teacher_input_ids"] for row in rows]
    model, other, parts = student(), teacher().eval(), []
    for row, found in zip(rows, pairs, strict=True):
        ours, theirs = (torch.tensor(each) for each in zip(*found, strict=True))
        logits = model(torch.tensor([row["input_ids"]])).logits[0, ours]
        with torch.no_grad():
            parts.append(
                (logits, other(torch.tensor([row["teacher_input_ids"]])).logits[0, theirs])
            )
    expected = pushforward()(*map(torch.cat, zip(*parts, strict=True)))
    trainer = train(pushforward(), rows)
    assert logged(trainer, "loss") == pytest.approx([expected.item()], abs=1e-5)


def test_a_cut_answer_is_compared_as_far_as_both_have_it(train):
    rows, pairs = chats(1)
    for row in rows:
        for name in ("input_ids", "labels"):
            row[name] = row[name][:12]
    trainer = train(pushforward(), rows)
    batch = trainer.data_collator([rows[3]])
    kept = [pair for pair in pairs[3] if pair[0] < 12]
    assert len(kept) < len(pairs[3])
    found = zip(batch["aligned"]["student"][0], batch["aligned"]["teacher"][0], strict=True)
    assert [(int(i), int(j)) for i, j in found] == kept


# Evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("hard", [False, True])
def test_an_evaluation_is_that_of_the_whole_set_at_once(train, arguments, size, hard):  # noqa: F811
    loss = mixed() if hard else pushforward()
    model = student()
    trainer = DistillationTrainer(
        model,
        arguments(per_device_eval_batch_size=size),
        loss=loss,
        teacher=teacher(),
        train_dataset=tokens(),
        **TOKENIZERS,
        data_collator=collator(),
    )
    with torch.no_grad():
        expected = plain_loss(model.eval(), pushforward(), prompt=2, weight=0.25 * hard).item()
    found = trainer.evaluate(tokens(prompt=2))
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)


# Refusals ----------------------------------------------------------------------------------------

BAD = {
    "loss": (
        {"loss": otkd.WeightedLoss({"kl": (1.0, "kl"), "uld": (1.0, "uld")})},
        r"KLLoss compares the same tokens.*PushforwardLoss\(token_map.*leave teacher_tokenizer out",
    ),
    "student tokenizer": ({"processing_class": None}, "as processing_class="),
    "base model": ({"teacher": "base_model"}, "the student itself"),
    "classifier": ({"model": tiny_bert(0), "teacher": tiny_bert(1)}, "for causal language models"),
    "no tokenizer": ({"teacher_tokenizer": None}, "teacher_tokenizer="),
    "no tokenizer, kl": ({"teacher_tokenizer": None, "loss": otkd.KLLoss()}, "teacher_tokenizer="),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_refused_before_the_training(arguments, name):  # noqa: F811
    changed, message = BAD[name]
    given = {
        "model": student(),
        "loss": otkd.UniversalLogitLoss(),
        "teacher": teacher(),
        **TOKENIZERS,
        "train_dataset": texts(),
    } | changed
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(args=arguments(), **given)


def test_tokenizers_without_offsets_are_refused(arguments):  # noqa: F811
    for role in ("processing_class", "teacher_tokenizer"):
        given = TOKENIZERS | {role: object()}
        with pytest.raises(TypeError, match="fast tokenizer of transformers, got object"):
            DistillationTrainer(
                student(),
                arguments(),
                loss=otkd.UniversalLogitLoss(),
                teacher=teacher(),
                train_dataset=texts(),
                **given,
            )


def special(text):
    ids = encoded(STUDENT, text)
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


BAD_ROWS = {
    "neither": ([{"labels": [1]}], "needs input_ids or a text"),
    "special": ([special("cats<|start|>mats")], r"'<\|start\|>', which the teacher's tokenizer"),
    "answers": (
        [special("cats") | {"teacher_input_ids": encoded(TEACHER, "mats")}],
        "'cats' and 'mats'",
    ),
    "stretches": (
        [
            special("cats")
            | {"labels": [-100] * 9}
            | {"teacher_input_ids": encoded(TEACHER, "cats")}
        ],
        "labels for",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_aligned_are_refused(train, name):
    rows, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        train(pushforward(), rows)


def test_other_numbers_of_answers_are_refused(train):
    rows, _ = chats(2)
    for row in rows:
        row["teacher_labels"] = [-100] * 5 + row["teacher_input_ids"][5:]
    with pytest.raises(ValueError, match="2 stretches for the student and 1 for the teacher"):
        train(pushforward(), rows)


def test_a_batch_of_empty_texts_is_refused(train):
    with pytest.raises(ValueError, match="remove empty texts"):
        train(pushforward(), [{"text": ""}] * 2)


def test_a_collator_that_changes_tokens_is_refused(train):
    def cut(rows):
        return {name: values[:, :-1] for name, values in collator()(rows).items()}

    with pytest.raises(ValueError, match="must put the input_ids of each example into a row"):
        train(pushforward(), tokens(), data_collator=cut)


def test_a_stored_teacher_of_other_positions_is_refused(train):
    for shape in ((len(TEXTS), 3, len(TEACHER)), (len(TEXTS), len(TEACHER))):
        with pytest.raises(ValueError, match=r"tokens of the teacher: store \(examples, positions"):
            train(pushforward(), tokens(), teacher=torch.zeros(shape))
