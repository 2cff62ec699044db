"""GoCA segmentation and S-CFG guidance for diffusers: training-free regions, region-wise guidance.

The classes that need diffusers' pipelines are imported when they are first asked for: importing the package stays light.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from goca_guidance.config import CRF as CRF
from goca_guidance.config import Background as Background
from goca_guidance.config import GoCAConfig as GoCAConfig
from goca_guidance.config import SCFGConfig as SCFGConfig
from goca_guidance.method.records import Regions as Regions
from goca_guidance.method.records import WordMaps as WordMaps


if TYPE_CHECKING:
    from goca_guidance.guider import GoCAGuidance as GoCAGuidance
    from goca_guidance.pipeline import GoCASCFGPipeline as GoCASCFGPipeline
    from goca_guidance.pipeline import GoCASCFGPipelineOutput as GoCASCFGPipelineOutput
    from goca_guidance.real_images.segment import Segmentation as Segmentation

__version__ = "0.1.0"

TINY_SD = str(Path(__file__).parent / "models" / "tiny-sd")
"""Folder of the embedded model, a tiny Stable Diffusion trained on synthetic scenes; see its README.md."""

__all__ = [
    "CRF",
    "TINY_SD",
    "Background",
    "GoCAConfig",
    "GoCAGuidance",
    "GoCASCFGPipeline",
    "GoCASCFGPipelineOutput",
    "Regions",
    "SCFGConfig",
    "Segmentation",
    "WordMaps",
]


def __getattr__(name: str):
    rooms = {
        "GoCASCFGPipeline": "pipeline",
        "GoCASCFGPipelineOutput": "pipeline",
        "GoCAGuidance": "guider",
        "Segmentation": "real_images.segment",
    }
    if name in rooms:
        return getattr(import_module(f"goca_guidance.{rooms[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
