"""The tab that generates: three guidances of one noise, and a slider over the steps."""

import gradio as gr
from PIL import Image

from goca_guidance.app import views
from goca_guidance.app.notes import MODEL, PROGRESS, notes, plain_text
from goca_guidance.app.studio import METHODS, Steps, Studio
from goca_guidance.models import unknown_words


GUIDED = METHODS[1:]
PROMPTS = (
    ("a cat and a bus on grass", "dog", 5, 0),
    ("a photo of a horse and a boat on snow", "", 5, 3),
    ("a dog on water", "", 7.5, 1),
)
EXPLAINED = """Three pictures from one noise. **CFG** guides every pixel alike; **S-CFG** by its own regions; **GoCA + S-CFG**
by GoCA's. A region's rate, between the lowest and the highest, multiplies the guidance."""
STEP = """**Each step**: its regions, pale where they are background, and the guidance at each pixel: scale times rate,
strong where it is bright."""

Found = dict[str, tuple[Image.Image, Steps]]  # by method, what the slider shows


def generate_tab(studio: Studio, embedded: bool) -> None:
    """Lay out the tab, and say what its buttons do."""
    gr.Markdown(EXPLAINED)
    with gr.Row():
        prompt = gr.Textbox(PROMPTS[0][0], label="Prompt", scale=3, min_width=260, max_length=2000)
        negative = gr.Textbox(label="Negative prompt", scale=2, min_width=200, max_length=2000)
    with gr.Row():
        scale = gr.Slider(1, 15, 5, step=0.5, label="Guidance", min_width=200)
        rate_min = gr.Slider(0.1, 1, 0.8, step=0.05, label="Lowest rate", min_width=200)
        rate_max = gr.Slider(1, 10, 3, step=0.1, label="Highest rate", min_width=200)
        steps = gr.Slider(1, 100, 30, step=1, label="Steps", min_width=200)
        seed = gr.Number(0, label="Seed", precision=0, min_width=120)
    with gr.Row():
        go = gr.Button("Generate", variant="primary", scale=4)
        stop = gr.Button("Stop", scale=1, min_width=80)
    with gr.Row():
        pictures = [
            gr.Image(
                label=method,
                interactive=False,
                format="png",
                height=300,
                min_width=240,
                buttons=["download", "fullscreen"],
            )
            for method in METHODS
        ]
    found = gr.State({}, time_to_live=3600)
    with gr.Column(visible=False) as details:
        gr.Markdown(STEP)
        step = gr.Slider(1, 30, 30, step=1, label="Step")
        with gr.Row():
            panels = [_panel(method) for method in GUIDED]
        acting = gr.Gallery(
            label="Where the words of the negative prompt act",
            columns=4,
            fit_columns=False,
            height=300,
            object_fit="contain",
            visible=False,
        )
    shown = [*(part for panel in panels for part in panel), acting]
    if embedded:
        gr.Examples([list(each) for each in PROMPTS], [prompt, negative, scale, seed])

    def generate(prompt, negative, scale, rate_min, rate_max, steps, seed, request: gr.Request, progress=PROGRESS):
        def on_step(method, done):
            progress((METHODS.index(method) * steps + done, len(METHODS) * steps), desc=method, unit="steps")

        with notes():
            if embedded and (unknown := unknown_words(studio.pipe.tokenizer, prompt)[0]):
                gr.Info(
                    plain_text(f"The embedded model does not know {', '.join(unknown)}, and draws something else.")
                )
            progress(0, desc="The model reads the prompt")
            results: Found = {}
            for method, image, guided in studio.generate(
                prompt, negative or "", scale, seed, steps, rate_min, rate_max, request.session_hash, on_step
            ):
                at = METHODS.index(method)
                if guided is not None:
                    results[method] = image, guided
                later = {picture: None for picture in pictures[at + 1 :]} if at == 0 else {}
                yield {pictures[at]: views.shown(image), details: gr.Column(visible=False), **later}
            if not results:
                gr.Info("A guidance scale of 1 guides nothing: the three pictures are one.")
                return
            count = len(results[METHODS[-1]][1].guidance)
            slider = gr.Slider(1, count, count, step=1)
            yield {found: results, details: gr.Column(visible=True), step: slider, **at_step(results, count)}

    def halt(request: gr.Request) -> None:
        studio.stop(request.session_hash)

    def at_step(results: Found, number: int) -> dict:
        return dict(zip(shown, step_views(results, int(number) - 1), strict=True))

    inputs = [prompt, negative, scale, rate_min, rate_max, steps, seed]
    gr.on(
        [go.click, prompt.submit, negative.submit], generate, inputs, [*pictures, found, details, step, *shown],
        show_progress_on=pictures, api_name="generate", **MODEL,
    )  # fmt: skip
    stop.click(halt, queue=False, show_progress="hidden", api_visibility="private")
    step.input(
        at_step, [found, step], shown, trigger_mode="always_last", concurrency_limit=None, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip


def _panel(method):
    with gr.Column(min_width=300):
        regions = gr.AnnotatedImage(label=f"{method}: regions", height=340)
        guidance = gr.Image(
            interactive=False, format="png", height=300, buttons=["fullscreen"], label=f"{method}: guidance"
        )
    return regions, guidance


def step_views(results: Found, step: int) -> list:
    """The panels of a step, from 0, of both methods on one colour scale, and the maps of the negative prompt's words."""
    if not results:  # the visitor was away for long
        raise gr.Error("The steps are no longer kept: generate again.", print_exception=False)
    low = min(steps.guidance.min().item() for _, steps in results.values())
    high = max(steps.guidance.max().item() for _, steps in results.values())
    updates: list = []
    for method in GUIDED:
        image, steps = results[method]
        at, picture = min(step, len(steps.guidance) - 1), views.shown(image)
        updates += [
            gr.AnnotatedImage(views.regions_at(picture, steps, at), color_map=views.colours(steps.names)),
            gr.Image(
                views.heat(steps.guidance[at], low, high, picture.size),
                label=f"{method}: guidance, {low:.1f} to {high:.1f}",
            ),
        ]
    maps = []
    if steps.acting is not None:
        for name, values in zip(steps.negative, steps.acting[at], strict=True):
            maps.append((Image.blend(picture, views.heat(values, 0, 1, picture.size), 0.7), views.plain(name)))
    return [*updates, gr.Gallery(maps, visible=bool(maps))]
