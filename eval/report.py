"""Results to the documents: `python -m eval.report` puts every results/*.json that one names into its place there.

`<!-- results: NAME -->` stands for the whole table of results/NAME.json, `<!-- results: NAME column ... -->` for some of its
columns, `<!-- scales: NAME metric ... -->` for methods by guidance scales. The plots of docs/ are drawn from the results too,
and where `make demo` left its pictures, the README's picture is made of them.
"""

import json
import re
from pathlib import Path

from PIL import Image

from eval.common.files import replacing
from eval.common.plots import stack
from eval.common.tables import markdown
from eval.cost.growth import growth
from eval.generation.scales import by_scale, trade_off


DOCUMENTS = (
    "README.md",
    "eval/speed.md",
    "eval/benchmarks.md",
    "eval/generation.md",
    "goca_guidance/models/tiny-sd/README.md",
)
TABLES = {"results": markdown, "scales": by_scale}
PLOTS = {"speed": growth, "quality": trade_off}


def fill(text: str, results: Path) -> str:
    """Replace what stands between `<!-- results: NAME -->` and `<!-- end -->` by NAME.json's table and its command."""

    def table(match):
        name, *columns = match[2].split()
        result = json.loads((results / f"{name}.json").read_text())
        lines = [f"<!-- {match[1]}: {match[2]} -->", TABLES[match[1]](result["rows"], columns), ""]
        return "\n".join([*lines, f"`{result['command']}`", "<!-- end -->"])

    return re.sub(rf"<!-- ({'|'.join(TABLES)}): ([^>]+?) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    results, picture, demo = Path("results"), Path("docs/picture.png"), Path("demo")
    for document in map(Path, DOCUMENTS):
        with replacing(document) as part:
            part.write_text(fill(document.read_text(), results))
    for path in results.glob("*.json"):
        if draw := PLOTS.get(path.stem.partition("-")[0]):
            draw(json.loads(path.read_text())["rows"], Path(f"docs/{path.stem}.png"))
    if demo.exists():
        parts = [Image.open(demo / f"{name}.png") for name in ("comparison", "strip", "segmentation")]
        with replacing(picture) as part:
            stack(parts).quantize(256).save(part, format="PNG")


if __name__ == "__main__":
    main()
