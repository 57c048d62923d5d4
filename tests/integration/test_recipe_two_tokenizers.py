"""The recipe for two tokenizers as a user runs it, on tiny models with tokenizers of their own."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers
import two_tokenizers as recipe

import otkd
from otkd.alignment import align_positions, token_map
from tests.integration.test_recipes import PLAIN, assert_same, logged, weights
from tests.models import tiny_llama
from tests.small_tokenizers import tokenizer_of

STUDENT, TEACHER = "byte-level, small", "sentencepiece"
TEMPLATES = {
    "student": "{% for m in messages %}{{ m.content }}:{% endfor %}",
    "teacher": "{% for m in messages %}mat\t{{ m.content }}\n{% endfor %}",
}
ANSWERS = ("the cat sat", "mats, singing", "a café", "7 cats", "中 the", "sat on the mat")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a student, a teacher, and instructions."""
    folder = tmp_path_factory.mktemp("world")
    for seed, (side, name) in enumerate((("student", STUDENT), ("teacher", TEACHER))):
        tokenizer = tokenizer_of(name)
        tiny_llama(seed, vocab=len(tokenizer)).save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
        (folder / side / "chat_template.jinja").write_text(TEMPLATES[side])
    rows = [{"instruction": f"cats {i}", "output": text} for i, text in enumerate(ANSWERS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Runs the recipe in this process; returns the folder of its run."""
    monkeypatch.setenv("OTKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CI", "1")  # no telemetry
    level = transformers.logging.get_verbosity()

    def run(*more, student=world / "student", **changed):
        given = {
            "--teacher": world / "teacher",
            "--train-file": world / "rows.jsonl",
            "--max-length": 32,
            "--output-dir": tmp_path / "run",
            "--disable-tqdm": True,
        }
        if student is not None:
            given["--student"] = student
        given |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        argv = [str(part) for name, value in given.items() for part in (name, value)]
        recipe.main([*argv, *map(str, more)])
        return Path(given["--output-dir"])

    yield run
    transformers.logging.set_verbosity(level)


def plain_loss(world, loss, weight):
    """Of the student on all rows before the training, by its prompts and answers written out."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizers = [tokenizer_of(name) for name in (STUDENT, TEACHER)]
    models = [load(world / side).eval() for side in ("student", "teacher")]
    pairs, hard = [], []
    for i, answer in enumerate(ANSWERS):
        found = align_positions(answer, *tokenizers, add_special_tokens=False)
        logits, starts, prompts = [], [], (f"cats {i}:", f"mat\tcats {i}\n")
        for model, tokenizer, prompt in zip(models, tokenizers, prompts, strict=True):
            prompt, ids = (
                tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)
            )
            row = torch.tensor([[*prompt, *ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                logits.append(model(row).logits[0])
            starts.append(len(prompt))
            if model is models[0]:
                hard.append((logits[0][len(prompt) - 1 : -1], row[0, len(prompt) :]))
        own_space = tokenizers[1].convert_ids_to_tokens(ids[0]) == "▁"
        first = [starts[0] - 1], [starts[1] - 1 + own_space]
        for places, start, extra in zip((found.student, found.teacher), starts, first, strict=True):
            extra += (places + start).tolist()
        pairs.append([each[places] for each, places in zip(logits, first, strict=True)])
    ours, theirs = (torch.cat(each) for each in zip(*pairs, strict=True))
    ce = torch.nn.functional.cross_entropy(*(torch.cat(x) for x in zip(*hard, strict=True)))
    return ((1 - weight) * loss(ours, theirs) + weight * ce).item()


@pytest.mark.parametrize("name", recipe.LOSSES)
def test_the_first_loss_is_that_of_a_plain_loop(world, run, name):
    folder = run(*PLAIN, "--loss", name, "--ce-weight", 0.25)
    found = token_map(tokenizer_of(STUDENT), tokenizer_of(TEACHER))
    losses = {
        "pushforward": lambda: otkd.PushforwardLoss(found),
        "hybrid": lambda: otkd.HybridLogitLoss(found),
        "uld": otkd.UniversalLogitLoss,
    }
    values = logged(folder)
    assert len(values) == 3
    assert values[-1] < values[0]
    if name in losses:
        assert values[0] == pytest.approx(plain_loss(world, losses[name](), 0.25), abs=1e-4)


def test_accumulation_equals_the_full_batch(run, tmp_path):
    runs = [
        run(
            *(*PLAIN, "--ce-weight", 0.5),
            output_dir=tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((6, 1), (2, 3))
    ]
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), abs=1e-5)
    assert_same(weights(runs[0]), weights(runs[1]), 1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_student_of_layers_has_a_tokenizer_of_its_own_and_is_measured(world, run, trained):
    own = [] if trained else ["--student-tokenizer", world / "student"]
    folder = run(
        *(*PLAIN, *own, "--student-layers", 1, "--eval-rows", 2, "--vocab-size", 300), student=None
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    assert model.config.num_hidden_layers == 1
    assert model.config.vocab_size == len(tokenizer) != len(tokenizer_of(TEACHER))
    found = json.loads((folder / "bytes.json").read_text())
    size = len("".join(ANSWERS[:2]).encode())
    # The tokenizer that is trained on the other rows does not know all letters.
    assert 10 < found["bytes"] < size if trained else found["bytes"] == size
    assert 0 < found["student_bits_per_byte"] < 40
    assert found["first_byte_kl"] > 0


def test_what_does_not_fit_is_refused_before_the_training(world, run, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "cats", "output": "the cat"}\n{"instruction": "cats", "output": "a▁b"}'
    )
    cases = (
        (["--loss", "kl"], {}, "choose one of pushforward, hybrid, uld, transport_kl"),
        (["--loss-args", "{"], {}, "is not a JSON object"),
        (["--loss-args", '{"alpha": 1}'], {}, "alpha"),
        (["--student-tokenizer", world / "teacher"], {}, "leave --student-tokenizer out"),
        ([], {"train_file": tmp_path / "rows.jsonl"}, "rows.jsonl, line 2"),
    )
    for more, changed, said in cases:
        with pytest.raises(SystemExit, match="1"):
            run(*more, **changed)
        assert said in " ".join(capsys.readouterr().err.split())
        assert not [*tmp_path.glob("run/*")]
