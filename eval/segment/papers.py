"""Our mIoU beside the papers', cell by cell: the table of `docs/benchmarks.md`."""

import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from eval.common.tables import markdown
from eval.datasets.protocols import PROTOCOLS


PAPER = Path(__file__).parents[1] / "paper.toml"


def beside_papers(folder: Path) -> str:
    """A row for each model, method and source, a column for each benchmark: ours / theirs, in percent.

    Ours stands only where it can be compared: measured under the paper's protocol, with its prompts, on its split, on as many
    images (results/segment-*.json in the `folder`). Quoted are the numbers of eval/paper.toml.
    """
    paper, ours = tomllib.loads(PAPER.read_text()), measured_rows(folder)
    benchmarks = list(dict.fromkeys(number["benchmark"] for number in paper["number"]))
    lines: dict[tuple, dict[str, str]] = {}
    for number in paper["number"]:
        place = {name: number[name] for name in ("model", "method", "protocol", "source")}
        line = lines.setdefault(tuple(place.values()), place | dict.fromkeys(benchmarks, "") | {"remark": ""})
        found = ours[condition(number, paper)] if number["protocol"] in PROTOCOLS else []
        line[number["benchmark"]] = f"{', '.join(map(percent, found)) or '–'} / {percent(number['miou'])}"
        if number["remark"] not in line["remark"]:
            line["remark"] = "; ".join(filter(None, (line["remark"], number["remark"])))
    return markdown([*lines.values()])


def condition(number: Mapping, paper: Mapping) -> tuple:
    """What a row of ours must have been measured under to be compared with a paper's number."""
    name, benchmark = number["protocol"], number["benchmark"]
    protocol = paper["protocols"][name]
    model = Path(paper["models"].get(number["model"], number["model"])).name
    split, images = PROTOCOLS[name].split(benchmark), protocol["images"][benchmark]
    return number["method"], model, benchmark, name, protocol["prompts"], split, images


def measured_rows(folder: Path) -> dict[tuple, list[float]]:
    """mIoU of every row of every result in a folder, by `condition`; ValueError for a file of another form."""
    found = defaultdict(list)
    for path in sorted(folder.glob("segment-*.json")):
        try:
            for row in json.loads(path.read_text())["rows"]:
                images = row["images"] + row["skipped"]
                names = (row[name] for name in ("benchmark", "protocol", "prompts", "split"))
                found[row["method"], Path(row["model"]).name, *names, images].append(float(row["miou"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected a result of eval.segmentation in {path}, but it is none ({error!r})."
            ) from error
    return found


def percent(share: float) -> str:
    """A share as percent with one decimal; "–" for NaN."""
    return "–" if share != share else f"{100 * share:.1f}"
