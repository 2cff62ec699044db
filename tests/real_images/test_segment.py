"""Segmentation of real images: shapes, rules, seeds, batches, every kind of picture, every error."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from goca_guidance import Background, GoCAConfig
from goca_guidance.denoisers.adapters import family_of
from goca_guidance.method.segmentor import GoCASegmentor
from goca_guidance.real_images.load import load_image
from tests.helpers.guided import hooks_of
from tests.helpers.tiny import WORDS


CLASSES = ["cat", "potted plant", "grass"]


def test_shapes_and_range(pipe, image):
    result = pipe.segment(image, CLASSES)
    assert result.scores.shape == (1, 3, 16, 16)
    assert result.scores.dtype == torch.float32
    assert 0 <= result.scores.min() <= result.scores.max() <= 1
    assert result.label_maps[0].shape == (40, 52)
    assert result.label_maps[0].dtype == torch.int64
    assert result.classes == tuple(CLASSES)


def test_nothing_of_the_callers_is_touched(pipe, image):
    """Not even the schedule that the last generation left."""
    pipe("a cat", num_inference_steps=3, output_type="latent")
    scheduler, config, schedule = pipe.scheduler, dict(pipe.config), copy.deepcopy(vars(pipe.scheduler))
    components = dict(pipe.components)
    pipe.set_progress_bar_config(disable=False, desc="mine")
    pipe.segment(image, CLASSES)
    assert all(part is components[name] for name, part in pipe.components.items())
    assert dict(pipe.config) == config
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    assert hooks_of(pipe.unet) == hooks_of(pipe.text_encoder) == 0
    with pytest.raises(ValueError, match="among the words"):
        pipe.segment(image, CLASSES, prompt="a dog")
    assert pipe.scheduler is scheduler
    assert repr(vars(scheduler)) == repr(schedule)
    assert torch.equal(scheduler.timesteps, schedule["timesteps"])
    assert hooks_of(pipe.unet) == hooks_of(pipe.text_encoder) == 0


def test_one_forward_at_the_timestep(pipe, image):
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0].shape[0], int(args[1]))), with_kwargs=True
    )
    pipe.segment(image, CLASSES)
    assert seen == [(1, family_of(pipe.unet).preset.timestep)]
    pipe.segment(image, CLASSES, goca=GoCAConfig(timestep=70))
    pipe.segment(image, CLASSES, goca=GoCAConfig(timestep=70), timestep=80)
    assert [timestep for _, timestep in seen] == [family_of(pipe.unet).preset.timestep, 70, 80]
    seen.clear()
    pipe.segment(image, CLASSES, timestep=[50, 150], num_noises=2)
    assert seen == [(1, 50), (1, 50), (1, 150), (1, 150)]
    handle.remove()


def test_deterministic_by_seed(pipe, image):
    def scores(seed):
        return pipe.segment(image, CLASSES, generator=torch.Generator().manual_seed(seed)).scores

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))
    assert torch.equal(pipe.segment(image, CLASSES).scores, pipe.segment(image, CLASSES).scores)


def test_noises_are_averaged(pipe, image):
    generator = torch.Generator().manual_seed(3)
    singles = [pipe.segment(image, CLASSES, generator=generator).scores for _ in range(3)]
    averaged = pipe.segment(image, CLASSES, num_noises=3, generator=torch.Generator().manual_seed(3)).scores
    assert torch.allclose(averaged, torch.stack(singles).mean(0), atol=1e-5)


def test_a_batch_equals_single_images(pipe, image):
    other = image.transpose(Image.ROTATE_90)
    both = pipe.segment([image, other], CLASSES)
    for i, one in enumerate((image, other)):
        alone = pipe.segment(one, CLASSES)
        assert torch.allclose(both.scores[i], alone.scores[0], atol=1e-3)
        assert both.label_maps[i].shape == alone.label_maps[0].shape
        assert (both.label_maps[i] == alone.label_maps[0]).float().mean() > 0.99


def test_each_image_has_classes_of_its_own(pipe, image):
    """As single images have; what others have more is zero, and never wins."""
    other, own = image.transpose(Image.ROTATE_90), [CLASSES, ["dog", "sky"]]
    both = pipe.segment([image, other], own, background=0.3)
    assert both.classes == ((*CLASSES, "background"), ("dog", "sky", "background"))
    assert both.scores.shape[1] == 3
    assert not both.scores[1, 2].any()
    for i, (one, names) in enumerate(zip((image, other), own, strict=True)):
        alone = pipe.segment(one, names, background=0.3)
        assert torch.allclose(both.scores[i, : len(names)], alone.scores[0], atol=1e-3)
        assert (both.label_maps[i] == alone.label_maps[0]).float().mean() > 0.99
        assert both.label_maps[i].shape == one.size[::-1]


def test_background_entities_beside_classes_of_each_image(pipe, image):
    own = [["cat", "grass"], ["dog"]]
    prompts = ["cat, grass, sky", "dog, sky"]
    both = pipe.segment([image, image], own, prompt=prompts, background=["sky"])
    for i, names in enumerate(own):
        alone = pipe.segment(image, names, prompt=prompts[i], background=["sky"])
        assert torch.allclose(both.entities[i], alone.entities[0], atol=1e-3)
        assert torch.allclose(both.scores[i, : len(names)], alone.scores[0], atol=1e-3)


def test_a_name_of_several_phrases_averages_their_words(pipe, image):
    """Without rescaling a map is linear in its tokens' maps, up to min-max."""
    plain = GoCAConfig.vanilla(refine_order=0, blur_size=1)
    prompt = "cat, dog, grass"
    both = pipe.segment(image, ["cat, dog", "grass"], prompt=prompt, goca=plain)
    with_raw = {}
    for name in ("cat", "dog"):
        with_raw[name] = raw_scores(pipe, image, [name], prompt, plain)
    mean = (with_raw["cat"] + with_raw["dog"]) / 2
    expected = (mean - mean.min()) / (mean.max() - mean.min())
    assert both.classes == ("cat, dog", "grass")
    assert torch.allclose(both.scores[0, 0], expected, atol=1e-4)


