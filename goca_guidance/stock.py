"""Which stock pipeline a repository holds, and whether a folder of it is complete."""

import inspect
import json
import sys
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from safetensors import SafetensorError, safe_open

from goca_guidance.denoisers.base import Family
from goca_guidance.mixing import mixing_of
from goca_guidance.schema import shown


PREFIX = "GoCASCFG"
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
WEIGHTS = (".safetensors", ".bin")
LOOKING = ("Flux2Pipeline", "Flux2KleinPipeline", "ZImageOmniPipeline", "BriaFibo2Pipeline")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")


def stock_class(repository: str | PathLike, **kwargs) -> type[DiffusionPipeline]:
    """The pipeline class of diffusers that a repository's `model_index.json` names."""
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    name = DiffusionPipeline.load_config(repository, **hub).get("_class_name", "nothing")
    name = (name[-1] if isinstance(name, list) else name).removeprefix(PREFIX)
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ValueError(
            f"Expected {str(repository)!r} to hold a pipeline of diffusers, but its model_index.json names {name!r}: load it "
            "as you do without us, and pass it to `GoCASCFGPipeline.from_pipe`."
        )
    return found


def single_file_class(file: str | PathLike, **kwargs) -> type[DiffusionPipeline]:
    """The pipeline class of a checkpoint that is one file: its `config` names it, or diffusers tells it by the weights."""
    if kwargs.get("custom_pipeline") is not None:
        raise ValueError(
            "Expected no `custom_pipeline` beside a single file, because diffusers takes none there: load the file without, "
            "and pass its components to your class, then that to `GoCASCFGPipeline.from_pipe`."
        )
    is_link = str(file).startswith(("http://", "https://"))
    if not is_link and not Path(file).is_file():
        raise ValueError(f"Expected a checkpoint's file, or its address on the hub, but got {str(file)!r}.")
    if not is_link and Path(file).suffix == ".safetensors" and (fault := _fault(Path(file))):
        raise ValueError(f"Expected a whole checkpoint, but {str(file)!r} is none ({fault}): download it again.")
    config = kwargs.pop("config", None)
    if config is None:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        weights = load_single_file_checkpoint(file, **hub, disable_mmap=kwargs.get("disable_mmap", False))
        config = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]  # the one that the weights are like
    try:
        return stock_class(config, **kwargs)
    except OSError as error:
        raise ValueError(
            f"Expected the configuration of {str(file)!r} in {str(config)!r}, but it could not be had "
            f"({' '.join(str(error).split())}): pass `config`, a folder or repository with a model_index.json."
        ) from error


def check_folder(repository: str | PathLike, given) -> None:
    """Name what a local checkpoint folder lacks, before anything of it is loaded; a hub repository passes."""
    folder = Path(repository)
    if not folder.is_dir():
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"Expected a pipeline's folder with a model_index.json, but {str(folder)!r} has none.")
    listed = _read_json(index)
    if not isinstance(listed.get("_class_name"), (str, list)):
        raise ValueError(f"Expected the pipeline's class (`_class_name`) in {str(index)!r}, but got {shown(listed)}.")
    lists = {name: part for name, part in listed.items() if isinstance(part, list) and any(part)}
    parts = {name: part for name, part in lists.items() if _is_named(part) or (folder / name).is_dir()}
    if wrong := next((name for name, part in parts.items() if not _is_named(part)), None):
        raise ValueError(
            f"Expected a library and a class for {wrong} in {str(index)!r}, but got {shown(parts[wrong])}."
        )
    variant = given.get("variant")
    lacking = [
        lack for name in parts if name not in given for lack in _lacking(folder / name, parts[name][1], variant)
    ]
    if lacking:
        raise ValueError(
            f"Expected a complete checkpoint folder, but {str(folder)!r} lacks {', '.join(lacking)}: download it again, or "
            "pass the component to from_pretrained."
        )


def _is_named(part) -> bool:
    """Whether an entry of the index names a component's library and class."""
    return isinstance(part, list) and len(part) == 2 and all(isinstance(each, str) for each in part)


