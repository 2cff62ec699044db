"""`goca`: generate, segment, explain, demo, doctor. `--model` takes any diffusers repo or folder; else the embedded model.

Torch is imported when a command runs: help and mistakes are told at once.
"""

import argparse
import re
import sys
from pathlib import Path

from goca_guidance import TINY_SD, __version__
from goca_guidance.schema import Count, read


SAMPLE = Path(TINY_SD).parent / "scene.png"  # a held-out scene; its class names are in the file's "names" text
DEMO_PROMPT = "a cat and a bus on grass"
NUMBERS = {"steps": Count, "num_noises": Count, "seed": int, "guidance_scale": float, "height": Count | None,
           "width": Count | None, "threshold": float | None}  # fmt: skip
DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
          "fp16": "float16"}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit status 2."""
    args = _parser().parse_args(arguments)
    try:
        for name, value in vars(args).items():
            if name in NUMBERS:
                read(f"--{name.replace('_', '-')}", value, NUMBERS[name])
        if "out" in args and args.out.exists() and not args.out.is_dir():
            raise ValueError(f"Expected --out to be a folder, but {str(args.out)!r} is a file.")
        if "dtype" in args and args.dtype not in DTYPES:
            raise ValueError(f"Expected --dtype to be one of {', '.join(DTYPES)}, but got {args.dtype!r}.")
        args.run(args)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"goca: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of an option behind its help, but where there is none, or where the help tells it."""

    def _get_help_string(self, action):
        told = action.default is None or action.default is False or "default" in action.help
        return action.help if told else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="goca", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"goca {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help, formatter_class=_Help)
        sub.set_defaults(run=run)
        return sub

    def common(sub, out):
        sub.add_argument("--out", type=Path, default=Path(out), help="folder for the results")
        sub.add_argument("--seed", type=int, default=0, help="of the noise")
        sub.add_argument(
            "--model",
            default=TINY_SD,
            help="diffusers repo or folder of any supported family (default: the embedded tiny model)",
        )
        sub.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
        sub.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)}")

    sub = command("generate", generate, "generate an image under GoCA + S-CFG, and draw the regions that steered it")
    sub.add_argument("prompt", help="what is to be seen")
    common(sub, "out")
    sub.add_argument("--steps", type=int, default=30, help="of denoising")
    sub.add_argument("--guidance-scale", type=float, default=5.0, help="strength of guidance")
    sub.add_argument("--negative-prompt", help="what is not to be seen (default: nothing)")
    sub.add_argument("--height", type=int, help="in pixels (default: the model's)")
    sub.add_argument("--width", type=int, help="in pixels (default: the model's)")
    sub.add_argument("--no-scfg", action="store_true", help="plain classifier-free guidance (default: by regions)")

    sub = command("segment", segment, "segment a real image by class names")
    sub.add_argument("image", type=Path, help="a picture")
    sub.add_argument("--classes", nargs="+", required=True, metavar="NAME", help="each pixel gets one of them")
    sub.add_argument("--background", nargs="+", metavar="NAME", help="what is background (default: there is none)")
    sub.add_argument("--threshold", type=float, help="constant score of the background (default: there is none)")
    sub.add_argument("--prompt", help="what the model reads (default: the names, joined by commas)")
    sub.add_argument("--timestep", type=int, nargs="+", help="of the noise, averaged (default: the model's preset)")
    sub.add_argument("--num-noises", type=int, default=1, help="samples of noise, averaged")
    common(sub, "out")

    sub = command("explain", explain, "draw what each stage of GoCA does to one image, or to the image of a prompt")
    sub.add_argument(
        "source", metavar="PROMPT_OR_IMAGE", help="a picture's path, else a prompt, whose image is generated first"
    )
    sub.add_argument("--classes", nargs="+", metavar="NAME", help="words to look for; by default those of the prompt")
    common(sub, "explained")

    common(command("demo", demo, "the whole method on the embedded model, in six pictures"), "demo")
    command("doctor", _doctor, "versions, devices, and which attention processors the observer sees")
    return parser


# ---- commands --------------------------------------------------------------------------------------------------------
def generate(args) -> None:
    """Image, overlay, strip and animation of one prompt."""
    if (args.height is None) != (args.width is None):
        raise ValueError("Expected both --height and --width, or neither, but got one of them.")
    kwargs = {k: v for k in ("height", "width", "negative_prompt") if (v := getattr(args, k)) is not None}
    pipe = _load(args)
    if Path(args.model) == Path(TINY_SD):
        _note_unknown_words(pipe, args.prompt)
    output = _generate(
        pipe, args.prompt, args.seed, args.steps, args.guidance_scale, use_scfg=not args.no_scfg, **kwargs
    )
    _draw_generation(output, args.out)


