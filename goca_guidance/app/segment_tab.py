"""The tab that segments: a photo, words, what is background, and the files of the result."""

import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gradio as gr
from PIL import Image

from goca_guidance.app import views
from goca_guidance.app.notes import MODEL, PROGRESS, notes, plain_text
from goca_guidance.app.studio import LARGEST, Studio, parted, size_of
from goca_guidance.config import Background
from goca_guidance.files import Format
from goca_guidance.models import SCENE, unknown_words
from goca_guidance.real_images.segment import Segmentation


NONE, THRESHOLD, WORDS = "none", "a threshold", "words"
COCO: tuple[Format, ...] = ("coco",) if find_spec("pycocotools") else ()
FORMATS: tuple[Format, ...] = ("overlay", "labels", "masks", "cutouts", "scores", *COCO)
EXPLAINED = """Each pixel of a photo gets one of your words. What is none of them goes to the background: where every word
scores below a threshold, or where words for it, such as *grass, sky*, score higher."""


def segment_tab(studio: Studio, embedded: bool) -> None:
    """Lay out the tab, and say what its buttons do."""
    gr.Markdown(EXPLAINED)
    with gr.Row():
        with gr.Column(min_width=300):
            photo = gr.Image(
                label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=340
            )
            photo.preprocess = _path  # Gradio's own opens the file, and says of a broken one what nobody understands
            classes = gr.Textbox(
                label="Words", placeholder="cat, potted plant", info="Parted by commas.", max_length=2000
            )
            rule = gr.Radio([NONE, THRESHOLD, WORDS], value=NONE, label="Background")
            threshold = gr.Slider(0, 1, 0.5, step=0.01, label="Threshold", visible=False)
            entities = gr.Textbox(
                label="Words for the background", placeholder="grass, sky", visible=False, max_length=2000
            )
            crf = gr.Checkbox(label="Move borders to the picture's own (CRF; seconds)")
            go = gr.Button("Segment", variant="primary")
        with gr.Column(min_width=300):
            painted = gr.AnnotatedImage(label="Segmentation", height=460)
            shares = gr.Label(label="Share of the pixels", visible=False)
            download = gr.DownloadButton("Download", interactive=False)
    found = gr.State(None, time_to_live=3600)
    if embedded:
        with Image.open(SCENE) as scene:
            gr.Examples([[str(SCENE), scene.info["names"]]], [photo, classes])

    def segment(photo, classes, rule, threshold, entities, crf, request: gr.Request, progress=PROGRESS):
        with notes():
            if photo is None:
                raise ValueError("Expected a photo, but got none: drop one, or click on an example.")
            _tell(studio, embedded, photo, classes, rule, entities)
            progress(0.2, desc="The model reads the photo")
            chosen = (
                {"threshold": threshold} if rule == THRESHOLD else {"background": entities} if rule == WORDS else {}
            )
            result = studio.segment(photo, classes, crf=crf, visitor=request.session_hash, **chosen)
            return result, *_shown(result)

    def another_threshold(result: Segmentation | None, value: float):
        if result is None or result.background is None or result.background.entities:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        result = replace(result, background=Background(threshold=value))
        return result, *_shown(result)

    outputs = [found, painted, shares, download]
    gr.on(
        [go.click, classes.submit, entities.submit], segment, [photo, classes, rule, threshold, entities, crf], outputs,
        show_progress_on=painted, api_name="segment", **MODEL,
    ).success(_files, found, download, concurrency_limit=None, show_progress="hidden", api_visibility="private")  # fmt: skip
    threshold.release(
        another_threshold, [found, threshold], outputs, trigger_mode="always_last", concurrency_limit=None,
        show_progress="hidden", api_visibility="private",
    ).success(_files, found, download, concurrency_limit=None, show_progress="hidden", api_visibility="private")  # fmt: skip
    rule.change(
        lambda chosen: (gr.Slider(visible=chosen == THRESHOLD), gr.Textbox(visible=chosen == WORDS)), rule,
        [threshold, entities], queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _path(upload) -> str | None:
    """Where an upload lies; that it is one of the page's own files, Gradio has checked before."""
    return None if upload is None else upload.path


def _tell(studio, embedded, photo, classes, rule, entities) -> None:
    """Notes beside a call that is made all the same."""
    size = size_of(photo)
    if max(size) > LARGEST:
        gr.Info(f"The photo has {size[0]} x {size[1]} pixels: reduced to at most {LARGEST} on a side.")
    if len(parted(classes)) == 1 and rule == NONE:
        gr.Info("One word without a background wins everywhere: choose a threshold, or words for the background.")
    words = f"{classes} {entities if rule == WORDS else ''}"
    if embedded and (unknown := unknown_words(studio.pipe.tokenizer, words)[0]):
        gr.Info(plain_text(f"The embedded model does not know {', '.join(unknown)}: expect noise there."))


def _shown(result: Segmentation):
    """Overlay, share of each word, and a button without its files yet."""
    labels, names = result.label_maps[0], [str(name) for name in result.classes]
    picture = views.shown(result.pictures[0])
    overlay = gr.AnnotatedImage(views.masks(picture, names, labels.numpy()), color_map=views.colours(names))
    shares = {name: (labels == index).float().mean().item() for index, name in enumerate(names)}
    return overlay, gr.Label(shares, visible=True), gr.DownloadButton(interactive=False)


def _files(result: Segmentation | None):
    """The result's files, zipped, behind the button; a folder of them is gone when they are."""
    if result is None:
        return gr.skip()
    with notes(), tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "segmentation", FORMATS)
        packed = shutil.make_archive(str(Path(folder) / "segmentation"), "zip", folder, "segmentation")
        return gr.DownloadButton(value=packed, interactive=True)
