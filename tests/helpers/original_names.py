"""Stable Diffusion's weights under the names that its authors' code gave them, in which most checkpoints are passed on."""

import re

from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from torch import Tensor


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # the autoencoder's


def original(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline, as one checkpoint."""
    found = {f"model.diffusion_model.{_unet(name, pipe.unet.config)}": x for name, x in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    for name, x in pipe.vae.state_dict().items():
        of_attention = ".attentions." in name and x.ndim == 2
        found[f"first_stage_model.{_vae(name, blocks)}"] = x[..., None, None] if of_attention else x
    for name, x in pipe.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = x
    return {name: x.contiguous() for name, x in found.items()}


def _changed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def _unet(name: str, config) -> str:
    """Blocks are numbered through, and a resampling is a block, or a part of one."""
    if name in DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]:
        return DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"][name]
    way, place, kind, number, rest = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name).groups()
    first, number, size = int(place or 0), int(number), config.layers_per_block + 1
    part = {"resnets": 0, "attentions": 1, "upsamplers": 2}.get(kind)
    rest = _changed(rest, RESNET) if kind == "resnets" else rest
    if way == "mid":
        return f"middle_block.{2 * number if part == 0 else 1}.{rest}"
    if way == "up":
        return f"output_blocks.{first * size + (size - 1 if part == 2 else number)}.{part}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(first + 1) * size}.0.{rest.replace('conv.', 'op.')}"
    return f"input_blocks.{1 + first * size + number}.{part}.{rest}"


def _vae(name: str, blocks: int) -> str:
    """Up blocks are numbered from the finest on."""
    name = DIFFUSERS_TO_LDM_MAPPING["vae"].get(name, name).replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{blocks - 1 - int(m[1])}.", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0", "sample")
    return _changed(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION if "mid_block" in name else {})
