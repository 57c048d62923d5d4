"""docs/benchmarks/full.md: every measured number, from the result files alone."""

from __future__ import annotations

import sys
from pathlib import Path

import files
import tables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Rows as GROUP/ROW in the order of the page. The sections before the second part were measured
# with an allocator that reuses freed memory, as CUDA's caching allocator does.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Freed memory is reused": {
        "Divergences and top-k transport": ("divergences/kept_memory",),
        "Transport KL": ("transport_kl/kept_memory",),
    },
    "Freed memory is returned to the system": {
        "Transport over vocabularies": (
            "vocabulary/dense",
            "vocabulary/classes",
            "vocabulary/topk",
            "vocabulary/topk_large",
            "vocabulary/accuracy",
            "vocabulary/language_model",
            "vocabulary/sizes",
        ),
        "Transport KL": (
            "transport_kl/time",
            "transport_kl/accuracy",
            "transport_kl/language_model",
        ),
        "Transport between the samples of a batch": (
            "batch/few_classes",
            "batch/many_classes",
            "batch/scaling",
        ),
        "Divergences": ("divergences/divergences", "divergences/extremes"),
        "Whole training steps": (
            "steps/language_model",
            "steps/large_vocabulary",
            "steps/classification",
            "steps/trainers",
            "steps/two_tokenizers",
        ),
        "Accuracy against time": ("pareto/vocabulary", "pareto/batch"),
        "Ways to apply the kernel": ("kernels/stabilised", "kernels/recomputed"),
        "Time against the limits of the machine": ("limits/headline",),
    },
    "On a GPU": {
        "Correctness and speed": (
            "gpu/correctness",
            "gpu/transport",
            "gpu/batch",
            "gpu/divergences",
            "gpu/language_model",
        ),
    },
}
_HEAD = Path(__file__).resolve().parent / "pages" / "full-head.md"


def page(results: Path, images: dict[str, str]) -> str:
    """The page; a row without a result is listed as not measured.

    ``images`` are the paths of the figures, by ``GROUP/ROW``.
    """
    notes = _notes(results / "notes.toml")
    parts = [_HEAD.read_text("utf-8").rstrip()]
    machines: dict[str, list[str]] = {}
    for part, sections in PARTS.items():
        parts.append(f"## {part}")
        for section, places in sections.items():
            parts.append(f"### {section}")
            for place in places:
                result = files.read(results / f"{place}.json")
                if not result.get("measured"):
                    why = f" ({result['reason']})" if result else ""
                    parts.append(f"`{place}`: not measured{why}.")
                    continue
                where = {**result["machine"], **result["versions"]}
                line = ", ".join(f"{k} {v}" for k, v in where.items() if v is not None)
                machines.setdefault(line, []).append(place)
                parts += _row(place, result, images.get(place), notes.pop(place, None))
    if notes:
        raise ValueError(f"notes.toml has notes on rows without results: {', '.join(notes)}")
    parts.append("## Machines and versions")
    parts.append("\n".join(f"- {', '.join(rows)}: {line}" for line, rows in machines.items()))
    return "\n\n".join(parts) + "\n"


def _notes(path: Path) -> dict[str, str]:
    """Explanations of the numbers, by ``GROUP/ROW``."""
    if not path.is_file():
        return {}
    groups = tomllib.loads(path.read_text("utf-8"))
    return {f"{group}/{row}": text for group, rows in groups.items() for row, text in rows.items()}


def _row(place: str, result: dict, image: str | None, note: str | None) -> list[str]:
    parts = [f"#### `{place}`", str(result["what"])]
    if image:
        parts.append(f"![{place}]({image})")
    if result["targets"]:
        parts.append(_markdown(tables.targets(result)).replace("| missed |", "| **missed** |"))
    if note:
        parts.append(note.strip())
    if rates := result.get("rates_a_second"):
        found = (f"{key} {value:.3g}" for key, value in rates.items())
        parts.append(f"Measured rates per second: {', '.join(found)}.")
    for case in result["cases"]:
        parts.append(f"**{case['name']}**")
        if fit := tables.exponent(case):
            parts.append(fit)
        if table := tables.case_table(case):
            parts.append(_markdown(table))
        if case.get("not_installed"):
            parts.append(f"Not installed: {', '.join(case['not_installed'])}.")
        parts += (f"Not measured: {peer} ({why})." for peer, why in case.get("refused", {}).items())
    return parts


def _markdown(table: tables.Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.header, rule, *table.rows))
