"""A contact sheet of scenes: `python -m eval.scenes --split validation --count 32 --out scenes.png`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.common.files import replacing, writable
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.scenes.scene import CLASSES, SPLITS, scene


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a contact sheet: each scene above its mask."""
    parser = command_line(__doc__)
    parser.add_argument("--split", default="validation", choices=sorted(SPLITS))
    parser.add_argument("--count", type=at_least(1), default=24)
    parser.add_argument("--size", type=at_least(8), default=64)
    parser.add_argument("--out", type=Path, default=Path("scenes.png"))
    args = parser.parse_args(arguments)
    writable(args.out)
    palette = np.random.default_rng(3).integers(40, 255, (len(CLASSES), 3)).astype(np.uint8)
    pairs = [(s.image, palette[s.mask]) for s in (scene(args.split, i, args.size) for i in range(args.count))]
    rows = [pairs[i : i + 12] for i in range(0, len(pairs) - len(pairs) % 12, 12)] or [pairs]
    sheet = np.vstack([np.hstack([pair[k] for pair in row]) for row in rows for k in (0, 1)])
    with replacing(args.out) as part:
        Image.fromarray(sheet).save(part)


if __name__ == "__main__":
    run_program(main)
