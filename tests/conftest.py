"""No network, quiet libraries, and a tiny real Stable Diffusion built in code."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import tests.helpers.checker  # noqa: F401  before what it checks
from goca_guidance import GoCASCFGPipeline
from tests.helpers.tiny import tiny_components


torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()


@pytest.fixture
def pipe() -> GoCASCFGPipeline:
    """Our pipeline on tiny random weights, the same at every call."""
    pipe = GoCASCFGPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def image() -> Image.Image:
    """A picture of noise, wider than high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
