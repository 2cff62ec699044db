"""`goca`: generate, segment, demo, doctor. `--model` takes any diffusers repo or folder; by default, the embedded model."""

import argparse
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from goca_guidance import TINY_SD, Background, SCFGConfig
from goca_guidance.schema import Count, read


SAMPLE = Path(TINY_SD).parent / "scene.png"  # a held-out scene; its class names are in the file's "names" text
DEMO_PROMPT = "a cat and a bus on grass"
NUMBERS = {"steps": Count, "num_noises": Count, "seed": int, "guidance_scale": float, "height": Count | None,
           "width": Count | None, "threshold": float | None}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit status 2."""
    args = _parser().parse_args(arguments)
    try:
        for name, value in vars(args).items():
            if name in NUMBERS:
                read(f"--{name.replace('_', '-')}", value, NUMBERS[name])
        if "out" in args and args.out.exists() and not args.out.is_dir():
            raise ValueError(f"Expected --out to be a folder, but {str(args.out)!r} is a file.")
        args.run(args)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"goca: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="goca", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    def common(sub, out):
        sub.add_argument("--out", type=Path, default=Path(out), help="folder for the pictures")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument(
            "--model",
            default=TINY_SD,
            help="diffusers repo or folder of any supported family; the embedded tiny model by default",
        )
        sub.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
        sub.add_argument("--dtype", help="float32, bfloat16 or float16; float32 by default")

    sub = command("generate", generate, "generate an image under GoCA + S-CFG, and draw the regions that steered it")
    sub.add_argument("prompt")
    common(sub, "out")
    sub.add_argument("--steps", type=int, default=30)
    sub.add_argument("--guidance-scale", type=float, default=5.0)
    sub.add_argument("--negative-prompt")
    sub.add_argument("--height", type=int)
    sub.add_argument("--width", type=int)
    sub.add_argument("--no-scfg", action="store_true", help="plain classifier-free guidance")

    sub = command("segment", segment, "segment a real image by class names")
    sub.add_argument("image", type=Path)
    sub.add_argument("--classes", nargs="+", required=True, metavar="NAME")
    sub.add_argument("--background", nargs="+", metavar="NAME", help="names of what is background")
    sub.add_argument("--threshold", type=float, help="constant score of the background")
    sub.add_argument("--prompt", help="what the model reads; the names joined by commas by default")
    sub.add_argument("--timestep", type=int, nargs="+")
    sub.add_argument("--num-noises", type=int, default=1)
    common(sub, "out")

    common(command("demo", demo, "the whole method on the embedded model, in six pictures"), "demo")
    command("doctor", doctor, "versions, devices, and which attention processors the observer sees")
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
    from goca_guidance import pictures
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


def demo(args) -> None:
    """Three guidances with one seed; the regions that steered; a real segmentation, vanilla beside GoCA."""
    from PIL import Image

    from goca_guidance import GoCAConfig, pictures

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


def doctor(args) -> None:
    """Print what this machine has, and try the ways of computing attention on the embedded model."""
    import torch

    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("goca-guidance", "torch", "diffusers", "transformers", "accelerate", "jaxtyping"):
        print(f"{package} {metadata.version(package)}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: cpu ({torch.get_num_threads()} threads){''.join(f', cuda ({name})' for name in gpus)}")
    print(f"embedded model: {TINY_SD}")
    for name, outcome in _try_processors().items():
        print(f"attention, {name}: {outcome}")


def _try_processors() -> dict[str, str]:
    """Which ways of computing attention the observer sees, tried for real."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    ways = {
        "scaled dot product (the default)": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        "fused projections": lambda unet: unet.fuse_qkv_projections(),
        "legacy AttnProcessor": lambda unet: unet.set_attn_processor(AttnProcessor()),
        "attention slicing": lambda unet: unet.set_attention_slice("max"),
    }
    outcomes = {}
    for name, prepare in ways.items():
        pipe = _pipeline(TINY_SD)
        prepare(pipe.unet)
        try:
            pipe("a cat", num_inference_steps=1, output_type="latent")
            outcomes[name] = "works"
        except RuntimeError as error:
            if "scaled-dot-product" not in str(error):
                raise
            outcomes[name] = "hidden from the observer: refused with the fix"
    return outcomes


# ---- parts -----------------------------------------------------------------------------------------------------------
def _pipeline(model, **kwargs):
    from diffusers.utils import logging

    from goca_guidance import GoCASCFGPipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = GoCASCFGPipeline.from_pretrained(model, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load(args):
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"Expected --dtype to be float32, bfloat16 or float16, but got {args.dtype!r}.")
    return _pipeline(args.model, dtype=dtype).to(args.device or best)


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
