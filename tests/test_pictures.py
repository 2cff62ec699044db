"""Pictures of regions: of an image over its steps, of a video as film strips and as an animation."""

import numpy as np
import pytest
import torch
from PIL import Image

from goca_guidance import pictures
from goca_guidance.method.records import Regions


def regions(*size: int, seed: int = 0) -> Regions:
    g = torch.Generator().manual_seed(seed)
    cat = torch.rand(1, 1, *size, generator=g) < 0.5
    return Regions(torch.cat([cat, ~cat], 1), torch.rand(1, 1, *size, generator=g) < 0.5, (("cat", "grass"),))


def titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes]


def test_a_strip_of_steps():
    figure = pictures.region_strip([regions(4, 6, seed=i) for i in range(9)], columns=3)
    assert titles(figure) == ["step 1", "step 5", "step 9"]


def test_film_strips_of_a_video():
    videos = [regions(5, 4, 6, seed=i) for i in range(2)]
    figure = pictures.region_strip(videos, columns=3)
    assert titles(figure) == [f"step {step}, frame {frame}" for step in (1, 2) for frame in (1, 3, 5)]
    alone = Regions(videos[1].masks[:, :, 2], videos[1].foreground[:, :, 2], videos[1].labels)
    assert np.array_equal(figure.axes[4].get_images()[0].get_array(), pictures.painted_regions(alone))
    assert titles(pictures.region_strip(videos[:1], columns=2)) == ["frame 1", "frame 5"]


def test_a_video_is_animated(tmp_path):
    frames = pictures.region_frames(regions(5, 4, 6))
    with Image.open(pictures.save(frames, tmp_path / "regions.gif")) as animation:
        assert animation.n_frames == 5  # the last one stays: Pillow joins what is equal
        assert animation.size == frames[0].size
    assert len({frame.tobytes() for frame in frames}) == 5


def test_an_image_is_not_animated():
    with pytest.raises(ValueError, match=r"^Expected regions of a video, but got masks of shape \(1, 2, 4, 6\)"):
        pictures.region_frames(regions(4, 6))
