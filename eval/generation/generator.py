"""Images for captions under one of three guidances, each from noise of its own: what `eval.coco30k` does batch by batch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline, SchedulerMixin
from PIL import Image
from tqdm.auto import tqdm

from eval.common.configs import Seed, from_file
from eval.common.load import DTYPES, load_pipeline
from eval.common.processes import seed_of, slices
from eval.common.provenance import weights_digest
from eval.generation.captions import captions_of, digest_of
from eval.scenes.scene import SPLITS
from goca_guidance import TINY_SD, GoCASCFGPipeline, GoCASCFGPipelineOutput, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of
from goca_guidance.schema import Count, Positive, at_least, checked
from goca_guidance.stock import exact_arguments, guidance_arguments


METHODS: dict[str, dict] = {  # arguments of the pipeline
    "cfg": {"use_scfg": False},
    "scfg": {"scfg": SCFGConfig(segmentor="s-cfg")},
    "goca": {},
}


@checked
@dataclass(frozen=True)
class GenerationSettings:
    """The fields of a TOML file: what an image depends on.

    The negative prompt is empty, captions are read as they stand, and there is neither watermark nor safety checker: it would
    make some images black, and the papers' tools leave it out.

    Args:
        method: "cfg" (the stock pipeline), "scfg" (S-CFG with its own segmentor) or "goca" (GoCA inside S-CFG).
        captions: "scenes", or a CSV file (`eval.generation.captions`).
        split, count: which scenes.
        model: the pipeline's repository or folder.
        denoiser: a repository or folder whose `unet` or `transformer` replaces the model's.
        dtype: "float32", "float16" or "bfloat16".
        scheduler: a class of diffusers that replaces the model's own.
        guidance_scale: of guidance without regions; Flux takes it as its true guidance.
        steps: denoising steps.
        size: side of the images in pixels; None is the model's native one.
        batch: captions in a call.
        seed: noise is seeded by it and the image's id.
        one_seed: noise is seeded by `seed` alone, as T2IBenchmark's and GoCA's scripts do (which draw on the GPU, so that
            the noise itself is another).
    """

    method: Literal[*METHODS] = "goca"
    captions: str = "scenes"
    split: Literal[*SPLITS] = "test"
    count: Count = 2000
    model: str = TINY_SD
    denoiser: str | None = None
    dtype: Literal[*DTYPES] = "float32"
    scheduler: str | None = None
    guidance_scale: Positive = 5.0
    steps: Count = 50
    size: Annotated[int, at_least(8)] | None = None
    batch: Count = 8
    seed: Seed = 42
    one_seed: bool = False

    def __post_init__(self):
        if self.size is not None and self.size % 8:
            raise ValueError(f"Expected `size` to be a multiple of 8 pixels, but got {self.size}.")
        kind = getattr(diffusers, self.scheduler, None) if self.scheduler else SchedulerMixin
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ValueError(f"Expected `scheduler` to be a scheduler of diffusers, but got {self.scheduler!r}.")

    @classmethod
    def read(cls, path: Path, **changes: Any) -> "GenerationSettings":
        """From a TOML file, with some fields changed; unknown keys are an error."""
        return from_file(cls, path, **changes)

    def texts(self) -> dict[str, str]:
        """The captions by id, in the order of the ids."""
        return captions_of(self.captions, self.split, self.count)

    def described(self, texts: Mapping[str, str]) -> dict:
        """The fields, with digests of the weights and of the captions."""
        weights = " ".join(weights_digest(each) for each in (self.model, self.denoiser) if each)
        return {**asdict(self), "weights": weights, "captions_sha256": digest_of(texts)}

    def seed_of(self, name: str) -> int:
        """Seed of an image's noise."""
        return self.seed if self.one_seed else seed_of(self.seed, name)


def batches(texts: Mapping[str, str], size: int) -> list[Sequence[str]]:
    """Ids in batches, without those whose caption is empty."""
    return slices([name for name, text in texts.items() if text.strip()], size)


