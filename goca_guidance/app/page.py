"""The page: what it says of its model, its tabs, and how it is served."""

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


def page(pipe: GoCASCFGPipeline, model: str = TINY_SD) -> gr.Blocks:
    """The page of a loaded pipeline; `model` is what it is called there.

    ValueError for a pipeline that asks for more than words, or makes videos.
    """
    studio, embedded = Studio(pipe), Path(model) == Path(TINY_SD)

    def leave(request: gr.Request) -> None:
        studio.stop(request.session_hash)

    with gr.Blocks(title="GoCA + S-CFG", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.Markdown(f"# GoCA + S-CFG\n{about(pipe, model)}")
        with gr.Tab("Generate"):
            generate_tab(studio, embedded)
        with gr.Tab("Segment"):
            segment_tab(studio, embedded)
        blocks.unload(leave)
    return blocks


def serve(pipe: GoCASCFGPipeline, model: str = TINY_SD, port: int | None = None, **options) -> None:
    """Serve the page until it is interrupted, at the first free port from 7860 if none is given.

    `options` are further ones of Gradio's `launch`.
    """
    theme = gr.themes.Default(font=SYSTEM, font_mono=MONOSPACED)
    page(pipe, model).queue(max_size=64).launch(server_port=port, theme=theme, show_error=True, **options)
