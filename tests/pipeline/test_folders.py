"""Checkpoint folders and files: what is wrong with a damaged one is named, in one line, before anything is loaded."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from goca_guidance import TINY_SD, GoCASCFGPipeline, stock
from goca_guidance.pipeline import guided
from tests.helpers.original_names import original
from tests.helpers.tiny import generate


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edit(name, change):
    def edited(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edited


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("model_index.json", "[]"), r"Expected a mapping in .*model_index.json', but got \[\]"),
        (write("model_index.json", "{}"), r"Expected the pipeline's class \(`_class_name`\)"),
        (write("model_index.json", '{"_class_name": "Stable'), "Expected JSON in .*model_index.json"),
        (write("model_index.json", "null"), "Expected a mapping in .*model_index.json', but got None"),
        (edit("model_index.json", lambda index: index.update(_class_name=3)), r"Expected the pipeline's class"),
        (edit("model_index.json", lambda index: index.update(_class_name="Unheard")), "names 'Unheard'"),
        (edit("model_index.json", lambda index: index.update(unet=["diffusers"])), "a library and a class for unet"),
        (edit("model_index.json", lambda index: index.update(unet=[1, 2])), "a library and a class for unet"),
        (drop("tokenizer/tokenizer.json"), "lacks tokenizer/tokenizer.json"),
        (write("unet/diffusion_pytorch_model.safetensors.index.json", "{}"), "Expected a `weight_map` in"),
        (write("unet/diffusion_pytorch_model.safetensors.index.json", "[]"), "Expected a mapping in"),
        (write("unet/diffusion_pytorch_model.safetensors.index.json", "{"), "Expected JSON in"),
        (write("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": 1}}'), "a `weight_map`"),
        (lambda folder: cut(folder / "unet/diffusion_pytorch_model.safetensors"), r"lacks a whole unet/diffusion_.* \("),
        (write("vae/diffusion_pytorch_model.safetensors", ""), r"lacks a whole vae/diffusion_.* \("),
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", [lambda pipe: GoCASCFGPipeline, type])
def test_a_damaged_folder(pipe, door, damage, message, tmp_path):
    pipe.save_pretrained(tmp_path)
    if not list((tmp_path / "tokenizer").glob("tokenizer.json")):
        pytest.skip("this tokenizer is saved otherwise")
    damage(tmp_path)
    if "Unheard" in message and door is type:
        return  # the class is chosen already
    with pytest.raises(ValueError, match=message) as told:
        door(pipe).from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


def test_weights_that_are_not_asked_for_may_be_damaged(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").write_text("a pointer")
    assert GoCASCFGPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks a whole unet/diffusion_pytorch_model.fp16.safetensors"):
        GoCASCFGPipeline.from_pretrained(tmp_path, variant="fp16")


# ---- checkpoints of one file -----------------------------------------------------------------------------------------
@pytest.fixture
def single_file(pipe, tmp_path):
    """The U-Net's weights in a file, as most fine-tunes come, and a folder with the rest."""
    pipe.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(pipe.unet.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("door", [lambda pipe: GoCASCFGPipeline, type])
def test_a_single_file(pipe, single_file, door):
    parts = {"vae": pipe.vae, "text_encoder": pipe.text_encoder}
    loaded = door(pipe).from_single_file(single_file, config=str(single_file.parent / "folder"), **parts)
    assert type(loaded) is type(pipe)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded).images, generate(pipe).images)


def test_the_weights_say_which_pipeline_it_is(single_file, monkeypatch):
    """Diffusers tells it by them, and the configuration that it names by its class."""
    config = {"pretrained_model_name_or_path": str(single_file.parent / "folder")}
    monkeypatch.setattr(
        stock, "fetch_diffusers_config", lambda weights: config if "conv_in.weight" in weights else None
    )
    assert stock.single_file_class(single_file) is diffusers.StableDiffusionPipeline


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_of_the_original_names(suffix, tmp_path):
    """Those in which most checkpoints are passed on."""
    pipe = guided(diffusers.StableDiffusionPipeline).from_pretrained(TINY_SD)
    file, weights = tmp_path / f"model.{suffix}", original(pipe)
    save_file(weights, file) if suffix == "safetensors" else torch.save({"state_dict": weights}, file)
    loaded = GoCASCFGPipeline.from_single_file(file, config=TINY_SD)
    for each in (loaded, pipe):
        each.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert torch.equal(generate(loaded).images, generate(pipe).images)


@pytest.mark.parametrize("config", [None, "owner/nothing", "nowhere"])
def test_a_configuration_that_cannot_be_had(single_file, config, monkeypatch):
    """Without a network; the one that the weights are like, or one that is given."""
    monkeypatch.setattr(
        stock, "fetch_diffusers_config", lambda weights: {"pretrained_model_name_or_path": "owner/like"}
    )
    with pytest.raises(ValueError, match=rf"in '{config or 'owner/like'}', but .* pass `config`, a folder") as told:
        GoCASCFGPipeline.from_single_file(single_file, config=config, local_files_only=True)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda file: GoCASCFGPipeline.from_single_file("nowhere.safetensors"), "but got 'nowhere.safetensors'"),
        (lambda file: cut(file) or GoCASCFGPipeline.from_single_file(file), "Expected a whole checkpoint"),
        (lambda file: GoCASCFGPipeline.from_single_file(file, custom_pipeline="x"), "Expected no `custom_pipeline`"),
        (lambda file: guided(diffusers.PixArtSigmaPipeline).from_single_file(file), "loads from one file, but"),
    ],
)  # fmt: skip
def test_mistakes_with_a_single_file(single_file, call, message):
    with pytest.raises(ValueError, match=message) as told:
        call(single_file)
    assert "\n" not in str(told.value)
