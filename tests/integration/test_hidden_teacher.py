"""A stored teacher of hidden states: the logits of the model, whatever is done with the batch."""

import pytest
import torch

import otkd
from otkd.integrations.transformers import DistillationTrainer
from tests.models import VOCAB, tiny_gpt2, tiny_llama

transformers = pytest.importorskip("transformers")
close = torch.testing.assert_close


def stored(model, tokens):
    with torch.no_grad():
        states = model.base_model(tokens).last_hidden_state
    head = model.get_output_embeddings()
    return otkd.HiddenStateTeacher(states, head.weight.detach(), head.bias)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_its_logits_are_those_of_the_model(build):
    model = build().eval()
    tokens = torch.randint(3, VOCAB, (4, 7))
    teacher = stored(model, tokens)
    with torch.no_grad():
        logits = model(tokens).logits
    close(teacher.logits(), logits)
    assert teacher.shape == logits.shape
    rows = torch.tensor([2, 0])
    close(teacher[rows].logits(), logits[rows])
    close(teacher[1].logits(), logits[1])
    close(otkd.KLLoss()(logits, teacher), torch.zeros(()), atol=1e-6, rtol=0)
    assert not teacher.logits().requires_grad


def test_it_is_written_and_read_with_its_head(tmp_path):
    teacher = otkd.HiddenStateTeacher(torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5))
    teacher.save(tmp_path / "teacher.safetensors")
    read = otkd.HiddenStateTeacher.load(tmp_path / "teacher.safetensors")
    close(read.logits(), teacher.logits())
    half = otkd.HiddenStateTeacher(teacher.states.half(), teacher.weight)
    assert half.logits().dtype == torch.float32


def test_a_student_trained_from_it_is_the_one_trained_with_the_model(tmp_path):
    teacher = tiny_llama(1).eval()
    tokens = torch.randint(3, VOCAB, (6, 7))
    rows = [
        {"input_ids": row[:length]} for row, length in zip(tokens, (7, 5, 6, 3, 7, 4), strict=True)
    ]
    weights = []
    for given in (teacher, stored(teacher, tokens)):
        trainer = DistillationTrainer(
            model=tiny_llama(2),
            loss=otkd.KLLoss(),
            teacher=given,
            train_dataset=rows,
            data_collator=transformers.DataCollatorForSeq2Seq(Padding()),
            args=transformers.TrainingArguments(
                str(tmp_path), use_cpu=True, report_to="none", max_steps=3, logging_strategy="no",
                per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
            ),
        )  # fmt: skip
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    close(*weights, rtol=1e-4, atol=1e-6)


class Padding:
    """Pads on the right, as a tokenizer would."""

    padding_side = "right"

    def pad(self, rows, **options):
        longest = max(len(row["input_ids"]) for row in rows)
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row["input_ids"])] = row["input_ids"]
            mask[place, : len(row["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(5, 4)), "weight"),
        ((torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(4)), r"bias must be \(5,\)"),
        ((torch.zeros(2, 4).long(), torch.zeros(5, 4)), "states must have floating"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(tensors, message):
    with pytest.raises((TypeError, ValueError), match=message):
        otkd.HiddenStateTeacher(*tensors)
