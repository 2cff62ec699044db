"""Results to tables: `python -m eval.report` puts every results/*.json that README.md names into its place there."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary name and rename when whole, so that nothing half-written is ever taken for whole."""
    part = path.with_name(f".part-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    yield part
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)


def write_json(path: Path, value) -> None:
    """Readable JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def markdown(rows: list[dict]) -> str:
    """A GitHub table of the rows' plain values; dictionaries are left to the JSON file."""
    frame = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows])
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(object).to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(text: str, results: Path) -> str:
    """Replace what stands between `<!-- results: NAME -->` and `<!-- end -->` by NAME.json's table and its command."""

    def table(match):
        result = json.loads((results / f"{match[1]}.json").read_text())
        return f"<!-- results: {match[1]} -->\n{markdown(result['rows'])}\n\n`{result['command']}`\n<!-- end -->"

    return re.sub(r"<!-- results: (\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    readme = Path("README.md")
    with replacing(readme) as part:
        part.write_text(fill(readme.read_text(), Path("results")))


if __name__ == "__main__":
    main()
