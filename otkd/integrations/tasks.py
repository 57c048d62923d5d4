"""The tasks of transformers' model classes, and which of them a loss over logits can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_OWN_LOOP = (
    "To distil it, call a loss on the tensors of your choice in a training loop of your own "
    '(docs/training.md, "A training loop of your own")'
)


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Attributes:
        title: its usual name.
        generates: whether the model predicts text, one token after the other.
        classifies: whether ``num_labels``, ``problem_type`` and ``id2label`` of the configuration
            describe its logits.
        refusal: why a loss over logits cannot train it, and what to do instead; None if it can.
    """

    title: str
    generates: bool = False
    classifies: bool = False
    refusal: str | None = None


def _refused(title: str, why: str, instead: str = _OWN_LOOP) -> Task:
    return Task(title, refusal=f"{why}. {instead}")


_SPANS = _refused(
    "question answering",
    "its outputs are start_logits and end_logits over the positions of the text, instead of logits",
    "In a training loop of your own, add the loss of the start_logits and that of the end_logits",
)
_UNALIGNED = _refused(
    "speech recognition with CTC or a transducer",
    "its labels are shorter than its logits and not aligned with them",
    "To distil frame by frame, call a loss without labels in a training loop of your own",
)
_MAPS = _refused(
    "segmentation",
    "the classes of its logits are not in the last dimension, and its labels have another size",
    "In a training loop of your own, resize the logits to the labels and pass "
    "logits.movedim(1, -1) of student and teacher",
)
_BOXES = _refused("object detection", "each of its logits belongs to a box that has to be matched")
_CONTRAST = _refused(
    "retrieval or contrastive learning", "it compares pairs and has no logits of fixed classes"
)
_NUMBERS = "its outputs are numbers instead of logits of classes"

# Names of the mappings of transformers' auto classes. The first group with a class decides.
_TASKS: tuple[tuple[str, Task], ...] = (
    (
        "CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ IMAGE_TEXT_TO_TEXT VISION_2_SEQ "
        "MULTIMODAL_LM CAUSAL_IMAGE_MODELING",
        Task("language modelling", generates=True),
    ),
    ("MASKED_LM", Task("masked language modelling")),
    (
        "SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION "
        "AUDIO_CLASSIFICATION",
        Task("classification", classifies=True),
    ),
    ("MULTIPLE_CHOICE NEXT_SENTENCE_PREDICTION", Task("choice")),
    ("AUDIO_FRAME_CLASSIFICATION", Task("classification of audio frames")),
    ("QUESTION_ANSWERING DOCUMENT_QUESTION_ANSWERING", _SPANS),
    (
        "TABLE_QUESTION_ANSWERING",
        _refused("table question answering", "each of its logits selects a cell on its own"),
    ),
    (
        "VISUAL_QUESTION_ANSWERING",
        _refused("visual question answering", "its answers are scored one by one, not as classes"),
    ),
    ("CTC RNNT TDT", _UNALIGNED),
    (
        "SEMANTIC_SEGMENTATION IMAGE_SEGMENTATION INSTANCE_SEGMENTATION UNIVERSAL_SEGMENTATION "
        "MASK_GENERATION",
        _MAPS,
    ),
    ("OBJECT_DETECTION ZERO_SHOT_OBJECT_DETECTION", _BOXES),
    ("ZERO_SHOT_IMAGE_CLASSIFICATION RETRIEVAL", _CONTRAST),
    (
        "AUDIO_XVECTOR",
        _refused("speaker verification", "it is used for its embeddings, not for logits"),
    ),
    (
        "TEXT_TO_WAVEFORM TEXT_TO_SPECTROGRAM",
        _refused("speech synthesis", "it predicts sounds or several codebooks at once"),
    ),
    (
        "MASKED_IMAGE_MODELING IMAGE_TO_IMAGE IMAGE_MATTING DEPTH_ESTIMATION NORMAL_ESTIMATION "
        "POINTMAP_ESTIMATION POSE_ESTIMATION KEYPOINT_DETECTION KEYPOINT_MATCHING",
        _refused("image reconstruction or measurement", _NUMBERS),
    ),
    (
        "TIME_SERIES_CLASSIFICATION TIME_SERIES_REGRESSION TIME_SERIES_PREDICTION",
        _refused("time series", "it names its outputs otherwise than logits"),
    ),
    ("PRETRAINING", _refused("pretraining", "its head serves pretraining objectives")),
)

# Its class is in a mapping of models that predict the next token.
_BY_NAME = {
    "DiffusionGemmaForBlockDiffusion": _refused(
        "block diffusion",
        "its logits are for a block of tokens with random noise, instead of the next token",
    )
}

# By the name of the loss in transformers, for classes that are in no mapping.
_BY_LOSS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_TO_SEQ_CAUSAL_LM",
    "ForMaskedLM": "MASKED_LM",
    "ForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "ForImageClassification": "IMAGE_CLASSIFICATION",
    "ForVideoClassification": "VIDEO_CLASSIFICATION",
    "ForAudioClassification": "AUDIO_CLASSIFICATION",
    "ForTokenClassification": "TOKEN_CLASSIFICATION",
    "ForQuestionAnswering": "QUESTION_ANSWERING",
    "ForSemanticSegmentation": "SEMANTIC_SEGMENTATION",
    "ForSegmentation": "IMAGE_SEGMENTATION",
    "ForObjectDetection": "OBJECT_DETECTION",
    "ForCTC": "CTC",
    "ParakeetForRNNT": "RNNT",
    "ParakeetForTDT": "TDT",
}


def task_of(model: Any) -> Task | None:
    """The task of a transformers model, from its class, a parent class, or its loss.

    Returns:
        None for other modules, and for classes that are in no mapping.
    """
    for parent in type(model).__mro__:
        found = _by_class().get(parent.__name__)
        if found is not None:
            return found
    mapping = _BY_LOSS.get(getattr(model, "loss_type", None) or "")
    return None if mapping is None else _by_mapping()[mapping]


@cache
def _by_mapping() -> Mapping[str, Task]:
    return {mapping: task for mappings, task in _TASKS for mapping in mappings.split()}


@cache
def _by_class() -> Mapping[str, Task]:
    from transformers.models.auto import modeling_auto

    found = dict(_BY_NAME)
    for mapping, task in _by_mapping().items():
        named = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for names in named.values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, task)
    return found
