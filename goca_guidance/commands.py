"""What the commands of `goca` do, each with its parsed arguments; `goca_guidance.cli` is their command line."""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from goca_guidance import TINY_SD, Background, GoCAConfig, GoCASCFGPipeline, SCFGConfig, __version__, pictures
from goca_guidance.doctor import doctor as report
from goca_guidance.explanation import explain as explain_stages
from goca_guidance.files import Results, pictures_in, slug, write_json
from goca_guidance.formats import check, joined_coco, write
from goca_guidance.models import SCENE, unknown_words
from goca_guidance.real_images.load import load_image
from goca_guidance.stock import guidance_arguments


DEMO_PROMPT = "a cat and a bus on grass"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MODEL = ("model", "dtype", "seed")  # what results depend on, beside the options of each command
GENERATION = (*MODEL, "steps", "guidance_scale", "negative_prompt", "height", "width", "no_scfg")
SEGMENTATION = (*MODEL, "classes", "background", "threshold", "prompt", "timestep", "num_noises", "formats")


# ---- generate --------------------------------------------------------------------------------------------------------
def generate(args) -> None:
    """Image, regions, strip and animation of each prompt."""
    if (args.height is None) != (args.width is None):
        raise ValueError("Expected both --height and --width, or neither, but got one of them.")
    prompts = _prompts(args)
    results = _results(args, {prompt: slug(prompt) for prompt in prompts}, GENERATION, len(prompts) == 1)
    waiting = _unfinished(results, prompts)
    if not waiting:
        return
    pipe = _load(args)
    if Path(args.model) == Path(TINY_SD):
        _note_unknown_words(pipe, " ".join(waiting))
    kwargs = {k: v for k in ("height", "width", "negative_prompt") if (v := getattr(args, k)) is not None}
    for prompt in waiting:
        output = _generate(
            pipe, prompt, args.seed, args.steps, args.guidance_scale, use_scfg=not args.no_scfg, **kwargs
        )
        with results.writing(prompt) as folder:
            drawn = _draw_generation(output, folder)
        print(f"wrote {results.place(prompt)}: {', '.join(drawn)}")


def _prompts(args) -> list[str]:
    """Those of the command line and of a file, each once."""
    lines = [] if args.prompts_file is None else args.prompts_file.read_text(encoding="utf-8").splitlines()
    prompts = list(dict.fromkeys([*args.prompts, *filter(None, map(str.strip, lines))]))
    if not prompts:
        raise ValueError("Expected a prompt, or a file of them by --prompts-file, but got none.")
    return prompts


def _generate(pipe, prompt, seed, steps=30, guidance_scale=5.0, **kwargs):
    pipe.set_progress_bar_config(disable=False, desc=prompt[:40])
    try:
        return pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_regions=True,
            **guidance_arguments(type(pipe), guidance_scale) | kwargs,
        )
    finally:
        pipe.set_progress_bar_config(disable=True)


def _draw_generation(output, folder: Path) -> list[str]:
    """image.png, and where regions guided: regions.png, strip.png, guidance.gif. Returns the names of the files."""
    image = pictures.enlarged(output.images[0])
    drawn: dict[str, Any] = {"image.png": image}
    if output.regions:
        last = output.regions[-1]
        labels, titles = [pictures.as_labels(last)], ["regions, last step"]
        drawn["regions.png"] = pictures.overlay(image, labels, last.labels[0], titles)
        drawn["strip.png"] = pictures.region_strip(output.regions)
        drawn["guidance.gif"] = pictures.guidance_frames(output.guidance_maps[:, 0, 0])
    return _save_all(drawn, folder)


# ---- segment ---------------------------------------------------------------------------------------------------------
def segment(args) -> int:
    """Files in the formats asked for, of each picture; 1 where some could not be read."""
    check(args.formats)
    paths = {str(path.resolve()): path for path in pictures_in(args.images)}
    alone = len(paths) == 1 and [Path(each) for each in args.images] == [*paths.values()]
    results = _results(args, {key: path.stem for key, path in paths.items()}, SEGMENTATION, alone)
    waiting = _unfinished(results, paths)
    if not args.background and args.threshold is None and len(args.classes) == 1:
        _note("one class without a background wins everywhere: pass --threshold (0.5, for example) or --background")
    pipe = None
    with tqdm(total=len(paths), initial=len(paths) - len(waiting), unit="picture", disable=alone) as bar:
        unread = 0
        for batch in _batches(waiting, args.batch_size):
            read = _read_all({key: paths[key] for key in batch}, alone)
            unread += len(batch) - len(read)
            if read:
                pipe = pipe or _load(args)
                _segment_batch(args, pipe, read, paths, results)
            bar.update(len(batch))
    finished = [results.place(key) / "coco.json" for key in paths if results.is_finished(key)]
    if "coco" in args.formats and finished:
        datasets = (json.loads(file.read_text(encoding="utf-8")) for file in finished)
        write_json(args.out / "coco.json", joined_coco(datasets))
    return 1 if unread else 0


