"""A mistake is a note on the page, in the library's words."""

import html
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from goca_guidance.app.studio import StoppedError


MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # of what asks the model: one call at a time, in one queue
PROGRESS = gr.Progress()  # the default of an argument, by which Gradio knows that it is to hand one in


@contextmanager
def notes() -> Iterator[None]:
    """Errors that name their fix become notes; what else is raised is a defect, and Gradio prints it."""
    try:
        yield
    except StoppedError as stopped:
        raise gr.Error(str(stopped), title="Stopped", duration=4, print_exception=False) from None
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise gr.Error(plain_text(error) or type(error).__name__, duration=20, print_exception=False) from error


def plain_text(message: object) -> str:
    """One line in which a visitor's own words are no HTML: notes are written in it."""
    return html.escape(" ".join(str(message).split()), quote=False)
