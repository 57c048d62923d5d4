"""From hidden states to logits, with the scales of the families of models that TRL knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Names of a factor of the logits in the configurations of Cohere, Muse Glimmer and Falcon-H1.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """The logits of a causal language model ``(*batch, vocab)`` for its last hidden states.

    The output head is called as a module, so that hooks of sharded parameters run. Call this
    within the forward pass of the wrapped model.

    Args:
        model: without wrappers other than PEFT.
        hidden: ``(*batch, width)``, after the final normalisation.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    # With a device map the head may be on another device than the last layer.
    logits = head(hidden.to(head.weight.device)) * logit_factor(config)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_factor(config: Any) -> float:
    """The number that a model multiplies the output of its head by; 1 for most models.

    Args:
        config: of the text part of the model.
    """
    for name in _FACTORS:
        factor = getattr(config, name, None)
        if factor is not None:
            return factor
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # Granite and MiniCPM3 divide by it; HyperCLOVA X multiplies.
    return divisor if config.model_type == "hyperclovax" else 1 / divisor
