"""What travels between the rooms: frozen, shape-typed dataclasses.

One axis legend for the project: `b` image, `h` head, `p` pixel token (row-major H*W), `n` key token (text or pixel),
`m` observed text token, `d` head channel, `c` channel, `l` layer, `k` region, `H W` map size.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class AttentionRecord:
    """One attention call of a denoiser, exactly as the kernel saw it (after query/key norms and rotary embeddings).

    Shapes: `query` b h p d, `key` and `value` b h n d, `output` b h p d (before the output projection), `mask` additive,
    broadcastable to b h p n, or None. The probabilities are never stored: they are recomputed where they are needed.
    """

    name: str
    query: Float[Tensor, "b h p d"]
    key: Float[Tensor, "b h n d"]
    value: Float[Tensor, "b h n d"] | None
    output: Float[Tensor, "b h p d"] | None
    scale: float
    grid: tuple[int, int]
    mask: Float[Tensor, "..."] | None = None
    projection: Float[Tensor, "c e"] | None = None

    def branch(self, index: int) -> "AttentionRecord":
        """The unconditional (0) or conditional (1) half of a classifier-free-guidance batch."""

        def half(x):
            return x.chunk(2)[index]

        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else half(self.mask)
        tensors = {field: half(getattr(self, field)) for field in ("query", "key", "value", "output")}
        return replace(self, mask=mask, **tensors)

    def queries_and_keys(self) -> "AttentionRecord":
        """What the attention map depends on; value, output and projection are let go."""
        return replace(self, value=None, output=None, projection=None)


@dataclass(frozen=True)
class TokenLayout:
    """Which text tokens are observed, and how they form named regions, for each image of a batch.

    `columns` b m: positions of the observed tokens in the text sequence. `groups` b m k: column k averages the tokens of
    region k; an all-zero column is padding, for prompts of the batch with fewer regions. `content` b m: tokens whose sum
    divides in per-pixel rescaling (a special token such as `<sos>` can be a region without being content).
    """

    labels: tuple[tuple[str, ...], ...]
    columns: Int[Tensor, "b m"]
    groups: Float[Tensor, "b m k"]
    content: Bool[Tensor, "b m"]

    @property
    def present(self) -> Bool[Tensor, "b k"]:
        """Regions that a prompt really has."""
        return self.groups.sum(1) > 0

    def to(self, device) -> "TokenLayout":
        return TokenLayout(self.labels, *(x.to(device) for x in (self.columns, self.groups, self.content)))

    def repeat(self, times: int) -> "TokenLayout":
        """Each image `times` times in a row, as `num_images_per_prompt` does."""
        labels = tuple(names for names in self.labels for _ in range(times))
        tensors = (x.repeat_interleave(times, 0) for x in (self.columns, self.groups, self.content))
        return TokenLayout(labels, *tensors)


@dataclass(frozen=True)
class Regions:
    """A partition of every image into named regions, and its foreground.

    `masks` b k H W: exactly one region is true at each pixel. `foreground` b 1 H W. `labels[i][k]` names region k of
    image i; a region beyond the end of `labels[i]` is padding and empty.
    """

    masks: Bool[Tensor, "b k H W"]
    foreground: Bool[Tensor, "b 1 H W"]
    labels: tuple[tuple[str, ...], ...]

    def to(self, device) -> "Regions":
        return Regions(self.masks.to(device), self.foreground.to(device), self.labels)


@dataclass(frozen=True)
class Segmentation:
    """Segmentation of real images.

    `scores` b k H W: float32 in [0, 1] at the working size, one map per class (background not included).
    `label_maps`: one H W int64 tensor per image, at that image's own size: an index into `classes`.
    `classes`: the names; "background" is the last one where a background rule was given.
    """

    scores: Float[Tensor, "b k H W"]
    label_maps: list[Int[Tensor, "_ _"]]
    classes: tuple[str, ...]
