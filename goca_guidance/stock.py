"""Which stock pipeline a repository holds, and whether a folder of it is complete."""

import inspect
import json
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline

from goca_guidance.denoisers.base import Family


PREFIX = "GoCASCFG"
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
WEIGHTS = (".safetensors", ".bin")


def stock_class(repository: str | Path, **kwargs) -> type[DiffusionPipeline]:
    """The pipeline class of diffusers that a repository's `model_index.json` names."""
    check_folder(repository, given=kwargs)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    name = DiffusionPipeline.load_config(repository, **hub)["_class_name"]
    name = (name[-1] if isinstance(name, list) else name).removeprefix(PREFIX)
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ValueError(
            f"Expected {str(repository)!r} to hold a pipeline of diffusers, but its model_index.json names {name!r}: load it "
            "as you do without us, and pass it to `GoCASCFGPipeline.from_pipe`."
        )
    return found


def check_folder(repository: str | Path, given) -> None:
    """Name what a local checkpoint folder lacks, before anything of it is loaded; a hub repository passes."""
    folder = Path(repository)
    if not folder.is_dir():
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"Expected a pipeline's folder with a model_index.json, but {str(folder)!r} has none.")
    parts = {
        name: part for name, part in json.loads(index.read_text()).items() if isinstance(part, list) and all(part)
    }
    lacking = [lack for name in parts if name not in given for lack in _lacking(folder / name)]
    if lacking:
        raise ValueError(
            f"Expected a complete checkpoint folder, but {str(folder)!r} lacks {', '.join(lacking)}: download it again, or "
            "pass the component to from_pretrained."
        )


def _lacking(part: Path) -> list[str]:
    """Files that a component's folder should have: any at all, and weights where its configuration is a model's."""
    files = [path.name for path in part.glob("*")]
    if not files:
        return [f"{part.name}/"]
    shards = {
        name for path in part.glob("*.index*.json") for name in json.loads(path.read_text())["weight_map"].values()
    }
    if missing := sorted(shards - set(files)):
        return [f"{part.name}/{name}" for name in missing]
    if "config.json" in files and not any(name.endswith(WEIGHTS) for name in files):
        return [f"{part.name}/*.safetensors"]
    return []


def scale_name(pipeline: type[DiffusionPipeline]) -> str | None:
    """The argument that a pipeline's loop multiplies by the guidance difference; true guidance (Flux) has precedence."""
    names = inspect.signature(pipeline.__call__).parameters
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in names), None)


def guidance_arguments(pipeline: type[DiffusionPipeline], scale: float) -> dict:
    """The arguments of a call that is guided by a scale, without words in its negative prompt.

    True guidance (Flux) mixes nothing unless a negative prompt is given: it gets an empty one.
    """
    name = scale_name(pipeline) or "guidance_scale"
    return {name: scale} | ({"negative_prompt": ""} if name == "true_cfg_scale" else {})


def exact_arguments(pipeline: type[DiffusionPipeline]) -> dict:
    """Off, where a pipeline has them: switches that change the size (PixArt, HunyuanDiT) or the prompt (PixArt) of a call."""
    known = inspect.signature(pipeline.__call__).parameters
    return {name: False for name in ("use_resolution_binning", "clean_caption") if name in known}


def is_text_to_image(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline needs no picture."""
    return not {"image", "control_image"} & set(inspect.signature(pipeline.__call__).parameters)


def named_pipeline(family: Family) -> type[DiffusionPipeline]:
    """The text-to-image pipeline of a denoiser's family."""
    if family.pipeline is None:
        raise ValueError(
            f"Expected a denoiser whose text-to-image pipeline is known, but got {type(family.denoiser).__name__}: load the "
            "pipeline, and pass it to `GoCASCFGPipeline.from_pipe`."
        )
    return getattr(diffusers, family.pipeline)
