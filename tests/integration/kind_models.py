"""Tiny models of every kind, each with a batch of its own: real classes, nothing downloaded."""

from __future__ import annotations

import torch
import transformers

from tests.models import VOCAB

PAD, START = 1, 2
_BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": START,
}
_POSITIONS = {"max_position_embeddings": 32}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
}
WAVE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 5),
    "conv_kernel": (10, 5),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "feat_extract_norm": "layer",
    "classifier_proj_size": 8,
}


def built(name: str, seed: int = 0, *, scale: float = 3.0, **config):
    """A model by its class; larger weights than fresh ones, whose logits are nearly uniform."""
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def _composed(name: str, config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config.pad_token_id, config.decoder_start_token_id = 0, START
        model = getattr(transformers, name)(config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def _bert_config():
    return transformers.BertConfig(**BERT)


def encoder_decoder(seed: int = 0):
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        _bert_config(), _bert_config()
    )
    return _composed("EncoderDecoderModel", config, seed)


def vision_encoder_decoder(seed: int = 0, vocab: int = VOCAB):
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), transformers.BertConfig(**BERT | {"vocab_size": vocab})
    )
    return _composed("VisionEncoderDecoderModel", config, seed)


def speech_encoder_decoder(seed: int = 0):
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.Wav2Vec2Config(**WAVE), _bert_config()
    )
    return _composed("SpeechEncoderDecoderModel", config, seed)


def t5gemma(seed: int = 0):
    module = LLAMA | {"num_hidden_layers": 2, "head_dim": 8, "bos_token_id": START}
    return built("T5GemmaForConditionalGeneration", seed, encoder=module, decoder=module,
                 vocab_size=VOCAB, dropout_rate=0.0)  # fmt: skip


def _of(name: str, **config):
    return lambda seed=0: built(name, seed, **config)


def tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(4, VOCAB, (3, length), generator=torch.Generator().manual_seed(length))


def target(length: int = 5) -> torch.Tensor:
    """Labels of another length than the input, with −100 at its ends and within."""
    labels = tokens(length)
    labels[0, 3:] = -100
    labels[1, 0] = -100
    labels[2, 2] = -100
    return labels


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def text() -> dict[str, torch.Tensor]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target()}


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": _noise(400), "labels": target()}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(3, 8, 8), "labels": target()}


