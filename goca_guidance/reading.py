"""What a pipeline tells about real images and prompts, beside generating."""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from goca_guidance.discover import discover
from goca_guidance.families import denoiser_of, family_of, readers_of
from goca_guidance.loading import is_text_to_image, named_pipeline
from goca_guidance.segment import Segmentation, segment
from goca_guidance.tokens import named_words, read


class ReadingMixin:
    """Methods of a pipeline on real images and on prompts; the stock class follows in the order of bases."""

    components: dict[str, Any]

    def segment(self, images, classes: Sequence[str] | Sequence[Sequence[str]], **kwargs) -> Segmentation:
        """Segment real images by class names; see [`goca_guidance.segment.segment`] for the arguments."""
        return segment(self, self._reading_class(), images, classes, **kwargs)

    def discover(self, images, **kwargs) -> list[Tensor]:
        """Segment real images without names; see [`goca_guidance.discover.discover`] for the arguments."""
        return discover(self, self._reading_class(), images, **kwargs)

    def _reading_class(self):
        """The text-to-image class that runs these components."""
        stock = stock_of(type(self))
        return stock if is_text_to_image(stock) else named_pipeline(family_of(denoiser_of(self.components)))

    def words(self, prompt: str) -> dict[str, list[int]]:
        """The words of a prompt with their token positions, in the form that `region_tokens` takes."""
        family = family_of(denoiser_of(self.components))
        tokenizers = [tokenizer for _, tokenizer in readers_of(self, family)]
        limit = inspect.signature(stock_of(type(self)).__call__).parameters.get("max_sequence_length")
        longest = None if limit is None else limit.default
        return named_words(read(prompt, tokenizers, self._as_read, longest), family.sink)

    def _as_read(self, prompt: str, tokenizer) -> str:
        """The text that the stock pipeline gives to its tokenizer: cleaned (PixArt), textual inversions spelled out."""
        if hasattr(self, "_text_preprocessing"):
            prompt = self._text_preprocessing(prompt, clean_caption=True)[0]
        return self.maybe_convert_prompt(prompt, tokenizer) if hasattr(self, "maybe_convert_prompt") else prompt


def stock_of(cls: type) -> type[DiffusionPipeline]:
    """The class that does the work: the first one that is not ours."""
    return next(base for base in cls.__mro__ if not issubclass(base, ReadingMixin))
