"""GoCA segmentation and S-CFG guidance for diffusers: training-free regions, region-wise guidance.

What the package exports is imported when it is first asked for: importing the package itself loads nothing, not even torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from goca_guidance.config import CRF as CRF
    from goca_guidance.config import Background as Background
    from goca_guidance.config import GoCAConfig as GoCAConfig
    from goca_guidance.config import SCFGConfig as SCFGConfig
    from goca_guidance.explanation import explain as explain
    from goca_guidance.guider import GoCAGuidance as GoCAGuidance
    from goca_guidance.method.records import Regions as Regions
    from goca_guidance.method.records import WordMaps as WordMaps
    from goca_guidance.pipeline import GoCASCFGPipeline as GoCASCFGPipeline
    from goca_guidance.pipeline import GoCASCFGPipelineOutput as GoCASCFGPipelineOutput
    from goca_guidance.real_images.segment import Segmentation as Segmentation

__version__ = "0.1.0"

TINY_SD = str(Path(__file__).parent / "models" / "tiny-sd")
"""Folder of the embedded model, a tiny Stable Diffusion trained on synthetic scenes; see its README.md."""

_ROOMS = {
    "CRF": "config",
    "Background": "config",
    "GoCAConfig": "config",
    "GoCAGuidance": "guider",
    "GoCASCFGPipeline": "pipeline",
    "GoCASCFGPipelineOutput": "pipeline",
    "Regions": "method.records",
    "SCFGConfig": "config",
    "Segmentation": "real_images.segment",
    "WordMaps": "method.records",
    "explain": "explanation",
}
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
    "explain",
]


def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f"goca_guidance.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
