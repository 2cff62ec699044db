"""Many cases, tried in batches of a seed each: how many were fine, refused, raw, and the smallest case of each finding."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz.cases import CASES, Case
from tests.fuzz.machine import Life
from tests.fuzz.trial import FINDINGS, Outcome, attempt


BATCH = 250  # cases of a seed
QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
VERDICTS = ("fine", "refused", *FINDINGS)


@dataclass
class Finding:
    """One kind of finding: how often, and its smallest case so far with the seed of its batch."""

    verdict: str
    seed: int
    case: Case
    detail: str
    count: int = 0


@dataclass
class Tally:
    """What became of the cases, by surface and verdict, and the findings by kind."""

    tried: Counter = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, seed: int, case: Case, outcome: Outcome) -> None:
        surface = f"{case.surface}, with a fault" if case.fault else case.surface
        self.tried[surface, outcome.verdict] += 1
        if outcome.verdict in FINDINGS:
            found = self.findings.setdefault(outcome.kind, Finding(outcome.verdict, seed, case, outcome.detail))
            found.count += 1
            if len(repr(case)) < len(repr(found.case)):
                found.seed, found.case, found.detail = seed, case, outcome.detail

    def total(self, *verdicts: str) -> int:
        return sum(count for (_, verdict), count in self.tried.items() if verdict in (verdicts or VERDICTS))

    def table(self) -> str:
        """A line for each surface, and the sums."""
        names = ("tried", "fine", "refused", "raw", "leaks", "differences")
        lines = [f"{'':24}" + "".join(f"{name:>13}" for name in names)]
        for surface in [*sorted({surface for surface, _ in self.tried}), "all"]:
            counts = [
                sum(n for (s, v), n in self.tried.items() if v == each and surface in (s, "all")) for each in VERDICTS
            ]
            lines.append(f"{surface:24}" + "".join(f"{count:13}" for count in (sum(counts), *counts)))
        return "\n".join(lines)


def run(seed: int, count: int, judge: Callable[[Case], None]) -> None:
    """Let hypothesis draw so many cases, the same ones of a seed, and judge each of them once."""
    judged = set()

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, phases=[Phase.generate], **QUIET)
    @hypothesis.given(CASES)
    def each(case):
        if repr(case) not in judged:
            judged.add(repr(case))
            judge(case)

    each()


def tally(seed: int, count: int, tally: Tally, over: Callable[[], bool] = lambda: False) -> None:
    """Try a batch, until it is over."""

    def judge(case):
        if not over():
            tally.add(seed, case, attempt(case))

    run(seed, count, judge)


def lives(seed: int, count: int, steps: int = 8) -> None:
    """Lives of a pipeline (`tests.fuzz.machine`); AssertionError with hypothesis's smallest one where something goes wrong."""
    if count == 0:
        return
    settings = hypothesis.settings(max_examples=count, stateful_step_count=steps, print_blob=False, **QUIET)
    run_state_machine_as_test(hypothesis.seed(seed)(Life), settings=settings)


def smallest(kind: str, case: Case) -> Case:
    """The case without what its kind of finding does not need."""
    for smaller in _smaller(case):
        if attempt(smaller).kind == kind:
            return smallest(kind, smaller)
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """The case less one thing."""
    for name in case.ours:
        yield replace(case, ours={k: value for k, value in case.ours.items() if k != name})
    for name in case.stock:
        yield replace(case, stock={k: value for k, value in case.stock.items() if k != name})
    yield from [replace(case, around="")] * bool(case.around)
    yield from [replace(case, family="sd")] * (case.family not in ("", "sd"))
