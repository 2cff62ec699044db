"""Training resumes bit for bit, keeps what it has learned so far, and refuses a folder of another training."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from eval import train_tiny
from eval.scenes.scene import GROUNDS
from eval.scenes.tokenizers import caption_words, clip_tokenizer, t5_tokenizer
from eval.training import data, stage
from eval.training.specs import SPECS
from tests.helpers.tiny import tiny_components


class Small(SPECS["tiny-unet"].learner):
    """The spec's learner with the smallest U-Net that has its attention."""

    def __init__(self):
        super().__init__()
        self.unet = tiny_components(cross_attention_dim=64)["unet"]


def small_autoencoder():
    return train_tiny.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(run, stage, *more)`: the program with small networks, in a folder of the test."""
    spec = replace(SPECS["tiny-unet"], learner=Small, sizes=(64, 128), place=tmp_path / "shipped")
    monkeypatch.setitem(SPECS, "tiny-unet", spec)
    monkeypatch.setattr(train_tiny, "autoencoder", small_autoencoder)

    def run(folder, model, *more):
        given = f"{model} --run {tmp_path / folder / 'training'} --scenes 8 --batch 4 --every 2 --mixed-precision no --steps 4"
        train_tiny.main([*given.split(), *more])
        return tmp_path / folder

    return run


def test_training_resumes_exactly_and_ships(train, tmp_path, monkeypatch):
    """A run killed after its first checkpoint and started again ends with the very weights of an unbroken one."""
    save = stage.Stage.save
    for model in ("vae", "tiny-unet"):
        train("whole", model)
        with monkeypatch.context() as killed:
            killed.setattr(stage.Stage, "save", lambda self: (save(self), 1 / 0))
            with pytest.raises(ZeroDivisionError):
                train("killed", model)
        train("killed", model)
    whole, resumed = (
        load_file(tmp_path / run / "training" / "tiny-unet" / "checkpoint" / "model.safetensors")
        for run in ("whole", "killed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = (tmp_path / "killed" / "training" / "tiny-unet" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "4"]
    kept = sorted(path.name for path in (tmp_path / "whole" / "checkpoints" / "tiny-unet").iterdir())
    assert kept == ["100", "25", "50"]  # ten per cent of four steps are the twenty-fifth's
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "README.md").write_text("written by hand")
    monkeypatch.setattr(train_tiny, "samples", lambda place, spec, seed: None)
    train("whole", "tiny-unet", "--ship")
    assert DiffusionPipeline.from_pretrained(tmp_path / "shipped").unet.dtype == torch.float32
    assert (tmp_path / "shipped" / "README.md").read_text() == "written by hand"
    assert not list(tmp_path.rglob(".part-*"))
    with pytest.raises(ValueError, match="to be of this training, but it has seed 0, not 1: name another --run"):
        train("whole", "tiny-unet", "--seed", "1")
    (tmp_path / "whole" / "training" / "tiny-unet" / "checkpoint" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"Expected a whole checkpoint in .*checkpoint, but got .*: remove it"):
        train("whole", "tiny-unet")


@pytest.mark.parametrize("name", SPECS)
def test_learners_predict_what_the_stock_pipeline_loads(name, tmp_path):
    """Every loss is finite and reaches every weight that learns, and an export gives the stock pipeline the same networks."""
    torch.manual_seed(0)
    learner = SPECS[name].learner()
    tokens = learner.tokenized(["a cat on grass", ""])
    found = learner(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), tokens)
    assert found.shape == (2,)
    assert 0.1 < found.mean() < 20
    found.sum().backward()
    silent = [path for path, weight in learner.named_parameters() if weight.requires_grad and weight.grad is None]
    assert all("final_layer_norm" in path or "position" in path for path in silent), silent
    small_autoencoder().save_pretrained(tmp_path / "vae")
    train_tiny.export(learner, SPECS[name], tmp_path / "vae", tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe) is SPECS[name].pipeline
    assert not [path for path in (tmp_path / "model").rglob("*.json") if str(tmp_path) in path.read_text()]
    for part, network in learner.named_children():
        loaded = getattr(pipe, part).state_dict()
        assert all(torch.allclose(loaded[key], value, atol=1e-2) for key, value in network.state_dict().items())
    assert [tokenizer("cat, tv monitor").input_ids for tokenizer in learner.tokenizers.values()] == [
        getattr(pipe, part)("cat, tv monitor").input_ids for part in learner.tokenizers
    ]


def test_captions_of_all_levels_and_some_without_ground():
    found = [data.learned_scene("train", 64, index)[1] for index in range(60)]
    assert any(text.count(",") >= 3 for text in found)
    assert 0 < sum(not any(ground in text for ground in GROUNDS) for text in found) < 30
    images, captions = next(iter(data.drawn("validation", 64, 3)))
    assert images.shape == (3, 3, 64, 64)
    assert captions == [data.learned_scene("validation", 64, index)[1] for index in range(3)]


@pytest.mark.parametrize("tokenizer", [clip_tokenizer, t5_tokenizer])
def test_every_caption_word_is_one_token(tokenizer):
    found = tokenizer(caption_words(), 32)
    assert all(len(found.tokenize(word)) == 1 for word in caption_words())
    assert len(found.tokenize("zebra")) > 1


def test_the_pooled_text_of_flux_is_mute():
    """Else it tells the objects without any word being looked at; also where a training begins with weights that spoke."""
    learner, ids = SPECS["tiny-flux"].learner(), torch.tensor([[1, 5, 6, 2]])
    assert not learner.text_encoder(ids).pooler_output.any()
    parts = {name: deepcopy(part) for name, part in learner.named_children()}
    torch.nn.init.ones_(parts["text_encoder"].final_layer_norm.weight)
    assert parts["text_encoder"](ids).pooler_output.any()
    learner.begin(parts)
    assert not learner.text_encoder(ids).pooler_output.any()
