"""A frozen teacher on the devices of a training: sharded if the student is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


def shards(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of a prepared teacher."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_config(accelerator)["zero_optimization"]["stage"] == 3
    return accelerator.distributed_type == DistributedType.FSDP


def placed(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The teacher, ready to run in the processes of ``accelerator``.

    With FSDP and ZeRO-3 its parameters are frozen and sharded like those of the student. Otherwise
    every process has all of them: ZeRO-1 and 2 shard only gradients and the state of an optimiser,
    and a teacher has neither. A model with a device map stays where it is.
    """
    if getattr(teacher, "hf_device_map", None) is not None:
        return teacher
    if not shards(accelerator):
        return teacher.to(accelerator.device)
    teacher.requires_grad_(False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _zero3(teacher, accelerator)
    with _plugin_of(teacher, accelerator):
        if accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(accelerator, teacher).eval()
        prepared = accelerator.prepare_model(teacher)
    # Accelerate saves the models that it knows of, and clips their gradients.
    accelerator._models.remove(prepared)
    return prepared.eval()


@contextmanager
def _plugin_of(teacher: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """A copy of the FSDP plugin, in which Accelerate writes the classes of the teacher's layers."""
    state: Any = accelerator.state
    plugin = state.fsdp_plugin
    state.fsdp_plugin = own = copy.copy(plugin)
    classes = {type(module).__name__ for module in teacher.modules()}
    given = own.transformer_cls_names_to_wrap
    if given is not None:  # those of the student; without any, the teacher's class names its own
        own.transformer_cls_names_to_wrap = [name for name in given if name in classes] or None
    own.activation_checkpointing = False
    try:
        yield
    finally:
        state.fsdp_plugin = plugin


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    return cast("Any", accelerator.state.deepspeed_plugin).deepspeed_config


def _zero3(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """An engine that gathers the parameters of each layer while it runs."""
    import deepspeed  # pyright: ignore[reportMissingImports]  (installed if it is configured)

    config = copy.deepcopy(_deepspeed_config(accelerator))
    # They belong to training; with them DeepSpeed would make an optimiser of its own.
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    return engine  # whose eval() returns None, unlike that of other modules
