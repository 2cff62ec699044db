"""Results to the documents: `python -m eval.report` puts every results/*.json that one names into its place there.

`<!-- results: NAME -->` stands for the whole table of results/NAME.json, `<!-- results: NAME column ... -->` for some of its
columns, `<!-- scales: NAME number ... -->` for methods by guidance scales, `<!-- levels: proof MODEL -->` for methods by
levels, `<!-- candidates: defaults -->` for what the papers leave open, `<!-- checkpoints: proof -->` for what training does,
`<!-- timesteps: choices -->` for what was tried on validation scenes, `<!-- papers: mIoU -->` for our segmentation beside the
papers'. The plots of docs/ are drawn from the results too, and where `make demo` left its pictures, that of docs/generate.md
is made of them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from eval.common.files import expecting, replacing
from eval.common.plots import stack
from eval.common.programs import command_line
from eval.common.programs import run as run_program
from eval.common.tables import markdown
from eval.cost.growth import growth
from eval.generation.guidance_tables import guidance_table
from eval.generation.scales import by_scale, trade_off
from eval.segment.papers import beside_papers
from eval.segment.power import by_candidate, by_checkpoint, by_level, by_timestep, power


DOCUMENTS = ("README.md", "docs/*.md", "goca_guidance/models/*/README.md")


def of_rows(draw):
    """A plot of a result, by a function of its rows and of a path."""
    return lambda result, path: draw(result["rows"], path)


PLOTS = {"speed": of_rows(growth), "quality": of_rows(trade_off), "proof": power}


def of_result(show, *parts: str):
    """A table of one result, by a function of its rows (or of these `parts`) and of what is wanted of them; then the command
    that made it."""

    def table(results: Path, name: str, *wanted: str) -> str:
        path = results / f"{name}.json"
        with expecting("a result for this table", path, "measure it again"):
            result = json.loads(path.read_text())
            return f"{show(*(result[part] for part in parts or ['rows']), wanted)}\n\n`{result['command']}`"

    return table


TABLES = {
    "results": of_result(markdown),
    "scales": of_result(by_scale),
    "guidance": of_result(guidance_table),
    "levels": of_result(by_level),
    "candidates": of_result(by_candidate),
    "checkpoints": of_result(by_checkpoint, "rows", "quality"),
    "timesteps": of_result(by_timestep),
    "papers": lambda results, *wanted: beside_papers(results),
}


def fill(text: str, results: Path) -> str:
    """Replace what stands between `<!-- results: NAME -->` and `<!-- end -->` by NAME.json's table and its command."""

    def table(match):
        head = f"<!-- {match[1]}: {match[2]} -->"
        return "\n".join([head, TABLES[match[1]](results, *match[2].split()), "<!-- end -->"])

    return re.sub(rf"<!-- ({'|'.join(TABLES)}): ([^>]+?) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    command_line(__doc__).parse_args(arguments)
    results, picture, demo = Path("results"), Path("docs/picture.png"), Path("demo")
    documents = [path for pattern in DOCUMENTS for path in sorted(Path().glob(pattern))]
    if not documents:
        raise ValueError("Expected README.md and docs/ here, but they are not: run it in the repository's root.")
    for document in documents:
        with replacing(document) as part:
            part.write_text(fill(document.read_text(), results))
    for path in results.glob("*.json"):
        if draw := PLOTS.get(path.stem.partition("-")[0]):
            with expecting("a result for this plot", path, "measure it again"):
                draw(json.loads(path.read_text()), Path(f"docs/{path.stem}.png"))
    if demo.exists():
        with expecting("the pictures of `make demo`", demo, "make them again"):
            page = stack([Image.open(demo / f"{name}.png") for name in ("comparison", "strip", "segmentation")])
        with replacing(picture) as part:
            page.quantize(256).save(part, format="PNG")


if __name__ == "__main__":
    run_program(main)
