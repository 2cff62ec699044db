"""`goca`: generate, segment, explain, app, demo, doctor. `--model` is any diffusers repo or folder, or the embedded model.

Torch is imported with the commands, when one runs: help, and what is wrong with the command line, are told at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args

from goca_guidance import TINY_SD, __version__
from goca_guidance.files import Format
from goca_guidance.schema import Count, between, read


Dtype = Literal["float32", "fp32", "bfloat16", "bf16", "float16", "fp16"]
OPTIONS = {"steps": Count, "num_noises": Count, "batch_size": Count, "seed": int, "guidance_scale": float,
           "height": Count | None, "width": Count | None, "threshold": float | None, "dtype": Dtype,
           "formats": Sequence[Format], "port": Annotated[int, between(1, 65535)] | None}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit status 2, or 1 where all else was done."""
    args = _parser().parse_args(arguments)
    try:
        for name, value in vars(args).items():
            if name in OPTIONS:
                read(f"--{name.replace('_', '-')}", value, OPTIONS[name])
        if "out" in args and args.out.exists() and not args.out.is_dir():
            raise ValueError(f"Expected --out to be a folder, but {str(args.out)!r} is a file.")
        # Else its import, which comes before the commands can say so, tells which optional packages it lacks.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        return getattr(import_module("goca_guidance.commands"), args.run)(args) or 0
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError) as error:
        print(f"goca: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("goca: stopped", file=sys.stderr)
        return 130


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of an option behind its help, but where there is none, or where the help tells it."""

    def _get_help_string(self, action):
        told = action.default is None or action.default is False or "default" in action.help
        return action.help if told else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="goca", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"goca {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, help):
        sub = commands.add_parser(name, help=help, description=help, formatter_class=_Help)
        sub.set_defaults(run=name)
        return sub

    def common(sub, out):
        sub.add_argument("--out", type=Path, default=Path(out), help="folder for the results")
        sub.add_argument("--seed", type=int, default=0, help="of the noise")
        loaded(sub)

    def loaded(sub):
        sub.add_argument(
            "--model",
            default=TINY_SD,
            help="diffusers repo or folder of any supported family (default: the embedded tiny model)",
        )
        sub.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
        sub.add_argument("--dtype", default="float32", help=f"{', '.join(get_args(Dtype))}")

    sub = command("generate", "generate images under GoCA + S-CFG, and draw the regions that steered them")
    sub.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="what is to be seen; several get a folder each in --out"
    )
    sub.add_argument("--prompts-file", type=Path, metavar="FILE", help="further prompts, one a line (default: none)")
    common(sub, "out")
    sub.add_argument("--steps", type=int, default=30, help="of denoising")
    sub.add_argument("--guidance-scale", type=float, default=5.0, help="strength of guidance")
    sub.add_argument("--negative-prompt", help="what is not to be seen (default: nothing)")
    sub.add_argument("--height", type=int, help="in pixels (default: the model's)")
    sub.add_argument("--width", type=int, help="in pixels (default: the model's)")
    sub.add_argument("--no-scfg", action="store_true", help="plain classifier-free guidance (default: by regions)")

    sub = command("segment", "segment real images by class names")
    sub.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a picture, a folder of pictures, or a glob in quotes; several pictures get a folder each in --out",
    )
    sub.add_argument("--classes", nargs="+", required=True, metavar="NAME", help="each pixel gets one of them")
    sub.add_argument("--background", nargs="+", metavar="NAME", help="what is background (default: there is none)")
    sub.add_argument("--threshold", type=float, help="constant score of the background (default: there is none)")
    sub.add_argument("--prompt", help="what the model reads (default: the names, joined by commas)")
    sub.add_argument("--timestep", type=int, nargs="+", help="of the noise, averaged (default: the model's preset)")
    sub.add_argument("--num-noises", type=int, default=1, help="samples of noise, averaged")
    sub.add_argument(
        "--formats",
        nargs="+",
        metavar="FORMAT",
        default=["overlay", "labels"],
        help=f"of {', '.join(get_args(Format))} (default: overlay labels)",
    )
    sub.add_argument("--batch-size", type=int, default=4, help="pictures read at once; fewer need less memory")
    common(sub, "out")

    sub = command("explain", "draw what each stage of GoCA does to one image, or to the image of a prompt")
    sub.add_argument(
        "source", metavar="PROMPT_OR_IMAGE", help="a picture's path, else a prompt, whose image is generated first"
    )
    sub.add_argument("--classes", nargs="+", metavar="NAME", help="words to look for; by default those of the prompt")
    common(sub, "explained")

    sub = command("app", "a page in the browser: guidances side by side, step by step, and photos segmented by words")
    sub.add_argument("--port", type=int, help="of this machine (default: the first free one from 7860)")
    loaded(sub)

    common(command("demo", "the whole method on the embedded model, in six pictures"), "demo")
    command("doctor", "versions, devices, and which attention processors the observer sees")
    return parser


if __name__ == "__main__":
    sys.exit(main())
