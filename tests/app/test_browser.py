"""The page in a browser, as a visitor has it: type, click, see pictures change. `make browser` installs what it needs."""

import re
import shutil
from collections.abc import Iterator

import pytest

from goca_guidance.models import SCENE


SECONDS = 60  # for pictures to come, on a machine that does other things too
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
PICTURES = "img[src*='/file=']"  # what the page's own server sent

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (Debian's package of that name)")


@pytest.fixture
def tab(address) -> Iterator:
    """A tab that shows the page, and asks nothing of the network."""
    driver = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright, which is not here")
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=1000 * SECONDS)
        shown = browser.new_page(viewport={"width": 1280, "height": 1400})
        shown.set_default_timeout(1000 * SECONDS)
        own = re.compile(f"^(?!{re.escape(address)}|data:|blob:)")
        shown.route(own, lambda route: route.abort())
        shown.goto(address, wait_until="domcontentloaded")
        yield shown
        browser.close()


def come(tab, count: int) -> list[str]:
    """The addresses of the first pictures, once so many are there."""
    tab.wait_for_function(f'document.querySelectorAll("{PICTURES}").length >= {count}')
    return [picture.get_attribute("src") for picture in tab.locator(PICTURES).all()[:count]]


def test_pictures_are_drawn_and_their_steps_shown(tab):
    tab.get_by_label("Prompt", exact=True).fill("a dog on water")
    tab.get_by_label("number input for Steps").fill("3")
    tab.get_by_role("button", name="Generate", exact=True).click()
    tab.get_by_text("Each step", exact=True).wait_for()
    three = come(tab, 3)
    assert len(set(three)) == 3
    last = come(tab, 5)[3:]
    tab.get_by_label("number input for Step", exact=True).fill("1")
    tab.get_by_label("number input for Step", exact=True).press("Enter")
    tab.wait_for_function(f"!document.querySelector(\"img[src='{last[-1]}']\")")
    assert come(tab, 3) == three
    assert len(come(tab, 5)) == 5
    tab.get_by_label("Prompt", exact=True).fill("")
    tab.get_by_role("button", name="Generate", exact=True).click()
    tab.get_by_text("an empty one").wait_for()


def test_a_photo_is_segmented_by_the_words_that_are_typed(tab):
    tab.get_by_role("tab", name="Segment").click()
    tab.locator("input[type=file]").first.set_input_files(SCENE)
    tab.get_by_placeholder("cat, potted plant").fill("sheep, water")
    tab.get_by_role("button", name="Segment", exact=True).click()
    tab.get_by_text("Share of the pixels").wait_for()
    with tab.expect_download() as files:  # once the button has them
        tab.get_by_text("Download", exact=True).click()
    assert files.value.suggested_filename == "segmentation.zip"
