"""The served page by its own protocol: pictures come, mistakes are notes, two visitors wait for each other."""

import tomllib
import zipfile

import pytest
from PIL import Image

from goca_guidance.models import SCENE
from tests.helpers.places import ROOT


PROMPT = ("a cat and a bus on grass", "dog", 5, 0.8, 3, 2, 0)  # the inputs of the tab, from prompt to seed


@pytest.fixture
def client(address, tmp_path):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path))


def segment(client, path, words="sheep, potted plant", background=("none", 0.5, "")):
    from gradio_client import handle_file

    return client.predict(handle_file(path), words, *background, False, api_name="/segment")


def note_of(call) -> str:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as caught:
        call()
    return str(caught.value)


def test_two_visitors_get_three_pictures_each(client, address):
    from gradio_client import Client

    other = Client(address, verbose=False, analytics_enabled=False)
    jobs = [each.submit(*PROMPT, api_name="/generate") for each in (client, other)]
    for job in jobs:
        job.result(timeout=120)
        pictures = [part for output in job.outputs() for part in output[:3] if isinstance(part, str)]
        assert [Image.open(picture).size for picture in pictures] == [(256, 256)] * 3


def test_a_mistake_is_a_note_and_the_next_call_works(client, tmp_path):
    assert "an empty one" in note_of(lambda: client.predict("", *PROMPT[1:], api_name="/generate"))
    assert "&lt;b&gt; more than once" in note_of(lambda: segment(client, SCENE, "<b>, <b>"))
    assert "at least one class name" in note_of(lambda: segment(client, SCENE, " "))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    assert note_of(lambda: segment(client, tmp_path / "broken.png")).startswith("Expected a readable image file")
    assert note_of(lambda: segment(client, tmp_path / "empty.png")).startswith("Expected a readable image file")
    painted = segment(client, SCENE)[0]
    assert [each["label"] for each in painted["value"]["annotations"]] == ["sheep", "potted plant"]


def test_the_files_of_a_segmentation(embedded):
    from goca_guidance.app.segment_tab import _files

    found = embedded.segment(Image.open(SCENE), ["sheep", "water"], background=0.4)
    with zipfile.ZipFile(_files(found).value["path"]) as packed:
        names = {name.removeprefix("segmentation/") for name in packed.namelist() if not name.endswith("/")}
    assert {"overlay.png", "labels.png", "classes.txt", "scores.npz", "masks/0-sheep.png"} <= names


def test_the_space_asks_for_what_the_library_does():
    asked = (ROOT / "spaces" / "requirements.txt").read_text().split("\n")[:-1]
    assert asked == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
