"""GoCA segmentation and S-CFG guidance for diffusers: training-free regions, region-wise guidance.

The pipeline classes are imported when they are first asked for, so that importing the package stays light.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from goca_guidance.config import Background as Background
from goca_guidance.config import GoCAConfig as GoCAConfig
from goca_guidance.config import SCFGConfig as SCFGConfig
from goca_guidance.records import Regions as Regions
from goca_guidance.records import Segmentation as Segmentation


if TYPE_CHECKING:
    from goca_guidance.pipeline import GoCASCFGPipeline as GoCASCFGPipeline
    from goca_guidance.pipeline import GoCASCFGPipelineOutput as GoCASCFGPipelineOutput

__version__ = "0.1.0"

TINY_SD = str(Path(__file__).parent / "models" / "tiny-sd")
"""Folder of the embedded model, a tiny Stable Diffusion trained on synthetic scenes; see its README.md."""

__all__ = [
    "TINY_SD",
    "Background",
    "GoCAConfig",
    "GoCASCFGPipeline",
    "GoCASCFGPipelineOutput",
    "Regions",
    "SCFGConfig",
    "Segmentation",
]


def __getattr__(name: str):
    if name in ("GoCASCFGPipeline", "GoCASCFGPipelineOutput"):
        return getattr(import_module("goca_guidance.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
