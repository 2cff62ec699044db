"""What is shown of each stage is what the stages are."""

from functools import partial

import pytest
import torch

from goca_guidance import GoCAConfig, commands, explain
from goca_guidance.cli import main
from goca_guidance.method.goca import normalise
from goca_guidance.models import SCENE
from tests.helpers.families import stock_pipeline
from tests.helpers.guided import guided


NAMES = ["cat", "dog"]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_stages_are_those_of_segmentations_with_switches(name, image):
    pipe = guided(stock_pipeline(name))
    found = explain(pipe, image, NAMES)
    for stage, config in (
        ("plain mean", GoCAConfig.vanilla(refine_order=0)),
        ("weighted", GoCAConfig(rescale=False, refine_order=0)),
        ("rescaled", GoCAConfig(refine_order=0)),
        ("refined", GoCAConfig()),
    ):
        assert torch.equal(found.stages[stage], pipe.segment(image, NAMES, goca=config).scores[0]), stage
    assert torch.equal(found.labels, pipe.segment(image, NAMES).label_maps[0])
    torch.testing.assert_close(found.heads.sum(1), torch.ones(len(found.layers)))
    torch.testing.assert_close(found.weights.sum(), torch.tensor(1.0))


def test_a_layers_maps_are_those_of_a_segmentation_by_it_alone(pipe, image):
    config = GoCAConfig(heads="uniform")
    found = explain(pipe, image, NAMES, goca=config)
    assert len(found.layers) == len(found.layer_maps) > 1
    for layer, maps in zip(found.layers, found.layer_maps, strict=True):
        alone = GoCAConfig(heads="uniform", layers=(layer,), rescale=False, refine_order=0)
        torch.testing.assert_close(normalise(maps[None], config)[0], pipe.segment(image, NAMES, goca=alone).scores[0])


@pytest.mark.parametrize("given", [{"background": 0.5}, {"num_noises": 2}])
def test_one_forward_is_explained(given, pipe, image):
    with pytest.raises(ValueError, match=r"Expected (no|one) "):
        explain(pipe, image, NAMES, **given)


@pytest.mark.parametrize("source", [["a cat on grass"], [str(SCENE), "--classes", "sheep", "water"]])
def test_command_draws_four_pictures(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_generate", partial(commands._generate, steps=2))
    assert main(["explain", *source, "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert main(["explain", str(SCENE), "--out", str(tmp_path)]) == 2
    assert "Expected --classes" in capsys.readouterr().err
