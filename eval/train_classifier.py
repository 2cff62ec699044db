"""Train the classifier of Scenes' pixels, which judges generated pictures: `python -m eval.train_classifier`.

A quarter of an hour on two cores. It writes eval/generation/classifier.safetensors and prints how often it is right on scenes
of the test split, as they are and as the embedded model's autoencoder shows them. As shipped, of 200 plain ones that the
autoencoder shows: 0.965 of the objects, 0.935 of the pictures with all of theirs, and 0.57 other objects a picture.
"""

from collections.abc import Sequence

import numpy as np
import torch

from eval.common.files import writable
from eval.common.load import load_pipeline
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.tables import markdown
from eval.generation.classifier import (
    WEIGHTS,
    ClassifierSettings,
    PixelClassifier,
    drawn,
    named,
    pixels_of,
    reproduced,
    shown,
    train,
    write,
)
from eval.generation.metrics import accuracy
from eval.scenes.scene import COUNTS
from goca_guidance import TINY_SD


def judged(model: PixelClassifier, count: int) -> list[dict]:
    """What it finds in held-out scenes of each level, as they are and reproduced."""
    device = next(model.parameters()).device
    vae, rows = load_pipeline(TINY_SD, device=device).vae, []
    for level in COUNTS:
        scenes = drawn("test", [(number, level) for number in range(count)])
        images, there, every = pixels_of(scenes).to(device), named(scenes), np.ones((1, count))
        for name, pictures in (("scenes", images), ("reproduced", reproduced(vae, images))):
            found = shown(model, pictures)
            (complete, _), (each, _) = accuracy(found, there, every)
            others = (found & ~there).sum(1).mean()
            row = {"level": level, "pictures": name, "all objects": complete, "objects": each, "others": others}
            rows.append({k: v if isinstance(v, str) else round(float(v), 4) for k, v in row.items()})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = ClassifierSettings()
    parser = command_line(__doc__)
    parser.add_argument("--scenes", type=at_least(1), default=chosen.scenes, help="training scenes")
    parser.add_argument("--steps", type=at_least(1), default=chosen.steps, help="of the optimiser")
    parser.add_argument("--batch", type=at_least(1), default=chosen.batch, help="scenes in a step")
    parser.add_argument("--test", type=at_least(1), default=400, help="scenes of each level on which it is judged")
    args = parser.parse_args(arguments)
    writable(WEIGHTS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = train(ClassifierSettings(args.scenes, args.steps, args.batch), device)
    write(model)
    print(markdown(judged(model, args.test)))


if __name__ == "__main__":
    run_program(main)
