"""Numbers of the result files, for the templates in ``pages/``.

Every ratio is peer ÷ otkd: above 1, otkd is faster or needs less memory.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import files
import jinja2


class Facts:
    """The results in a folder, addressed by ``GROUP/ROW``, case and peer."""

    def __init__(self, results: Path):
        self._results = results
        self._row = functools.lru_cache(maxsize=None)(self._read)

    def _read(self, place: str) -> dict:
        result = files.read(self._results / f"{place}.json")
        if not result.get("measured"):
            raise ValueError(f"{place} was not measured, but a page quotes it")
        return result

    def case(self, place: str, name: str) -> dict:
        """One case of a row, by its name."""
        (found,) = (case for case in self._row(place)["cases"] if case["name"] == name)
        return found

    def time(self, place: str, case: str, peer: str, ours: str) -> float:
        """Time of a peer over that of otkd, the median over rounds."""
        found = self.case(place, case)
        if ours == next(iter(found["peers"])):  # the row that all others are divided by
            return found["times"][peer]["median"]
        rounds = (found["peers"][name]["seconds"]["rounds"] for name in (peer, ours))
        return statistics.median(a / b for a, b in zip(*rounds, strict=False))

    def memory(self, place: str, case: str, peer: str, ours: str) -> float:
        """Peak memory of a peer over that of otkd."""
        peers = self.case(place, case)["peers"]
        return peers[peer]["peak_bytes"] / peers[ours]["peak_bytes"]

    def error(self, place: str, case: str, peer: str, of: str = "gradient_error") -> float:
        """Relative error of a peer's gradient or value."""
        return self.case(place, case)["peers"][peer][of]

    def seconds(self, place: str, case: str, peer: str) -> float:
        """Median time of a peer."""
        return self.case(place, case)["peers"][peer]["seconds"]["median"]

    def point(self, place: str, case: str, **settings: object) -> dict:
        """The point of a case that has these settings."""
        points = self.case(place, case)["points"]
        (found,) = (p for p in points if settings.items() <= p.items())
        return found

    def column(self, place: str, case: str, name: str) -> list:
        """The different values of a setting among the points of a case, in their order."""
        return list(dict.fromkeys(p[name] for p in self.case(place, case)["points"]))

    def fastest(self, place: str, case: str, peer: str) -> float:
        """Time of a peer over that of the fastest setting of otkd whose error is no greater."""
        targets = self._row(place)["targets"]
        (found,) = (t for t in targets if t["name"].startswith(f"{case}: time, {peer} ÷ fastest"))
        return found["measured"]

    def machine(self, place: str) -> dict:
        """Where a row was measured, and with which versions."""
        result = self._row(place)
        return {**result["machine"], **result["versions"]}

    def reasons(self, group: str) -> dict[str, str]:
        """The rows of a group that were not measured, and why."""
        rows = {path.stem: files.read(path) for path in (self._results / group).glob("*.json")}
        return {name: row["reason"] for name, row in sorted(rows.items()) if not row["measured"]}


def ratio(value: float) -> str:
    """A ratio with about two digits."""
    for limit, digits in ((0.1, ".2g"), (2, ".2f"), (10, ".1f")):
        if value < limit:
            return format(value, digits)
    return f"{float(f'{value:.2g}'):,.0f}"


def error(value: float) -> str:
    """A relative error: percent, or a power of ten where it is small."""
    if value >= 1e-3:
        digits = 0 if value >= 0.1 else 1 if value >= 0.01 else 2
        return f"{100 * value:.{digits}f} %"
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


def render(template: Path, results: Path) -> str:
    """A template filled with numbers of the results."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    facts = Facts(results)

    def shown(find: Callable[..., float], write: Callable[[float], str]) -> Callable[..., str]:
        return lambda *arguments, **options: write(find(*arguments, **options))

    return environment.get_template(template.name).render(
        facts=facts,
        time=shown(facts.time, ratio),
        memory=shown(facts.memory, ratio),
        fastest=shown(facts.fastest, ratio),
        error=shown(facts.error, error),
        as_ratio=ratio,
        as_error=error,
    )