def _lacking(part: Path, kind: str, variant: str | None) -> list[str]:
    """What a component's folder should have: any file at all, whole weights for a model, a vocabulary for a tokenizer."""
    files = [path.name for path in part.glob("*")]
    if not files:
        return [f"{part.name}/"]
    shards = {name for path in part.glob("*.index*.json") for name in _weight_map(path).values()}
    if missing := sorted(shards - set(files)):
        return [f"{part.name}/{name}" for name in missing]
    if "config.json" in files and not any(name.endswith(WEIGHTS) for name in files):
        return [f"{part.name}/*.safetensors"]
    if "Tokenizer" in kind and not any(name in VOCABULARIES or name.endswith(".model") for name in files):
        return [f"{part.name}/tokenizer.json"]
    weights = [path for path in part.glob("*.safetensors") if _variant(path) == variant]
    return [f"a whole {part.name}/{path.name} ({fault})" for path in weights if (fault := _fault(path))]


def _variant(weights: Path) -> str | None:
    """Of `model.fp16-00001-of-00002.safetensors` it is fp16; other variants than the one asked for are not loaded."""
    return weights.stem.partition(".")[2].partition("-")[0] or None


def _read_json(path: Path) -> dict:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected JSON in {str(path)!r}, but got {error}: download it again.") from error
    if not isinstance(read, dict):
        raise ValueError(f"Expected a mapping in {str(path)!r}, but got {shown(read)}: download it again.")
    return read


def _weight_map(path: Path) -> dict[str, str]:
    """The shards that an index of weights names."""
    found = _read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"Expected a `weight_map` in {str(path)!r}, but got {shown(found)}: download it again.")
    return found


def _fault(weights: Path) -> str | None:
    """What is wrong with a file of weights by its header, which says how long it is."""
    try:
        with safe_open(weights, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return " ".join(str(error).split())


def join_auto_pipelines(guided: Callable[[type], type]) -> None:
    """Enter guided classes into the tables of `AutoPipeline`, once it is loaded: its `from_pipe` then gives guided ones."""
    auto = sys.modules.get("diffusers.pipelines.auto_pipeline")
    for table in getattr(auto, "SUPPORTED_TASKS_MAPPINGS", ()):
        if not any(name.startswith(PREFIX) for name in table):
            made = {f"{PREFIX}-{name}": _or_none(guided, stock) for name, stock in table.items()}
            table.update({name: ours for name, ours in made.items() if ours is not None})


def _or_none(guided, stock):
    try:
        return guided(stock)
    except ValueError:  # it mixes no two predictions
        return None


def guidance_arguments(pipeline: type[DiffusionPipeline], scale: float) -> dict:
    """The arguments of a call that is guided by a scale, without words in its negative prompt.

    True guidance (Flux) mixes nothing unless a negative prompt is given: it gets an empty one. A schedule of scales (Ideogram
    4) makes way for the scale.
    """
    name = mixing_of(pipeline).scale or "guidance_scale"
    negative = {"negative_prompt": ""} if name == "true_cfg_scale" else {}
    return _known(pipeline, {"guidance_schedule": None}) | {name: scale} | negative


def unguided(pipeline: type[DiffusionPipeline]) -> dict:
    """The arguments of a call that makes one prediction."""
    off = {"guidance_scale": mixing_of(pipeline).least, "true_cfg_scale": 1.0, "pag_scale": 0.0}
    return _known(pipeline, off | {"guidance_schedule": None})


def _known(pipeline: type[DiffusionPipeline], arguments: dict) -> dict:
    """Those that a pipeline's call has."""
    known = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in arguments.items() if name in known}


def exact_arguments(pipeline: type[DiffusionPipeline]) -> dict:
    """Off, where a pipeline has them: switches that change the size (PixArt, HunyuanDiT) or the prompt (PixArt, LongCat)."""
    switches = ("use_resolution_binning", "clean_caption", "enable_prompt_rewrite")
    return _known(pipeline, dict.fromkeys(switches, False))


def is_text_to_image(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline needs no picture; in some it is one to look at, if any."""
    if pipeline.__name__.removeprefix(PREFIX) in LOOKING:
        return True
    return not {"image", "control_image"} & set(inspect.signature(pipeline.__call__).parameters)


def named_pipeline(family: Family) -> type[DiffusionPipeline]:
    """The text-to-image pipeline of a denoiser's family."""
    if family.pipeline is None:
        raise ValueError(
            f"Expected a denoiser whose text-to-image pipeline is known, but got {type(family.denoiser).__name__}: load the "
            "pipeline, and pass it to `GoCASCFGPipeline.from_pipe`."
        )
    return getattr(diffusers, family.pipeline)
