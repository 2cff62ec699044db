"""Pictures as files: a figure written whole, pictures stacked on a page."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from eval.common.files import replacing


def write(figure: Figure, path: Path) -> None:
    """As a PNG file, whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def stack(pictures: Sequence[Image.Image], width: int = 1000) -> Image.Image:
    """Pictures one above the other on white, each as wide as the page."""
    scaled = [p.convert("RGB").resize((width, round(p.height * width / p.width)), Image.LANCZOS) for p in pictures]
    page, top = Image.new("RGB", (width, sum(p.height for p in scaled)), "white"), 0
    for picture in scaled:
        page.paste(picture, (0, top))
        top += picture.height
    return page