def segment(args) -> None:
    """Overlay, and label map as a palette picture, of one image."""
    from goca_guidance import Background, pictures
    from goca_guidance.real_images.load import load_image

    image = load_image(args.image)
    rule = (
        Background(tuple(args.background or ()), args.threshold)
        if args.background or args.threshold is not None
        else None
    )
    if rule is None and len(args.classes) == 1:
        _note("one class without a background wins everywhere: pass --threshold (0.5, for example) or --background")
    pipe = _load(args)
    result = pipe.segment(
        image,
        args.classes,
        prompt=args.prompt,
        timestep=args.timestep,
        num_noises=args.num_noises,
        generator=_generator(args.seed),
        background=rule,
    )
    shown = pictures.enlarged(image)
    _save(pictures.overlay(shown, result.label_maps, result.classes, ["GoCA"]), args.out / "segmentation.png")
    _save(pictures.index_image(result.label_maps[0]), args.out / "labels.png")
    for index, name in enumerate(result.classes):
        print(f"  {index}  {name}: {100 * (result.label_maps[0] == index).float().mean():.1f} % of the pixels")


def explain(args) -> None:
    """One picture for each stage of the segmentation, and the weights of heads and layers."""
    from goca_guidance.explanation import explain as explained
    from goca_guidance.real_images.load import load_image

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
    found = explained(pipe, image, classes, prompt=prompt, generator=_generator(args.seed))
    for path in found.save(args.out):
        print(f"wrote {path}")


def demo(args) -> None:
    """Three guidances with one seed; the regions that steered; a real segmentation, vanilla beside GoCA."""
    from PIL import Image

    from goca_guidance import GoCAConfig, SCFGConfig, pictures

    pipe = _load(args)
    output = _generate(pipe, DEMO_PROMPT, args.seed)
    plain = _generate(pipe, DEMO_PROMPT, args.seed, use_scfg=False)
    theirs = _generate(pipe, DEMO_PROMPT, args.seed, scfg=SCFGConfig(segmentor="s-cfg"))
    _draw_generation(output, args.out)
    images = [pictures.enlarged(o.images[0]) for o in (plain, theirs, output)]
    _save(pictures.comparison(images, ["CFG", "S-CFG", "GoCA + S-CFG"]), args.out / "comparison.png")
    with Image.open(SAMPLE) as sample:
        names, image = sample.info["names"].split(", "), sample.convert("RGB")
    maps = [pipe.segment(image, names, goca=config).label_maps[0] for config in (GoCAConfig.vanilla(), GoCAConfig())]
    _save(pictures.overlay(pictures.enlarged(image), maps, names, ["vanilla", "GoCA"]), args.out / "segmentation.png")


def _doctor(args) -> None:
    from goca_guidance.doctor import doctor

    _quieten()
    doctor()


# ---- parts -----------------------------------------------------------------------------------------------------------
def _pipeline(model, **kwargs):
    from goca_guidance import GoCASCFGPipeline

    _quieten()
    pipe = GoCASCFGPipeline.from_pretrained(model, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _quieten() -> None:
    """No notes and bars of the libraries below: what matters to a user is told by us."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _load(args):
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return _pipeline(args.model, dtype=getattr(torch, DTYPES[args.dtype])).to(args.device or best)


def _note_unknown_words(pipe, prompt) -> None:
    """The embedded model spells what it does not know: each word of its captions is one token, and no letter alone but "a"."""
    end = "</w>"
    known = {word.removesuffix(end) for word in pipe.tokenizer.get_vocab() if word.endswith(end)}
    known = {word for word in known if len(word) > 1 and word.isalpha()} | {"a"}
    words = re.findall(r"[^\W_]+", prompt.lower())
    if unknown := [word for word in dict.fromkeys(words) if word not in known]:
        _note(
            f"the embedded model does not know {', '.join(unknown)}, and draws something else: it knows "
            f"{', '.join(sorted(known))}; pass --model for another one"
        )


def _note(text) -> None:
    print(f"goca: note: {text}", file=sys.stderr)


def _generator(seed):
    import torch

    return torch.Generator().manual_seed(seed)


def _generate(pipe, prompt, seed, steps=30, guidance_scale=5.0, **kwargs):
    from goca_guidance.stock import guidance_arguments

    pipe.set_progress_bar_config(disable=False, desc=prompt[:40])
    try:
        return pipe(
            prompt,
            num_inference_steps=steps,
            generator=_generator(seed),
            output_regions=True,
            **guidance_arguments(type(pipe), guidance_scale) | kwargs,
        )
    finally:
        pipe.set_progress_bar_config(disable=True)


def _draw_generation(output, out: Path) -> None:
    """image.png, and where regions guided: regions.png, strip.png, guidance.gif."""
    from goca_guidance import pictures

    image = pictures.enlarged(output.images[0])
    _save(image, out / "image.png")
    if output.regions:
        last = output.regions[-1]
        _save(
            pictures.overlay(image, [pictures.as_labels(last)], last.labels[0], ["regions, last step"]),
            out / "regions.png",
        )
        _save(pictures.region_strip(output.regions), out / "strip.png")
        _save(pictures.guidance_frames(output.guidance_maps[:, 0, 0]), out / "guidance.gif")


def _save(picture, path) -> None:
    from goca_guidance import pictures

    print(f"wrote {pictures.save(picture, path)}")


if __name__ == "__main__":
    sys.exit(main())