def raw_scores(pipe, image, names, prompt, config):
    """One map before min-max."""
    seen = []

    class Raw(GoCASegmentor):
        def _scores(self, tokens, layout):
            seen.append(tokens)
            return super()._scores(tokens, layout)

    pipe.segment(image, names, prompt=prompt, goca=config, segmentor=Raw)
    return seen[0][0, 0]


def test_another_rule_on_the_same_forward(pipe, image):
    first = pipe.segment(image, CLASSES, background=0.6)
    changed = dataclasses.replace(first, background=Background(threshold=0.2))
    assert torch.equal(changed.label_maps[0], pipe.segment(image, CLASSES, background=0.2).label_maps[0])


def test_a_segmentor_of_ones_own(pipe, image):
    made = []

    class Constant:
        projected = frozenset()

        def __init__(self, config, preset, layout):
            made.append(config)
            self.layers, self.layout, self.names = frozenset(preset.text), layout, []

        def keep(self, record):
            self.names.append(record.name)

        def scores(self):
            assert self.layers <= set(self.names)
            return torch.full((1, 3, 4, 4), 0.5)

    result = pipe.segment(image, CLASSES, goca=GoCAConfig(refine_order=1), segmentor=Constant)
    assert made == [GoCAConfig(refine_order=1)]
    assert (result.scores == 0.5).all()


