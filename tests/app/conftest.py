"""The embedded model, and its page, served once for all tests of a process."""

from contextlib import closing

import pytest

from goca_guidance import TINY_SD, GoCASCFGPipeline


@pytest.fixture(scope="session")
def embedded() -> GoCASCFGPipeline:
    return GoCASCFGPipeline.from_pretrained(TINY_SD)


@pytest.fixture(scope="session")
def address(embedded) -> str:
    pytest.importorskip("gradio", reason="the page needs the extra [app]")
    from goca_guidance.app.page import page
    from goca_guidance.app.studio import Studio

    with closing(Studio(lambda: embedded)) as studio:
        blocks = page(studio)
        yield blocks.queue().launch(prevent_thread_lock=True, quiet=True, show_error=True)[1]
        blocks.close()
