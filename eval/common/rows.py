"""The rows of a result that a program measures one after another; each is kept as soon as it is there."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.common.files import expecting, write_json


class Rows:
    """Rows of one JSON file, by the values of some of their columns.

    Args:
        path: the file; what it already holds is kept.
        key: those columns.
        run: what the rows that are now measured depend on, which is written into each: others of that name are old.
        order: of the rows, by what it makes of one; as they came by default.
    """

    def __init__(self, path: Path, key: Sequence[str], run: dict, order: Callable[[dict], Any] = lambda row: 0):
        self.path, self.key, self.run, self.order = path, key, run, order
        self._rows: dict[tuple, dict] = {}
        if path.exists():
            with expecting("rows of this program", path, "move it away, or name another --result"):
                for row in json.loads(path.read_text())["rows"]:
                    self._rows[self._key(row)] = row
                    _ = row["run"]["command"]

    def _key(self, row: dict) -> tuple:
        return tuple(row[name] for name in self.key)

    def has(self, **key) -> bool:
        """Whether the row was measured in a run like this one."""
        return self._rows.get(self._key(key), {}).get("run") == self.run

    def add(self, row: dict, **facts) -> None:
        """A new row, in the place of an old one; written with the commands of all rows and `facts` of the whole."""
        self._rows[self._key(row)] = row | {"run": self.run}
        commands = dict.fromkeys(row["run"]["command"] for row in self)
        write_json(self.path, {"command": " && ".join(commands), **facts, "rows": list(self)})

    def __iter__(self) -> Iterator[dict]:
        return iter(sorted(self._rows.values(), key=self.order))
