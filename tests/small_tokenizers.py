"""Small tokenizers of every family, and texts that are hard to align."""

import functools
import json

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat, singing; the mats were matted and the singer sat on them",
    "a café in the old town — 7 cats, 77 mats\n\n  indented\ttabs   and spaces",
    "naïve re\u0301sume\u0301 中文字 中文 שלום עולם 🤦🏽\u200d♀\ufe0f 👩\u200d👩\u200d👧 é e\u0301",
] * 4

HOSTILE = (
    *("a", "b", "the", "ing", "cats", "7", ",", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000"),
    *("##", "Ġ", "▁", "<0x0A>", "<s>"),  # what tokenizers write
    *("é", "e\u0301", "ï", "\u0301", "ß", "İ", "ﬁ", "中", "文", "ש", "\u200f", "𝔘", "\U0010ffff"),
    *("🤦", "🏽", "\u200d", "♀\ufe0f", "\x00", "\x07", "\x7f", "\x1c", "\ufffd", "\ue000"),
)
hostile_texts = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.characters(exclude_categories=["Cs"])), max_size=24
).map("".join)


def byte_level(size, *, add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer, {"eos_token": "<|end|>", "bos_token": "<|start|>"}


def sentencepiece(size, *, by_normalizer=False):
    """Byte fallback as in Llama's tokenizer, which writes spaces when it normalises."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    trained.train_from_iterator([text.lower() for text in SENTENCES[:2]], trainer)
    vocab = trained.get_vocab()
    merges = [
        (left, right)
        for whole in sorted(vocab, key=vocab.__getitem__)
        if len(whole) > 1 and vocab[whole] >= len(special)
        for left, right in [_halves(whole, vocab)]
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if by_normalizer:
        written = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence(list(written))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    of_spaces = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [of_spaces[0], decoders.ByteFallback(), decoders.Fuse(), of_spaces[1]]
    )
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram(size, *, byte_fallback):
    """As in T5's or Gemma's tokenizer: the most probable tokens, or bytes for what has none."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    trained.train_from_iterator([text.lower() for text in SENTENCES[:2]], trainer)
    vocab = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    if byte_fallback:
        vocab[3:3] = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    of_spaces = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [of_spaces[0], decoders.ByteFallback(), decoders.Fuse(), of_spaces[1]]
    )
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _halves(whole, vocab):
    """A pair of known tokens that is merged to ``whole`` before its other pairs are known."""
    pairs = [(whole[:i], whole[i:]) for i in range(1, len(whole))]
    return min(
        (pair for pair in pairs if all(part in vocab for part in pair)),
        key=lambda pair: max(vocab[part] for part in pair),
    )


def wordpiece(size):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer, {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


MAKERS = {
    "byte-level": lambda: byte_level(400),
    "byte-level, small": lambda: byte_level(270),
    "byte-level, space": lambda: byte_level(330, add_prefix_space=True),
    "sentencepiece": lambda: sentencepiece(340),
    "sentencepiece, Llama's": lambda: sentencepiece(340, by_normalizer=True),
    "unigram": lambda: unigram(120, byte_fallback=False),
    "unigram, bytes": lambda: unigram(120, byte_fallback=True),
    "wordpiece": lambda: wordpiece(120),
}


@functools.cache
def tokenizer_of(name):
    backend, special = MAKERS[name]()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
