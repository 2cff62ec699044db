"""What travels between the rooms: frozen, shape-typed dataclasses.

One axis legend for the project: `b` image, `h` head, `p` pixel token (row-major), `n` key token (text, pixel or both),
`m` observed text token, `d` head channel, `c` channel, `l` layer, `k` region, `*S` map size: `H W`, of a video `F H W`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class AttentionView:
    """What the tokens of one attention call are.

    `grid`: height and width of the pixel queries; of a video frames, height and width. `text`, `image`: which keys are text
    and which are pixels. A call with both is joint attention, whose queries are laid out as its keys, or are the pixels alone.
    `order` b n: for each image the tokens of the call in the order of the view, where images are laid out differently.
    `queries`: which ones are the pixels, where that does not follow.
    """

    grid: tuple[int, ...]
    text: slice = field(default_factory=lambda: slice(0, 0))
    image: slice = field(default_factory=lambda: slice(0, 0))
    order: Int[Tensor, "b n"] | None = None
    queries: slice | None = None

    @property
    def video(self) -> bool:
        """Whether there are frames."""
        return len(self.grid) == 3

    @property
    def joint(self) -> bool:
        """Whether text and pixels attend to each other in one call."""
        return self.text.stop > self.text.start and self.image.stop > self.image.start


@dataclass(frozen=True)
class AttentionRecord:
    """One attention call of a denoiser, exactly as the kernel saw it (after query/key norms and rotary embeddings).

    Shapes: `query` b h p d (pixel queries only), `key` and `value` b h n d, `output` b h p d (before the output
    projection), `mask` additive, broadcastable to b h p n, or None. `gram`: W W^T of the output projection W [h*d c]
    without bias, over its largest entry. `features` b h p d: the query before norm and rotary
    embeddings, where the observer was asked for it, else None. `lse` b h p, float32: natural logarithm of the sum over all
    keys of exp(scale q k + mask), where the kernel told it. The probabilities are never stored: they are recomputed
    where they are needed, and their softmax runs over all keys.
    """

    name: str
    query: Float[Tensor, "b h p d"]
    key: Float[Tensor, "b h n d"]
    value: Float[Tensor, "b h n d"] | None
    output: Float[Tensor, "b h p d"] | None
    scale: float
    view: AttentionView
    mask: Float[Tensor, "..."] | None = None
    gram: Float[Tensor, "hd hd"] | None = None
    features: Float[Tensor, "b h p d"] | None = None
    lse: Float[Tensor, "b h p"] | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Size of the pixel queries, see `AttentionView`."""
        return self.view.grid

    def branch(self, index: int, branches: tuple[int, ...] = (0, 1)) -> "AttentionRecord":
        """The unconditional (0) or conditional (1) half of a classifier-free-guidance batch.

        A record of one prediction, as `branches` may tell, is itself that half.
        """
        if len(branches) == 1:
            return self

        def half(x):
            return None if x is None else x.chunk(2)[branches.index(index)]

        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else half(self.mask)
        tensors = {name: half(getattr(self, name)) for name in ("query", "key", "value", "output", "features", "lse")}
        return replace(self, mask=mask, **tensors)

    def at(self, grid: tuple[int, ...], rows: Int[Tensor, " rows"]) -> "AttentionRecord":
        """Of the queries those `rows` only, which form `grid`; the keys stay."""
        mask = self.mask if self.mask is None or self.mask.shape[-2] == 1 else self.mask[:, :, rows]
        pixels = {name: getattr(self, name) for name in ("query", "output", "features", "lse")}
        tensors: dict[str, Any] = {name: None if x is None else x[:, :, rows] for name, x in pixels.items()}
        return replace(self, mask=mask, view=replace(self.view, grid=grid), **tensors)

    def float(self) -> "AttentionRecord":
        """Queries, keys and mask in float32."""
        mask = None if self.mask is None else self.mask.float()
        return replace(self, query=self.query.float(), key=self.key.float(), mask=mask)

    def only(self, *needed: str) -> "AttentionRecord":
        """Query, key, mask, log-sum-exp and what else is `needed`; everything else is let go."""
        others: dict[str, Any] = {n: None for n in ("value", "output", "gram", "features") if n not in needed}
        return replace(self, **others)

    def alone(self) -> "AttentionRecord":
        """For keeping: no tensor shares memory with what is let go."""
        tensors = {name: getattr(self, name) for name in ("query", "key", "output", "lse")}
        alone: dict[str, Any] = {name: None if x is None else _alone(x) for name, x in tensors.items()}
        return replace(self, **alone)