@pytest.mark.parametrize("layers", [["up_blocks.0.attentions.0", "mid_block"], "manual"])
def test_layers_picked_by_hand(pipe, image, layers):
    """The plain mean over some layers: as uniform weights give it where the other layers do not exist."""
    preset = family_of(pipe.unet).preset
    text = ("mid_block.attentions.0.transformer_blocks.0.attn2", "up_blocks.0.attentions.0.transformer_blocks.0.attn2")
    beside = tuple(name.replace("attn2", "attn1") for name in text)

    class Picked(GoCASegmentor):
        def __init__(self, config, preset, layout):
            super().__init__(config, dataclasses.replace(preset, text=text, self_attention=beside), layout)

    class Known(GoCASegmentor):
        def __init__(self, config, preset, layout):
            super().__init__(config, dataclasses.replace(preset, manual=text), layout)

    manual = pipe.segment(image, CLASSES, goca=GoCAConfig.vanilla(layers=layers), segmentor=Known).scores
    assert torch.equal(manual, pipe.segment(image, CLASSES, goca=GoCAConfig.vanilla(), segmentor=Picked).scores)
    assert not torch.equal(manual, pipe.segment(image, CLASSES, goca=GoCAConfig.vanilla()).scores)
    assert {*text} < {*preset.text}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("manual", r"nobody did for this one: name them, as in layers=\["),
        (["up_block.0.attention.0"], "'up_block.0.attention.0': the nearest are up_blocks.0.attentions.0, "),
        (["mid"], "'mid': the nearest are mid_block"),
    ],
)
def test_layers_that_are_not_there(pipe, image, layers, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe.segment(image, CLASSES, goca=GoCAConfig.vanilla(layers=layers))
    assert "\n" not in str(caught.value)
    assert hooks_of(pipe.unet) == 0


def test_labels_are_the_argmax_at_the_images_size(pipe, image):
    result = pipe.segment(image, CLASSES)
    big = torch.nn.functional.interpolate(result.scores, (40, 52), mode="bilinear")
    assert torch.equal(result.label_maps[0], big.argmax(1)[0])


@pytest.mark.parametrize(
    ("background", "rule"),
    [
        (0.6, lambda own, extra: torch.full_like(own[:, :1], 0.6)),
        (["sky"], lambda own, extra: extra.amax(1, keepdim=True) + 0.2),
        (Background(("sky", "red"), offset=0.1, merged=False), lambda own, extra: extra.amax(1, keepdim=True) + 0.1),
        (Background(("sky",), threshold=0.3), lambda own, extra: extra.amax(1, keepdim=True).clamp(min=0.3)),
    ],
)
def test_background_rules(pipe, image, background, rule):
    """Against the scores of a run in which the background's names are classes."""
    extra = list(Background.of(background).entities)
    result = pipe.segment(image, CLASSES, background=background)
    everything = pipe.segment(image, CLASSES + extra).scores
    resized = torch.nn.functional.interpolate(everything, (40, 52), mode="bilinear")
    own, rest = resized[:, :3], resized[:, 3:]
    expected = torch.cat([own, rule(own, rest)], 1).argmax(1)[0]
    assert result.classes == (*CLASSES, "background")
    assert torch.equal(result.label_maps[0], expected)
    assert result.scores.shape[1] == 3


def test_merged_background_entities_are_one_map(pipe, image):
    """Each one alone is as high as when it is refined by itself; together they reach one once."""
    merged = pipe.segment(image, CLASSES, background=["sky", "red"])
    each = pipe.segment(image, CLASSES, background=Background(("sky", "red"), merged=False))
    assert (merged.entities.shape[1], each.entities.shape[1]) == (1, 2)
    assert torch.allclose(merged.scores, each.scores, atol=1e-6)
    assert (each.entities.amax(1) - merged.entities[:, 0]).abs().max() > 1e-2
    one = [pipe.segment(image, CLASSES, background=Background(("sky",), merged=m)).entities for m in (True, False)]
    assert torch.allclose(*one, atol=1e-6)
    assert torch.equal(merged.label_maps[0] == len(CLASSES), _beats(merged, 0.2))


@pytest.mark.parametrize("merged", [True, False])
def test_background_entities_of_each_image(pipe, image, merged):
    """As each image alone has them; one without any has a background of zeros."""
    names = [("sky", "red"), (), ("blue",)]
    rule = Background(names, merged=merged)
    together = pipe.segment([image] * 3, CLASSES, background=rule, generator=seeds(3))
    assert together.entities.shape[1] == (1 if merged else 2)
    for row, extra in enumerate(names):
        own = Background(extra, merged=merged) if extra else None
        alone = pipe.segment(image, CLASSES, background=own, generator=seeds(1))
        assert torch.allclose(together.scores[row], alone.scores[0], atol=1e-5)
        count = alone.entities.shape[1]
        assert torch.allclose(together.entities[row, :count], alone.entities[0], atol=1e-5)
        assert not together.entities[row, count:].any()


def seeds(count):
    return [torch.Generator().manual_seed(0) for _ in range(count)]


@pytest.mark.parametrize(
    ("entities", "error", "message"),
    [
        ([["sky"], ["red"]], ValueError, "one list of background names, or one for each of the 1 images, but got 2"),
        ([["cat"]], ValueError, "cat more than once"),
        ([[" "]], ValueError, "no empty ones"),
        ([[], []], ValueError, "but got neither"),
        ([["sky"], "red"], TypeError, "`entities"),
    ],
)
def test_wrong_background_entities(pipe, image, entities, error, message):
    with pytest.raises(error, match=message):
        pipe.segment(image, CLASSES, background=Background(entities))


def _beats(result, offset):
    entities = torch.nn.functional.interpolate(result.entities, result.sizes[0], mode="bilinear") + offset
    scores = torch.nn.functional.interpolate(result.scores, result.sizes[0], mode="bilinear")
    return (entities > scores.amax(1, keepdim=True))[0, 0]


def test_one_class_is_finite(pipe, image):
    result = pipe.segment(image, ["cat"], background=0.5)
    assert torch.isfinite(result.scores).all()
    assert set(result.label_maps[0].unique().tolist()) <= {0, 1}
    assert len(result.label_maps[0].unique()) == 2


def test_other_size_and_config(pipe, image):
    result = pipe.segment(image, CLASSES, height=32, width=48, goca=GoCAConfig.vanilla())
    assert result.scores.shape == (1, 3, 16, 24)


def test_scores_have_the_working_size(pipe, image):
    found = pipe.segment(image, CLASSES, goca=GoCAConfig(working_size=8))
    assert max(found.scores.shape[-2:]) == 8
    assert found.label_maps[0].shape == (40, 52)
    assert (found.scores.amin(), found.scores.amax()) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, image, dtype):
    pipe.to(dtype=dtype)
    assert pipe.segment(image, CLASSES).scores.dtype == torch.float32