class Generator:
    """A pipeline with its settings; `size` is the side of its images in pixels."""

    def __init__(self, settings: GenerationSettings, device: str | torch.device | None = None):
        self.settings, self.pipe = settings, pipeline(settings, device)
        self.vae_dtype = self.pipe.vae.dtype
        side = getattr(self.pipe, "default_sample_size", None) or denoiser_of(self.pipe.components).config.sample_size
        self.size = settings.size or side * self.pipe.vae_scale_factor
        kind = type(self.pipe)
        self.arguments = {
            **guidance_arguments(kind, settings.guidance_scale),
            **exact_arguments(kind),
            **METHODS[settings.method],
        }

    def __call__(
        self, captions: Mapping[str, str], wanted: Collection[str]
    ) -> tuple[dict[str, Image.Image], dict[str, str]]:
        """Images by id, and the reasons why others failed, of the `wanted` among the captions of one batch.

        The batch is made whole, whatever is wanted of it, because the last bits of an image depend on it. What fails in the
        batch is tried once more, alone.
        """
        images, reasons = self.attempt(captions)
        if len(reasons) == len(captions) > 1:
            tqdm.write(
                f"A batch of {len(captions)} failed, each of its captions is tried alone: {min(reasons.values())}"
            )
        for name in [name for name in wanted if name in reasons]:
            again, reason = self.attempt({name: captions[name]})
            images, reasons = images | again, reasons | reason
        made = {name: images[name] for name in wanted if name in images}
        return made, {name: reasons[name] for name in wanted if name not in made}

    def attempt(self, captions: Mapping[str, str]) -> tuple[dict[str, Image.Image], dict[str, str]]:
        """Images of one batch by id, and the reasons why others failed."""
        try:
            pixels = self.pixels(captions)
        except (ValueError, RuntimeError) as error:
            self.pipe.vae.to(self.vae_dtype)  # SDXL's pipeline decodes in float32, and stays there where that fails
            return {}, dict.fromkeys(captions, str(error))
        finite = np.isfinite(pixels).all((1, 2, 3))
        whole = [name for name, fine in zip(captions, finite, strict=True) if fine]
        images = self.pipe.image_processor.numpy_to_pil(pixels[finite]) if whole else []
        reason = "Expected a finite image, but got NaN or infinity: use float32 or bfloat16."
        return dict(zip(whole, images, strict=True)), dict.fromkeys(set(captions) - set(whole), reason)

    def pixels(self, captions: Mapping[str, str]) -> np.ndarray:
        """Images in [0, 1], b H W 3."""
        return self.call(captions).images

    def call(self, captions: Mapping[str, str], **kwargs: Any) -> GoCASCFGPipelineOutput:
        """The pipeline's output for one batch; each image's noise is drawn on the CPU by a generator of its own."""
        settings = self.settings
        return self.pipe(
            list(captions.values()),
            num_inference_steps=settings.steps,
            height=self.size,
            width=self.size,
            generator=[torch.Generator().manual_seed(settings.seed_of(name)) for name in captions],
            output_type="np",
            **self.arguments,
            **kwargs,
        )


def pipeline(settings: GenerationSettings, device: str | torch.device | None = None) -> GoCASCFGPipeline:
    """The model with the denoiser and the scheduler that the settings name, without safety checker and watermark."""
    replaced: dict[str, Any] = {}
    if settings.denoiser:
        parts = DiffusionPipeline.load_config(settings.model)
        name = next((name for name in ("unet", "transformer") if name in parts), None)
        if name is None:
            raise ValueError(
                f"Expected a model with a unet or a transformer, which `denoiser` replaces, but got {settings.model}."
            )
        dtype = getattr(torch, settings.dtype)
        replaced[name] = AutoModel.from_pretrained(settings.denoiser, subfolder=name, torch_dtype=dtype)
    pipe = load_pipeline(settings.model, settings.dtype, device, **replaced)
    if getattr(pipe, "watermark", None) is not None:
        pipe.watermark = None
    if settings.scheduler:
        pipe.scheduler = getattr(diffusers, settings.scheduler).from_config(pipe.scheduler.config)
    if "safety_checker" in pipe.components:
        pipe.safety_checker = None
    return pipe
