"""Image tags without ground truth: open_clip says which of a benchmark's classes an image shows (zero-shot)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from eval.common.load import load_open_clip
from eval.prompts.phrases import BACKGROUND
from eval.prompts.sources import Source, joined
from goca_guidance.schema import Bound, above, checked


UP_TO_1 = Bound("and up to 1", lambda value: value <= 1)


@checked
class Tagger(Source):
    """Prompts of the classes that CLIP (arXiv 2103.00020, section 3.1) finds in an image; the ground truth is not read.

    A class is compared as "a photo of a {class}". The probabilities are the softmax over all classes but "background", at
    the model's own temperature; every class of at least `threshold` is a tag, and the most probable one always is.

    `pretrained` is a tag of `open_clip.list_pretrained()`, or the path of a checkpoint. None builds random weights.
    Checkpoints that OpenAI trained need a model name that ends in "-quickgelu", where they are given by path.
    """

    def __init__(
        self,
        classes: Sequence[str],
        model: str = "ViT-B-32",
        pretrained: str | None = "openai",
        threshold: Annotated[float, above(0), UP_TO_1] = 0.1,
        device: str | torch.device = "cpu",
    ):
        super().__init__(classes)
        self.threshold, self.device = threshold, torch.device(device)
        self.labels = [label for label, name in enumerate(self.names) if name != BACKGROUND]
        self.model, self.preprocess, tokenizer = load_open_clip(model, pretrained, self.device)
        with torch.inference_mode():
            tokens = tokenizer([f"a photo of a {self.names[label]}" for label in self.labels]).to(self.device)
            self.text = self.model.encode_text(tokens, normalize=True)

    def __call__(self, sample_id, image, present):
        return joined(self.entities(self.tags(self.probabilities(image))))

    @torch.inference_mode()
    def probabilities(self, image) -> Float[Tensor, " k"]:
        """Probability of each class of `labels`; they sum to one."""
        pixels = self.preprocess(image.convert("RGB"))[None].to(self.device)
        features = self.model.encode_image(pixels, normalize=True)
        return (self.model.logit_scale.exp() * features @ self.text.mT)[0].float().softmax(-1)

    def tags(self, probabilities: Float[Tensor, " k"]) -> list[int]:
        """Labels of the tags, in the classes' order."""
        chosen = probabilities >= min(self.threshold, float(probabilities.max()))
        return [label for label, keep in zip(self.labels, chosen.tolist(), strict=True) if keep]