# ---- pictures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(image, mode):
    with pytest.raises(ValueError, match="8 or 16 bits"):
        load_image(image.convert("L").convert(mode))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16"])
def test_every_mode_is_read_as_rgb(pipe, image, mode, tmp_path):
    converted = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    assert load_image(converted).mode == "RGB"
    assert pipe.segment(converted, CLASSES).label_maps[0].shape == (40, 52)


def test_sixteen_bits_are_scaled():
    deep = Image.fromarray(np.full((16, 16), 32896, np.uint16))
    assert load_image(deep).getpixel((0, 0)) == (128, 128, 128)


def test_transparency_is_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert load_image(clear).getpixel((3, 3)) == (255, 255, 255)


def test_rotation_of_the_camera_is_applied(tmp_path):
    picture = Image.new("RGB", (20, 30))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotated by a quarter turn
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(tmp_path / "photo.jpg").size == (30, 20)


def test_paths_and_arrays(pipe, image, tmp_path):
    image.save(tmp_path / "a.png")
    expected = pipe.segment(image, CLASSES).scores
    assert torch.equal(pipe.segment(tmp_path / "a.png", CLASSES).scores, expected)
    assert torch.equal(pipe.segment(np.asarray(image), CLASSES).scores, expected)
    assert torch.equal(pipe.segment(np.asarray(image) / 255, CLASSES).scores, expected)


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"classes": []}, "at least one class"),
        ({"classes": ["cat", " "]}, "no empty ones"),
        ({"classes": ["cat", "cat"]}, "cat more than once"),
        ({"classes": ["cat", "Cat"]}, "cat more than once"),
        ({"generator": []}, "for each of the 1 images"),
        ({"prompt": "grass, cat"}, "'potted plant' among the words"),
        ({"classes": ["zebra", *(f"{word} cat" for word in WORDS)]}, "encoder keeps 24"),
        ({"prompt": ["cat", "dog"]}, "for each of the 1 images"),
        ({"timestep": 1000}, "timesteps from 0 to 999"),
        ({"timestep": []}, "timesteps from 0 to 999"),
        ({"height": 36}, "divisible by 8"),
        ({"num_noises": 0}, "`num_noises` to be a whole number of at least 1"),
        ({"images": Image.new("RGB", (7, 40))}, "at least 8 x 8"),
        ({"images": np.zeros((9, 9))}, "shape H W 3"),
        ({"images": np.full((9, 9, 3), 7.0)}, r"in \[0, 1\]"),
        ({"images": "nowhere.png"}, "readable image file"),
        ({"images": []}, "at least one image"),
    ],
)
def test_bad_input(pipe, image, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.segment(**{"images": image, "classes": CLASSES, **kwargs})


def test_a_string_is_not_a_list_of_classes(pipe, image):
    with pytest.raises(TypeError, match=r"`classes\[1\]` to be a list of texts, but got 'dog': use"):
        pipe.segment([image, image], [["cat"], "dog"])
    with pytest.raises(TypeError, match=r"use \['cat'\]"):
        pipe.segment(image, "cat")
    with pytest.raises(TypeError, match=r"use \['sky'\]"):
        pipe.segment(image, CLASSES, background="sky")


def test_a_broken_file(pipe, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(ValueError, match="readable image file"):
        pipe.segment(tmp_path / "broken.jpg", CLASSES)


def test_hidden_attention(pipe, image):
    pipe.enable_attention_slicing(1)
    with pytest.raises(RuntimeError, match="disable_attention_slicing"):
        pipe.segment(image, CLASSES)


def test_weights_that_are_not_finite(pipe, image):
    torch.nn.init.constant_(pipe.unet.conv_in.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipe.segment(image, CLASSES)


def test_names_that_end_in_signs(pipe, image):
    """In the default prompt, and they are other names than those without."""
    names = ["C++", "(cat)", "U.S.", "C", "dog", "2"]
    scores = pipe.segment(image, names).scores[0]
    assert len({tuple(each.flatten().tolist()) for each in scores}) == len(names)


def test_names_that_are_the_same_tokens(pipe, image):
    with pytest.raises(ValueError, match="'café' and 'cafe\u0301' are the same tokens"):
        pipe.segment(image, ["café", "cafe\u0301"])
    with pytest.raises(ValueError, match=r"no empty ones, but got .*xa0"):
        pipe.segment(image, ["\u00a0", "cat"])
