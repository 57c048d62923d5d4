"""Trainings whose models are whole in one process, and sharded over several by Accelerate's FSDP2.

Accelerate shards on devices other than CPUs only, so the trainer here is told that it does.
"""

import os

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import otkd
from otkd.integrations.transformers import DistillationTrainer
from tests.integration.distributed_runs import STEP, adapted, arguments, mixed, texts
from tests.integration.test_trainer import pad
from tests.models import tiny_gpt2, tiny_llama

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
# With two processes, one of them has no example of the second teacher in the first step.
ROWS = [
    row | {"teacher_index": int(index % STEP == 0)}
    for index, row in enumerate(texts((9, 3, 7, 2, 8, 4, 6, 5, 3, 7, 4, 8)))
]


class Sharding(DistillationTrainer):
    """A trainer under FSDP2; the first process alone has loaded the weights of models."""

    plugin = {  # noqa: RUF012
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],  # of the student
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": True,
    }

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if WORLD > 1:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.plugin)
            state.distributed_type = DistributedType.FSDP
            state.device = torch.device("cpu")  # without the index that the older FSDP refuses
            self.is_fsdp_enabled = True


class OlderSharding(Sharding):
    """A trainer under FSDP1, which does without the weights of the first process on CPUs."""

    plugin = Sharding.plugin | {
        "fsdp_version": 1,
        "reshard_after_forward": "FULL_SHARD",
        "sync_module_states": False,
        "use_orig_params": True,
        "cpu_ram_efficient_loading": False,
    }


def loaded(model):
    """A model as ``from_pretrained`` leaves it with ``cpu_ram_efficient_loading``."""
    if RANK > 0:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(folder, student, teacher, loss=None, kind=Sharding, **options):
    trainer = kind(
        student, arguments(folder), train_dataset=ROWS, data_collator=pad, teacher=teacher,
        loss=otkd.KLLoss() if loss is None else loss, **options,
    )  # fmt: skip
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    teachers = trainer._pair.teacher_models
    found = {
        "losses": logs,
        "evaluation": trainer.evaluate(ROWS)["eval_loss"],
        "sharded": all(
            isinstance(each, FSDPModule | FullyShardedDataParallel) for each in teachers
        ),
        "frozen": not any(p.requires_grad for each in teachers for p in each.parameters()),
        "students": len(trainer.accelerator._models),
    }
    if kind is Sharding:
        parameters = [whole(p).detach().flatten() for p in trainer.model.parameters()]
        found["weights"] = torch.cat(parameters)
    return found


def runs(folder):
    # The layers of GPT-2 have another class than those of the student.
    two = [loaded(tiny_gpt2(1)), loaded(tiny_llama(2))]
    copies = [loaded(tiny_gpt2(1)), loaded(tiny_llama(2))]
    return {
        "sharded, one": run(folder, loaded(tiny_llama(0)), loaded(tiny_gpt2(1))),
        "sharded, mixture": run(
            folder, loaded(tiny_llama(0)), two, mixed(), teacher_weights=[0.3, 0.7]
        ),
        "sharded, per example": run(folder, loaded(tiny_llama(0)), copies),
        "sharded, base model": run(folder, loaded(adapted(1)), "base_model", mixed()),
        "sharded, FSDP1": run(folder, tiny_llama(0), tiny_gpt2(1), kind=OlderSharding),
    }
