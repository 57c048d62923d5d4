"""Tiny models with random weights: real architectures of transformers, nothing downloaded."""

from __future__ import annotations

import tokenizers
import torch
import transformers

VOCAB = 29
CLASSES = 3
WIDTH = 32
# Of TrainingArguments: plain gradient descent, whose weights show every gradient, and a log of each
# step.
PLAIN_TRAINING = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
}


def _built(seed: int, model_class, config, scale: float = 2.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        # Fresh weights give logits so near uniform that a mistake would hide in the rounding.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
    return model


def tiny_bert(seed: int = 0, *, dropout: float = 0.0, **config):
    """Two layers, classifies a sequence into three classes."""
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **config,
    )
    return _built(seed, transformers.BertForSequenceClassification, config, scale=5)


def tiny_masked_lm(seed: int = 0):
    """Predicts tokens where they are: logits for each token, not shifted."""
    return _built(seed, transformers.BertForMaskedLM, tiny_bert().config)


def tiny_distilbert(seed: int = 0):
    """A classifier that, unlike BERT, reads no segments."""
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB,
        dim=WIDTH,
        n_layers=1,
        n_heads=2,
        hidden_dim=64,
        max_position_embeddings=32,
        num_labels=CLASSES,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )
    return _built(seed, transformers.DistilBertForSequenceClassification, config, scale=5)


def tiny_llama(seed: int = 0, *, vocab: int = VOCAB, layers: int = 2):
    """A causal language model whose loss type says that it shifts."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _built(seed, transformers.LlamaForCausalLM, config)


def save_tokenizer(folder: str, vocab: int):
    """Save a tokenizer of ``vocab`` words "w3", "w4", …, of which the first three are special."""
    special = ["<pad>", "<bos>", "<eos>"]
    words = [*special, *(f"w{i}" for i in range(len(special), vocab))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def tiny_gpt2(seed: int = 0, *, vocab: int = VOCAB):
    """A causal language model that only its class name gives away."""
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _built(seed, transformers.GPT2LMHeadModel, config)


def tiny_t5(seed: int = 0):
    """An encoder and decoder, whose labels are not shifted against its logits."""
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _built(seed, transformers.T5ForConditionalGeneration, config, scale=1)
