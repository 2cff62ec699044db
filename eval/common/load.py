"""Models as the programs load them: a pipeline of ours, a network of open_clip."""

from pickle import UnpicklingError
from typing import Any

import torch

from goca_guidance import GoCASCFGPipeline


DTYPES = ("float32", "float16", "bfloat16")


def load_pipeline(
    model: str, dtype: str = "float32", device: str | torch.device | None = None, **components: Any
) -> GoCASCFGPipeline:
    """The pipeline on a device, by default the accelerator, if there is one; silent. `components` replace the model's."""
    pipe = GoCASCFGPipeline.from_pretrained(model, dtype=getattr(torch, dtype), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_open_clip(model: str, pretrained: str | None, device: torch.device):
    """(model, preprocessing of an image, tokenizer) of open_clip; ValueError where the name or the weights cannot be had."""
    import open_clip

    try:
        network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise ValueError(
            f"Expected a model of open_clip with weights that can be had, but got {model!r} with {pretrained!r} "
            f"({type(error).__name__}: {error}). Without a network, download the checkpoint elsewhere and give its path as "
            "`pretrained`; `open_clip.list_pretrained()` lists the names."
        ) from error
    return network.eval(), preprocess, open_clip.get_tokenizer(model)
