"""What batch transport adds to KL while a student learns: gradients and plans, batch by batch.

    python benchmarks/glue_diagnosis.py --tasks cola,sst2 --data-dir GLUE

A student is trained with KL under the fair protocol. Before the first epoch and after each one, the
gradient of every transport term in the student's weights is compared with that of KL on the same
batches. Writes RESULTS/diagnosis.json, which is a table of docs/glue.md.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import nn

import otkd
from otkd.files import write_json
from otkd.functional.batch_transport import point_distances
from otkd.integrations.models import describe
from otkd.integrations.outputs import read_outputs
from otkd.losses.sinkd import UnrolledBatchSinkhornLoss
from otkd.study import provenance
from otkd.study.kinds import make_experiment
from otkd.study.messages import quiet_libraries
from otkd.study.protocols import load_protocol
from otkd.study.settings import Settings
from otkd.study.teachers import find_teacher, with_features
from otkd.study.training import fit
from otkd.tasks import get_task
from otkd.teachers import DenseTeacher

RESULTS = Path(__file__).resolve().parent / "results" / "glue"
BATCHES, SIZE, TEMPERATURE, EPSILON = 16, 32, 2.0, 0.1
TERMS = {
    "0.8 · S, public code": (0.8, UnrolledBatchSinkhornLoss()),
    "S debiased, L1": (1.0, otkd.BatchSinkhornLoss(debias=True)),
    "S debiased, states": (1.0, otkd.BatchSinkhornLoss(cost="hidden", debias=True)),
}


def gradient(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    weights = [p for p in model.parameters() if p.requires_grad]
    # Weights that a term does not reach, the head of a cost between states, count as 0.
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def own_mass(distances: torch.Tensor, epsilon: float = EPSILON) -> float:
    """The share of the mass that stays with its own sample; 1/b where the plan knows nothing."""
    uniform = distances.new_full((len(distances),), 1 / len(distances))
    plan = otkd.ot.sinkhorn(
        uniform, uniform, distances, epsilon=epsilon, tolerance=1e-4, max_iterations=2000
    ).plan()
    return float(plan.diagonal().sum())


def measure(model: nn.Module, batches: list[dict], signals: list[DenseTeacher]) -> dict:
    """Mean over the batches; ratios and cosines are of gradients in all trained weights."""
    model.eval()
    found: dict[str, list[float]] = {}
    for batch, signal in zip(batches, signals, strict=True):
        labels = batch["labels"]
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        outputs = model(**inputs, output_hidden_states=True)
        outputs = read_outputs(outputs, describe(model), "student", features=True)
        logits, states = outputs["logits"], outputs["features"]
        kl = 0.9 * otkd.KLLoss(temperature=TEMPERATURE)(logits, signal)
        reference = gradient(kl + 0.1 * otkd.get_loss("ce")(logits, labels=labels), model)
        for name, (weight, loss) in TERMS.items():
            value = weight * loss(logits, signal, student_features=states)
            own = gradient(value, model)
            found.setdefault(f"ratio, {name}", []).append(float(own.norm() / reference.norm()))
            cosine = torch.cosine_similarity(own, reference, 0)
            found.setdefault(f"cosine, {name}", []).append(float(cosine))
        with torch.no_grad():
            q, p = ((x / TEMPERATURE).softmax(-1) for x in (logits, signal.logits()))
            between = point_distances(states, signal.features.float(), "sqeuclidean")
            found.setdefault("own mass, L1", []).append(own_mass(point_distances(q, p, "l1")))
            found.setdefault("own mass, states", []).append(own_mass(between / between.mean()))
    return {name: fmean(values) for name, values in found.items()}


def diagnose(task: str, data_dir: Path | None, results: Path) -> dict:
    """The measurements of one task as a table of the report."""
    protocol = load_protocol("fair")
    settings = protocol.resolve(Settings(task, data_dir=data_dir, precision="bf16"), {"precision"})
    objectives = protocol.objectives(settings, {"precision"})
    folder = results / "fair" / task
    experiment = make_experiment(settings, objectives, folder, protocol.tuning)
    teacher = find_teacher(experiment, folder / "teacher", overwrite=False)
    if teacher is None:
        raise SystemExit(f"{folder} has no teacher: run `otkd compare {task} --protocol fair`")
    teacher = with_features(experiment, folder / "teacher", teacher)
    rows = experiment.student_rows
    chosen = torch.randperm(len(rows.train), generator=torch.Generator().manual_seed(0))
    parts = [part.tolist() for part in chosen[: BATCHES * SIZE].split(SIZE)]
    columns = [name for name in rows.train.column_names if name != "length"]
    batches = [
        dict(
            experiment.student_tokenizer.pad(
                rows.train.select(part).select_columns(columns)[:], return_tensors="pt"
            )
        )
        for part in parts
    ]
    signals = [teacher.on(rows, features=True)[torch.tensor(part)] for part in parts]
    student = experiment.build_student(0)
    stages = {"start": measure(student, batches, signals)}
    schedule = experiment.student_schedule(objectives[0], 0)
    each = -(-len(rows.train) // schedule.batch_size)

    def evaluate(model: nn.Module) -> dict[str, float]:
        stages[f"epoch {len(stages)}"] = measure(model, batches, signals)
        model.train()
        return {}

    work = Path(tempfile.mkdtemp())
    try:
        fit(
            student,
            rows.train,
            experiment.collator(experiment.student_tokenizer),
            dataclasses.replace(schedule, evaluate_every=each),
            work,
            loss=otkd.WeightedLoss(
                {"kl": (0.9, otkd.KLLoss(temperature=TEMPERATURE)), "ce": (0.1, "ce")}
            ),
            teacher=teacher.train,
            evaluate=evaluate,
            on_steps=lambda steps: None,
        )
    finally:
        shutil.rmtree(work)
    names = list(stages["start"])
    return {
        "title": f"{get_task(task).title}: transport beside KL",
        "teacher_score": teacher.result.score,
        "table": {
            "columns": ["", *stages],
            "rows": [
                [name, *(f"{stage[name]:.3g}" for stage in stages.values())] for name in names
            ],
        },
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def main(
    tasks: Annotated[str, typer.Option(help="With commas between them.")] = "cola,sst2",
    data_dir: Annotated[Path | None, typer.Option(help="GLUE's folder; else the hub.")] = None,
    results: Annotated[
        Path, typer.Option(help="Where the fair protocol's teachers are.")
    ] = RESULTS,
) -> None:
    """Measure and write RESULTS/diagnosis.json."""
    quiet_libraries()
    sections = [diagnose(task, data_dir, results) for task in tasks.split(",")]
    write_json(results / "diagnosis.json", sections)


if __name__ == "__main__":
    typer.run(main)