def _segment_batch(args, pipe, read: dict[str, Image.Image], paths, results: Results) -> None:
    """Segment pictures in one forward, and write what is found; each has noise of its own, whatever is beside it."""
    rule = None
    if args.background or args.threshold is not None:
        rule = Background(tuple(args.background or ()), args.threshold)
    found = pipe.segment(
        list(read.values()),
        args.classes,
        prompt=args.prompt,
        timestep=args.timestep,
        num_noises=args.num_noises,
        generator=[torch.Generator().manual_seed(args.seed) for _ in read],
        background=rule,
    )
    for number, key in enumerate(read):
        with results.writing(key) as folder:
            write(found.segmented(number, paths[key].name), folder, args.formats)
        shares = [f"{name} {100 * found.mask(name, number).float().mean():.1f} %" for name in found.classes]
        tqdm.write(f"wrote {results.place(key)}: {', '.join(shares)}")


def _read_all(paths: dict[str, Path], alone: bool) -> dict[str, Image.Image]:
    """The pictures that can be read; what is wrong with another is told, and raised where there is no other."""
    read = {}
    for key, path in paths.items():
        try:
            read[key] = load_image(path)
        except ValueError as error:
            if alone:
                raise
            tqdm.write(f"goca: error: {path}: {' '.join(str(error).split())}", file=sys.stderr)
    return read


def _batches(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---- explain, demo, doctor --------------------------------------------------------------------------------------------
def explain(args) -> None:
    """One picture for each stage of the segmentation, and the weights of heads and layers."""
    is_file, prompt, classes = Path(args.source).is_file(), None, args.classes
    if is_file and not classes:
        raise ValueError(f"Expected --classes beside a picture, but got {args.source!r} alone: name what it shows.")
    pipe = _load(args)
    if is_file:
        image = load_image(args.source)
    else:
        output, prompt = _generate(pipe, args.source, args.seed), args.source
        image, words = output.images[0], output.regions[-1].labels[0]
        classes = classes or [word for word in words if not word.startswith("<")]
    generator = torch.Generator().manual_seed(args.seed)
    found = explain_stages(pipe, image, classes, prompt=prompt, generator=generator)
    print(f"wrote {args.out}: {', '.join(path.name for path in found.save(args.out))}")


def app(args) -> None:
    """The page, until it is interrupted."""
    if find_spec("gradio") is None:
        raise ValueError('Expected gradio for the page, but it is not installed: pip install "goca-guidance[app]".')
    from goca_guidance.app.page import serve

    serve(partial(_load, args), args.model, args.port)


def demo(args) -> None:
    """Three guidances with one seed; the regions that steered; a real segmentation, vanilla beside GoCA."""
    pipe = _load(args)
    output = _generate(pipe, DEMO_PROMPT, args.seed)
    plain = _generate(pipe, DEMO_PROMPT, args.seed, use_scfg=False)
    theirs = _generate(pipe, DEMO_PROMPT, args.seed, scfg=SCFGConfig(segmentor="s-cfg"))
    images = [pictures.enlarged(o.images[0]) for o in (plain, theirs, output)]
    with Image.open(SCENE) as sample:
        names, image = sample.info["names"].split(", "), sample.convert("RGB")
    maps = [pipe.segment(image, names, goca=config).label_maps[0] for config in (GoCAConfig.vanilla(), GoCAConfig())]
    drawn = {
        "comparison.png": pictures.comparison(images, ["CFG", "S-CFG", "GoCA + S-CFG"]),
        "segmentation.png": pictures.overlay(pictures.enlarged(image), maps, names, ["vanilla", "GoCA"]),
    }
    print(f"wrote {args.out}: {', '.join(_draw_generation(output, args.out) + _save_all(drawn, args.out))}")


def doctor(args) -> None:
    """What this machine has, and which ways of computing attention can be observed on it."""
    _quieten()
    report()


# ---- parts -----------------------------------------------------------------------------------------------------------
def _results(args, wanted: dict[str, str], options: tuple[str, ...], alone: bool) -> Results:
    """Where the results of items go: of one into --out itself, of several into the folders wanted in it."""
    if alone:
        return Results(args.out, dict.fromkeys(wanted, ""))
    settings = {"command": args.run, "version": __version__, **{name: getattr(args, name) for name in options}}
    return Results.of_several(args.out, settings, wanted)


def _unfinished(results: Results, items: Iterable[str]) -> list[str]:
    """Those that a run which was stopped did not come to."""
    items = list(items)
    waiting = [item for item in items if not results.is_finished(item)]
    if len(waiting) < len(items):
        _note(f"{len(items) - len(waiting)} of {len(items)} are finished in {results.folder}")
    return waiting


def _load(args) -> GoCASCFGPipeline:
    _quieten()
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    pipe = GoCASCFGPipeline.from_pretrained(args.model, dtype=getattr(torch, DTYPES.get(args.dtype, args.dtype)))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device or best)


def _quieten() -> None:
    """No notes and bars of the libraries below: what matters to a user is told by us."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", module="huggingface_hub|diffusers|transformers")


def _note_unknown_words(pipe, prompt) -> None:
    """The embedded model spells what it does not know."""
    unknown, known = unknown_words(pipe.tokenizer, prompt)
    if unknown:
        _note(
            f"the embedded model does not know {', '.join(unknown)}, and draws something else: it knows "
            f"{', '.join(known)}; pass --model for another one"
        )


def _note(text) -> None:
    print(f"goca: note: {text}", file=sys.stderr)


def _save_all(drawn: dict[str, Any], folder: Path) -> list[str]:
    """Write pictures by the names of their files, which are returned."""
    return [pictures.save(picture, folder / name).name for name, picture in drawn.items()]
