"""All that a GPU can tell, in one command and less than 25 minutes: `make speed-gpu`.

- every family at its native size, batch 1, 4 and 8, random weights, half precision: a guided step over the stock step, with
  fused kernels off and on, and with the log-sum-exp of the stock attention call or without; then compiled, batch 1
  (results/speed-gpu.json);
- what is unknown of the kernels (`eval.cost.on_card`): errors, the host's time a call, the stock call's statistics, small
  maps, streams and graphs, tiles (results/kernels-gpu.json).

Each row has the card's name. Parts have a share of `--minutes`, the most telling cases first; what a part had no time for, and
what failed, is told at the end. Rows of the same code and card are not measured again, so a killed run, or another one, goes
on. It runs on a CPU too, without kernels: `--device cpu --families tiny-sd`.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from eval.common.files import writable
from eval.common.programs import at_least, command_line, positive, told
from eval.common.programs import run as run_program
from eval.common.provenance import command, fingerprint
from eval.common.rows import Rows
from eval.common.tables import markdown
from eval.cost.full_size import ARCHITECTURES
from eval.cost.kernel_facts import switched
from eval.cost.measure import add_device, alone, device_name
from eval.cost.on_card import QUESTIONS, ask
from eval.cost.stepping import Case, step_times
from goca_guidance.method import kernels


MODULES = ("eval.cost", "eval.common.processes", "goca_guidance")
"""What a row depends on."""

FAMILIES = tuple(name for name in ARCHITECTURES if name not in ("flux-short", "sd-1.5-quarter"))
SHARES = {
    "questions": 0.2,
    "ratios": 0.55,
    "compiled": 0.25,
}  # of the time, in this order; what one leaves the next may use


def settings(device: str) -> dict[str, tuple[bool, bool]]:
    """By name: kernels, and log-sum-exp of the stock call."""
    there = kernels.hindrance(torch.device(device)) is None
    return {f"{on}{lse}": (on, lse) for on in ((False, True) if there else (False,)) for lse in (False, True)}


def ratios(case: Case, device: str, compiled: bool, seconds: float) -> list[dict]:
    """A row for each setting, all from calls that alternate with the stock ones."""
    chosen = settings(device)
    times = step_times(case, device, seconds, {name: partial(switched, *on) for name, on in chosen.items()}, compiled)
    stock, rows = times["stock"], []
    for name, (on, lse) in chosen.items():
        guided = times[name]
        row = _key(case, device, compiled) | {"kernels": _word(on), "lse": _word(lse)}
        row |= {
            "stock_ms": round(1000 * stock.step, 2),
            "guided_ms": round(1000 * guided.step, 2),
            "time_ratio": round(guided.over(stock), 3),
            "once_ms": round(1000 * guided.once(stock), 1),
        }
        if device == "cuda":
            row |= {
                "added_mb": (max(guided.peaks) - max(stock.peaks)) // 2**20,
                "memory_ratio": round(max(guided.peaks) / max(stock.peaks), 3),
            }
        rows.append(row)
    return rows


def _key(case: Case, device: str, compiled: bool) -> dict:
    size = {"family": case.family, "size": case.size, "batch": case.batch, "dtype": case.dtype}
    return {"device": device_name(device), **size, "compiled": _word(compiled)}


def _word(on: bool) -> str:
    return "on" if on else "off"


class Program:
    """The parts, and the time they may take."""

    def __init__(self, device: str, minutes: float, seconds: float, speed: Path, answers: Path):
        self.device, self.minutes, self.seconds, self.begun = device, minutes, seconds, time.monotonic()
        run = {"code": fingerprint(*MODULES), "command": command(), "torch": torch.__version__}
        key = ("device", "family", "size", "batch", "dtype", "compiled", "kernels", "lse")
        self.speed = Rows(speed, key, run)
        self.answers = Rows(answers, ("device", "question", "case"), run)
        self.missing: list[str] = []

    def left(self, part: str) -> float:
        """Seconds until the part, and all before it, must end."""
        names = list(SHARES)
        share = sum(SHARES[name] for name in names[: names.index(part) + 1])
        return 60 * self.minutes * share - (time.monotonic() - self.begun)

    def tried(self, part: str, name: str, function, *args) -> list[dict]:
        """The rows of one process; none, and a line for the end, where it fails or there is no time."""
        if (left := self.left(part)) < min(5.0, 60 * self.minutes):
            self.missing.append(f"{name}: no time was left")
            return []
        try:
            return alone(function, *args, seconds=left)
        except Exception as error:  # of any kind: the others are measured all the same
            self.missing.append(f"{name}: {told(error)}")
            tqdm.write(self.missing[-1])  # at once, as the program may be killed before its end
            return []

    def measure(self, part: str, cases: Sequence[Case], compiled: bool) -> None:
        for case in tqdm(cases, desc=part):
            keys = [
                _key(case, self.device, compiled) | {"kernels": _word(on), "lse": _word(lse)}
                for on, lse in settings(self.device).values()
            ]
            if not all(self.speed.has(**key) for key in keys):
                name = f"{case.family}, batch {case.batch}{', compiled' * compiled}"
                for row in self.tried(part, name, ratios, case, self.device, compiled, self.seconds):
                    self.speed.add(row)

    def ask(self, questions: Sequence[str]) -> None:
        card = {"device": device_name(self.device)}
        for question in tqdm(questions, desc="questions"):
            if not self.answers.has(**card, question=question, case="all"):
                rows = self.tried("questions", question, ask, question, self.device)
                for row in [*rows, {"case": "all", "found": len(rows)}] if rows else []:
                    self.answers.add(card | {"question": question} | row)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=list(ARCHITECTURES))
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1, 4, 8])
    parser.add_argument("--minutes", type=positive, default=24, help="for all")
    parser.add_argument("--seconds", type=positive, default=8, help="to spend on the steps of a case, at the least")
    parser.add_argument("--parts", nargs="+", default=list(SHARES), choices=list(SHARES))
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda by default")
    parser.add_argument("--result", type=Path, default=Path("results/speed-gpu.json"))
    parser.add_argument("--answers", type=Path, default=Path("results/kernels-gpu.json"))
    args = parser.parse_args(arguments)
    dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    speed = writable(args.result)
    program = Program(args.device, args.minutes, args.seconds, speed, writable(args.answers))
    cases = [Case(name, ARCHITECTURES[name].size, batch, dtype) for batch in args.batch for name in args.families]
    if "questions" in args.parts:
        program.ask(list(QUESTIONS))
    if "ratios" in args.parts:
        program.measure("ratios", cases, compiled=False)
    if "compiled" in args.parts:
        program.measure("compiled", [case for case in cases if case.batch == min(args.batch)], compiled=True)
    for rows in (program.speed, program.answers):
        if found := [row for row in rows if row.get("case") != "all"]:
            print(markdown(found), end="\n\n")
    print("\n".join(["Not measured:", *program.missing] if program.missing else ["All was measured."]))


if __name__ == "__main__":
    run_program(main)
