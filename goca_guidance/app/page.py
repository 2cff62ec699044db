"""The page: what it says of its model, its tabs, and how it is served."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gradio as gr

from goca_guidance import TINY_SD
from goca_guidance.app.generate_tab import generate_tab
from goca_guidance.app.segment_tab import segment_tab
from goca_guidance.app.studio import Studio
from goca_guidance.models import GROUNDS, OBJECTS
from goca_guidance.pipeline import GoCASCFGPipeline


SYSTEM = ("ui-sans-serif", "system-ui", "sans-serif")  # fonts that need no network
MONOSPACED = ("ui-monospace", "monospace")
HOUR = 3600  # seconds, after which files of pictures that were shown are deleted


def about(pipe: GoCASCFGPipeline, model: str) -> str:
    """One line: which model it is, and of the embedded one what it knows."""
    if Path(model) != Path(TINY_SD):
        return f"Model: **{model}**, on {pipe.device.type}."
    return (
        f"The embedded model draws scenes of 64 x 64 pixels and knows these words alone: {', '.join(OBJECTS)}; on "
        f"{', '.join(GROUNDS)}. For photographs start the page with `goca app --model REPO_OR_FOLDER`."
    )


def page(studio: Studio, model: str = TINY_SD) -> gr.Blocks:
    """The page of a studio; `model` is what its pipeline is called there."""
    embedded = Path(model) == Path(TINY_SD)

    def leave(request: gr.Request) -> None:
        studio.stop(request.session_hash)

    with gr.Blocks(title="GoCA + S-CFG", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.Markdown(f"# GoCA + S-CFG\n{about(studio.pipe, model)}")
        with gr.Tab("Generate"):
            generate_tab(studio, embedded)
        with gr.Tab("Segment"):
            segment_tab(studio, embedded)
        blocks.unload(leave)
    return blocks


def serve(load: Callable[[], GoCASCFGPipeline], model: str = TINY_SD, port: int | None = None, **options) -> None:
    """Serve the [`page`] of the pipeline that `load` makes until it is interrupted.

    Args:
        load: makes the pipeline, see [`Studio`].
        model: what it is called.
        port: the first free one from 7860 by default.
        options: further ones of Gradio's `launch`.
    """
    theme = gr.themes.Default(font=SYSTEM, font_mono=MONOSPACED)
    with closing(Studio(load)) as studio:
        page(studio, model).queue(max_size=64).launch(server_port=port, theme=theme, show_error=True, **options)