FSMT = (
    _of("FSMTForConditionalGeneration", langs=["en", "de"], src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB, **_BART, **_POSITIONS),
    text,
)  # fmt: skip
# name → (model of a seed, batch): encoder-decoders that say how they shift, and that do not.
ENCODER_DECODERS = {
    "bart": (_of("BartForConditionalGeneration", **_BART, **_POSITIONS), text),
    "mbart": (_of("MBartForConditionalGeneration", **_BART, **_POSITIONS), text),
    "plbart": (_of("PLBartForConditionalGeneration", **_BART, **_POSITIONS), text),
    "t5": (_of("T5ForConditionalGeneration", scale=1.0, **_T5), text),
    "pegasus": (_of("PegasusForConditionalGeneration", **_BART, **_POSITIONS), text),
    "marian": (_of("MarianMTModel", decoder_vocab_size=VOCAB, **_BART, **_POSITIONS), text),
    "prophetnet": (
        _of(
            "ProphetNetForConditionalGeneration",
            vocab_size=VOCAB,
            hidden_size=16,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            pad_token_id=0,
            decoder_start_token_id=0,
            ngram=1,
            num_buckets=4,
            relative_max_distance=8,
        ),
        text,
    ),
    "encoder-decoder": (encoder_decoder, text),
    "vision-encoder-decoder": (vision_encoder_decoder, image),
    "speech-encoder-decoder": (speech_encoder_decoder, sound),
    # Without prepare_decoder_input_ids_from_labels:
    "m2m100": (_of("M2M100ForConditionalGeneration", decoder_layerdrop=0.0, encoder_layerdrop=0.0,
                   **_BART, **_POSITIONS), text),
    "blenderbot": (_of("BlenderbotForConditionalGeneration", **_BART, **_POSITIONS), text),
    "blenderbot-small": (_of("BlenderbotSmallForConditionalGeneration", **_BART, **_POSITIONS),
                         text),
    "whisper": (
        _of("WhisperForConditionalGeneration", **_WHISPER, **_BART),
        lambda: {"input_features": _noise(8, 20), "labels": target()},
    ),
    "speech-to-text": (
        _of("Speech2TextForConditionalGeneration", input_feat_per_channel=8, input_channels=1,
            conv_channels=8, max_source_positions=40, max_target_positions=16, **_BART),
        lambda: {"input_features": _noise(20, 8), "labels": target()},
    ),
    "moonshine": (
        _of(
            "MoonshineForConditionalGeneration",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
            encoder_num_key_value_heads=2,
            decoder_num_key_value_heads=2,
            pad_token_id=2,
            max_position_embeddings=32,
        ),
        lambda: {"input_values": _noise(2000), "labels": target()},
    ),
    "speecht5": (
        _of(
            "SpeechT5ForSpeechToText",
            **{k: v for k, v in WAVE.items() if k not in ("num_hidden_layers", "layerdrop",
               "num_attention_heads", "intermediate_size", "classifier_proj_size")},
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_text_positions=20,
            positional_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            decoder_start_token_id=2,
        ),
        lambda: {"input_values": _noise(2000), "labels": target()},
    ),
    "udop": (
        _of("UdopForConditionalGeneration", scale=1.0, image_size=8, patch_size=4, **_T5),
        lambda: text() | {"bbox": torch.zeros(3, 7, 4), "pixel_values": _noise(3, 8, 8)},
    ),
    "t5gemma": (t5gemma, text),
    # Only the configuration of its language model says that it is an encoder-decoder.
    "instructblip": (
        _of(
            "InstructBlipForConditionalGeneration",
            scale=1.0,
            vision_config=VISION,
            qformer_config={**{k: v for k, v in BERT.items() if k != "num_hidden_layers"},
                            "num_hidden_layers": 2, "encoder_hidden_size": 16},
            text_config={**_T5, "model_type": "t5"},
            num_query_tokens=4,
            image_token_index=VOCAB - 1,
        ),
        lambda: instructed_picture(),
    ),
    "pix2struct": (
        _of(
            "Pix2StructForConditionalGeneration",
            scale=1.0,
            text_config={"vocab_size": VOCAB, "hidden_size": 16, "d_kv": 8, "d_ff": 16,
                         "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
                         "decoder_start_token_id": 0, "pad_token_id": 0},
            vision_config={"hidden_size": 16, "patch_embed_hidden_size": 768, "d_ff": 16,
                           "d_kv": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "dropout_rate": 0.0, "attention_dropout": 0.0},
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
        lambda: {"flattened_patches": _noise(4, 770).abs().clamp(max=1), "labels": target()},
    ),
}  # fmt: skip


def instructed_picture() -> dict[str, torch.Tensor]:
    """Four placeholders of an image before the instruction, and the instruction alone."""
    ids = torch.cat([torch.full((3, 4), IMAGE), tokens().clamp(max=IMAGE - 1)], 1)
    return {"input_ids": ids, "qformer_input_ids": tokens(), "labels": target(),
            "pixel_values": _noise(3, 8, 8)}  # fmt: skip


# name → (model whose decoder has a vocabulary of a size, batch)
DECODERS = {
    "whisper": (
        lambda vocab: built(
            "WhisperForConditionalGeneration", **_WHISPER, **_BART | {"vocab_size": vocab}
        ),
        lambda: {"input_features": _noise(8, 20), "labels": target()},
    ),
    "marian": (
        lambda vocab: built(
            "MarianMTModel", decoder_vocab_size=vocab, share_encoder_decoder_embeddings=False,
            tie_word_embeddings=False, **_BART, **_POSITIONS),
        text,
    ),
    "vision-encoder-decoder": (lambda vocab: vision_encoder_decoder(0, vocab), image),
}  # fmt: skip


def causal_text() -> dict[str, torch.Tensor]:
    """Labels at the input's own positions, with padding on the right."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sequence() -> dict[str, torch.Tensor]:
    return {k: v for k, v in causal_text().items() if k != "labels"} | {
        "labels": torch.tensor([0, 2, 1])
    }


def classes_of_tokens() -> dict[str, torch.Tensor]:
    return causal_text() | {"labels": causal_text()["labels"].remainder(3).where(
        causal_text()["labels"] != -100, -100)}  # fmt: skip


def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(3, 8, 8), "labels": torch.tensor([0, 2, 1])}


def utterances() -> dict[str, torch.Tensor]:
    return {"input_values": _noise(400), "labels": torch.tensor([0, 2, 1])}


def choices() -> dict[str, torch.Tensor]:
    ids = torch.stack([tokens(), tokens().flip(0)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([0, 1, 1])}  # fmt: skip


def picture_and_text() -> dict[str, torch.Tensor]:
    """Four placeholders of an image, then words."""
    batch = causal_text()
    ids = torch.cat([torch.full((3, 4), IMAGE), batch["input_ids"].clamp(max=IMAGE - 1)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "pixel_values": _noise(3, 8, 8),
    }


IMAGE = VOCAB - 1
_CLASSES = {"num_labels": 3}
_CLIP_VISION = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": PAD}  # fmt: skip

# The other kinds that are trained. The loss of the last column says whether the logits are paired
# with the next label.
OTHERS = {
    "causal, with a loss type": (_of("LlamaForCausalLM", **LLAMA), causal_text, True),
    "causal, by its name": (_of("GPT2LMHeadModel", **_GPT2), causal_text, True),
    "causal of the family of BERT": (
        _of("BertLMHeadModel", is_decoder=True, **BERT), causal_text, True
    ),
    "causal, of pictures": (
        _of("ImageGPTForCausalImageModeling", **_GPT2 | {"vocab_size": VOCAB + 1}),
        causal_text, True,
    ),
    "permuted": (
        _of("XLNetLMHeadModel", vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16,
            dropout=0.0, summary_last_dropout=0.0),
        causal_text, False,
    ),
    "masked": (_of("BertForMaskedLM", **BERT), causal_text, False),
    "sequence classification": (
        _of("BertForSequenceClassification", **BERT, **_CLASSES), sequence, False
    ),
    "sequence classification of a language model": (
        _of("LlamaForSequenceClassification", **LLAMA, **_CLASSES), sequence, False
    ),
    "sequence classification of an encoder-decoder": (
        _of("BartForSequenceClassification", **_BART, **_POSITIONS, **_CLASSES),
        lambda: sequence() | {"input_ids": torch.cat([tokens(6), torch.full((3, 1), 2)], 1),
                              "attention_mask": torch.ones(3, 7).long()},
        False,
    ),
    "token classification": (
        _of("BertForTokenClassification", **BERT, **_CLASSES), classes_of_tokens, False
    ),
    "token classification of an encoder": (
        _of("T5ForTokenClassification", classifier_dropout=0.0, scale=1.0, **_T5, **_CLASSES),
        classes_of_tokens, False,
    ),
    "multiple choice": (_of("BertForMultipleChoice", **BERT), choices, False),
    "next sentence": (
        _of("BertForNextSentencePrediction", **BERT),
        lambda: sequence() | {"labels": torch.tensor([0, 1, 1])}, False,
    ),
    "vision": (_of("ViTForImageClassification", **VISION, **_CLASSES), pictures, False),
    "vision of a convolution": (
        _of("ConvNextForImageClassification", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
            image_size=32, **_CLASSES),
        lambda: pictures() | {"pixel_values": _noise(3, 32, 32)}, False,
    ),
    "video": (
        _of("VivitForVideoClassification", num_frames=2, tubelet_size=[1, 4, 4],
            **{k: v for k, v in VISION.items() if k != "patch_size"}, **_CLASSES),
        lambda: {"pixel_values": _noise(2, 3, 8, 8), "labels": torch.tensor([0, 2, 1])}, False,
    ),
    "audio": (_of("Wav2Vec2ForSequenceClassification", **WAVE, **_CLASSES), utterances, False),
    "vision-language": (
        _of("LlavaForConditionalGeneration", image_token_index=IMAGE,
            vision_feature_layer=-1, vision_feature_select_strategy="default",
            vision_config=_CLIP_VISION, text_config={**LLAMA, "model_type": "llama"}),
        picture_and_text, True,
    ),
}  # fmt: skip

MIXTURES = {
    "mixtral": (_of("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=1, **LLAMA),
                causal_text),
    "qwen2-moe": (
        _of("Qwen2MoeForCausalLM", num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, **LLAMA),
        causal_text,
    ),
    "switch": (
        _of("SwitchTransformersForConditionalGeneration", num_experts=2, expert_capacity=64,
            router_jitter_noise=0.0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            scale=1.0, **_T5),
        text,
    ),
    "nllb-moe": (
        _of("NllbMoeForConditionalGeneration", num_experts=2, encoder_sparse_step=1,
            decoder_sparse_step=1, router_jitter_noise=0.0, expert_capacity=64,
            moe_token_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
            **_BART, **_POSITIONS),
        lambda: text() | {"decoder_attention_mask": torch.ones(3, 5).long()},
    ),
}  # fmt: skip

# name → (model, words of the refusal)
REFUSED = {
    "question answering": (_of("BertForQuestionAnswering", **BERT), "start_logits and end_logits"),
    "question answering of an encoder-decoder": (
        _of("BartForQuestionAnswering", **_BART, **_POSITIONS), "question answering"
    ),
    "CTC": (_of("Wav2Vec2ForCTC", **WAVE), "CTC"),
    "segmentation": (
        _of("SegformerForSemanticSegmentation", num_encoder_blocks=1, depths=[1], sr_ratios=[1],
            hidden_sizes=[8], patch_sizes=[3], strides=[2], num_attention_heads=[1],
            mlp_ratios=[1], decoder_hidden_size=8),
        "segmentation",
    ),
    "detection": (
        _of("YolosForObjectDetection", num_detection_tokens=2,
            **VISION | {"image_size": [8, 8]}),
        "object detection",
    ),
    "headless": (_of("LlamaModel", **LLAMA), "no head"),
    "headless encoder": (_of("BertModel", **BERT), "no head"),
    "headless vision": (_of("ViTModel", **VISION), "no head"),
    "two heads": (_of("GPT2DoubleHeadsModel", num_labels=1, **_GPT2), "mc_logits"),
    "pretraining": (_of("BertForPreTraining", **BERT), "pretraining"),
    "block diffusion": (
        _of("DiffusionGemmaForBlockDiffusion", vision_config=None, text_config={
            **LLAMA, "num_hidden_layers": 2, "head_dim": 8, "global_head_dim": 8,
            "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}),
        "block diffusion",
    ),
    "discriminator": (_of("ElectraForPreTraining", **BERT), "pretraining"),
    "speaker": (
        _of("Wav2Vec2ForXVector", **WAVE, tdnn_dim=(8, 8), tdnn_kernel=(5, 1),
            tdnn_dilation=(1, 1), xvector_output_dim=8),
        "speaker verification",
    ),
    "contrastive": (
        _of("CLIPModel", projection_dim=16, vision_config=VISION,
            text_config={"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "intermediate_size": 16}),
        "contrastive",
    ),
    "masked pictures": (
        _of("ViTForMaskedImageModeling", **VISION, encoder_stride=4), "image reconstruction"
    ),
    "time series": (
        _of("PatchTSTForClassification", num_input_channels=1, context_length=8, patch_length=4,
            d_model=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, num_targets=3),
        "time series",
    ),
    "regression": (
        _of("BertForSequenceClassification", **BERT, num_labels=1), r"num_labels=1"
    ),
    "regression by its problem": (
        _of("BertForSequenceClassification", **BERT, num_labels=3, problem_type="regression"),
        "regression",
    ),
    "several labels": (
        _of("BertForSequenceClassification", **BERT, num_labels=3,
            problem_type="multi_label_classification"),
        "multi_label_classification",
    ),
}  # fmt: skip