def _alone(x: Tensor) -> Tensor:
    """A copy where `x` is a part of something larger, which it would keep alive."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


@dataclass(frozen=True)
class TokenLayout:
    """Which text tokens are observed, and how they form named regions, for each image of a batch.

    `columns` b m: positions of the observed tokens in the text sequence. `groups` b m k: column k averages the tokens of
    region k; an all-zero column is padding, for prompts of the batch with fewer regions. `content` b m: tokens whose sum
    divides in per-pixel rescaling (a special token such as `<sos>` can be a region without being content). `sink` b s:
    position of the token that looks at the background, or nothing (s = 0) where no foreground is asked for. The first
    `background` regions are background entities, whose highest map is one score.
    """

    labels: tuple[tuple[str, ...], ...]
    columns: Int[Tensor, "b m"]
    groups: Float[Tensor, "b m k"]
    content: Bool[Tensor, "b m"]
    sink: Int[Tensor, "b s"]
    background: int = 0

    @property
    def present(self) -> Bool[Tensor, "b k"]:
        """Regions that a prompt really has."""
        return self.groups.sum(1) > 0

    @cached_property
    def alone(self) -> bool:
        """Whether an image has a single region of content, which nothing rescales."""
        return bool((((self.groups > 0) & self.content[..., None]).any(1).sum(-1) < 2).any())

    def to(self, device) -> "TokenLayout":
        return self._map(self.labels, lambda x: x.to(device))

    def repeat(self, times: int) -> "TokenLayout":
        """Each image `times` times in a row, as `num_images_per_prompt` does."""
        labels = tuple(names for names in self.labels for _ in range(times))
        return self._map(labels, lambda x: x.repeat_interleave(times, 0))

    @cached_property
    def with_sink_as_region(self) -> "TokenLayout":
        """The sink token observed too, and as the last region, which is no content: once for all steps of a call."""
        s, (_, m, k) = self.sink.shape[1], self.groups.shape
        groups = F.pad(self.groups, (0, s, 0, s))
        groups[:, m:, k:] = torch.eye(s, dtype=groups.dtype, device=groups.device)
        columns, content = torch.cat([self.columns, self.sink], 1), F.pad(self.content, (0, s))
        return replace(self, columns=columns, groups=groups, content=content)

    def _map(self, labels, change) -> "TokenLayout":
        tensors = {name: change(getattr(self, name)) for name in ("columns", "groups", "content", "sink")}
        return replace(self, labels=labels, **tensors)


@dataclass(frozen=True)
class Regions:
    """A partition of every image into named regions, and its foreground.

    `masks` b k H W, of a video b k F H W: exactly one region is true at each pixel. `foreground` b 1 *S. `labels[i][k]` names
    region k of image i; a region beyond the end of `labels[i]` is padding and empty.
    """

    masks: Bool[Tensor, "b k *S"]
    foreground: Bool[Tensor, "b 1 *S"]
    labels: tuple[tuple[str, ...], ...]

    def to(self, device) -> "Regions":
        return Regions(self.masks.to(device), self.foreground.to(device), self.labels)

    def of_videos(self, frames: int) -> "Regions":
        """Those of videos, whose frames were images in a row: b k H W becomes b k F H W."""
        return Regions(_in_videos(self.masks, frames), _in_videos(self.foreground, frames), self.labels[::frames])

    def of(self, image: int) -> "Regions":
        """Those of one image."""
        one = slice(image, image + 1)
        return Regions(self.masks[one], self.foreground[one], self.labels[one])


@dataclass(frozen=True)
class WordMaps:
    """Where the words of a prompt act: `scores` b k H W, of a video b k F H W, float32 in [0, 1].

    `labels[i][k]` names map k of image i. A map beyond the end of `labels[i]` is padding.
    """

    scores: Float[Tensor, "b k *S"]
    labels: tuple[tuple[str, ...], ...]

    def of_videos(self, frames: int) -> "WordMaps":
        """Those of videos, whose frames were images in a row."""
        return WordMaps(_in_videos(self.scores, frames), self.labels[::frames])


def _in_videos(maps: Tensor, frames: int) -> Tensor:
    return maps.unflatten(0, (-1, frames)).transpose(1, 2)
