"""Rows of the table of features: what the prompts are, and how many."""

import inspect

import torch

from goca_guidance import GoCAConfig
from tests.features.checks import (
    ABSENT,
    WORKS,
    check,
    feature,
    like_denoiser,
    refused_by_diffusers,
    takes,
    works,
)
from tests.helpers.families import FAMILIES, MAX_TOKENS, run, stock_pipeline
from tests.helpers.guided import PROMPT, guided


@feature("Batch of prompts")
def batch(name):
    found = check(name, prompt=["a cat on grass", "a dog"])
    assert [labels[:2] for labels in found.guided.regions[0].labels] in (
        [("cat", "grass"), ("dog", "<sos>")],
        [("cat", "grass"), ("dog",)],
    )
    return WORKS


@feature("Several images per prompt")
def images_per_prompt(name):
    found = check(name, num_images_per_prompt=2)
    assert len(found.guided.regions[0].labels) == len(found.guided.regions[0].masks) == 2
    return WORKS


@feature("Size that is not square")
def size(name):
    width = FAMILIES[name].call["width"] * 3 // 2
    found = check(name, width=width)
    expected = FAMILIES[name].call["height"], width
    assert tuple(side * found.pipe.vae_scale_factor for side in found.guided.regions[0].masks.shape[2:]) == expected
    return WORKS


@feature("Negative prompt")
def negative_prompt(name):
    assert "dog" not in check(name, negative_prompt="a dog").labels
    return WORKS


@feature("Word maps of the negative prompt")
def negative_maps(name):
    found = check(name, negative_prompt="a dog", ours={"output_negative_maps": True})
    assert [maps.labels for maps in found.guided.negative_maps] == [(("dog",),)] * 2
    assert all(maps.scores.min() == 0 and maps.scores.max() == 1 for maps in found.guided.negative_maps)
    assert torch.equal(found.guided.images, run(found.pipe, name, negative_prompt="a dog").images)
    return WORKS


@feature("A prompt for each encoder")
def prompts(name):
    """Regions come from the encoders whose tokens the denoiser sees."""
    if not takes(name, "prompt_2"):
        return ABSENT
    found = check(name, prompt_2="a dog", **({"prompt_3": "a bus"} if takes(name, "prompt_3") else {}))
    words = {"sdxl": ["cat", "grass"], "flux": ["dog"], "sd3": ["cat", "grass", "bus"]}
    assert [label for label in found.labels if label != "<sos>"] == words[name]
    return WORKS


@feature("Prompt that the encoder cuts")
def long_prompt(name):
    found = check(name, prompt=PROMPT + " and a dog" * 100)
    assert found.labels[:3] == ("cat", "grass", "dog")
    assert 3 < len(found.labels) < 102
    return WORKS


@feature("One encoder missing (SD3's T5, the first of an XL refiner)")
def missing_encoder(name):
    gone = {"sdxl": ("text_encoder", "tokenizer"), "sd3": ("text_encoder_3", "tokenizer_3")}.get(name)
    if gone is None:
        stock = stock_pipeline(name, text_encoder=None)
        return refused_by_diffusers("'NoneType' object", "every encoder is needed", lambda: run(stock, name))
    changes = like_denoiser(name, cross_attention_dim=32) if name == "sdxl" else {}
    return works(name, stock=stock_pipeline(name, **dict.fromkeys(gone), **changes))


@feature("Prompt embeddings, no encoder loaded")
def prompt_embeddings(name):
    """With the words' positions, the regions are those of the prompt itself."""
    pipe = guided(stock_pipeline(name))
    words, call = pipe.words(PROMPT), _embeddings(pipe, name)
    encoders = [part for part in pipe.components if part.startswith("text_encoder")]
    found = check(name, stock=stock_pipeline(name, **dict.fromkeys(encoders)), ours={"region_tokens": words}, **call)
    text = {"negative_prompt": "a dog", "goca": GoCAConfig(drop_stop_words=False)}
    for ours, read in zip(found.guided.regions, run(pipe, name, output_regions=True, **text).regions, strict=True):
        assert ours.labels == read.labels
        assert torch.equal(ours.masks, read.masks)
    return WORKS


@feature("Weighted words (scaled embeddings)")
def weighted_words(name):
    stock = stock_pipeline(name)
    words, call = guided(stock).words(PROMPT), _embeddings(stock, name)
    before = run(stock, name, **call).images
    call["prompt_embeds"][:, words["cat"][0]] *= 1.5
    found = check(name, stock=stock, ours={"region_tokens": words}, **call)
    assert not torch.equal(found.expected, before)
    return WORKS


@feature("Skipped CLIP layers (`clip_skip`)")
def clip_skip(name):
    if not takes(name, "clip_skip"):
        return ABSENT
    if name == "sd":
        stock = stock_pipeline(name)
        reason = "it asks for a module that transformers 5 removed"
        return refused_by_diffusers("no attribute 'text_model'", reason, lambda: run(stock, name, clip_skip=1))
    return works(name, clip_skip=1)


@feature("Textual inversion of several vectors")
def textual_inversion(name):
    """One word, found by `words` where the encoders read it."""
    stock = stock_pipeline(name)
    if not hasattr(stock, "load_textual_inversion"):
        return ABSENT
    torch.manual_seed(1)
    for suffix in [suffix for suffix in ("", "_2") if f"tokenizer{suffix}" in stock.components]:
        model, tokenizer = stock.components[f"text_encoder{suffix}"], stock.components[f"tokenizer{suffix}"]
        vectors = {"<toy>": torch.randn(3, model.config.hidden_size)}
        stock.load_textual_inversion(vectors, text_encoder=model, tokenizer=tokenizer)
    found = check(name, stock=stock, prompt="a <toy> on grass")
    assert found.labels[:2] == ("<toy>", "grass")
    words = found.pipe.words("a <toy> on grass")
    first = words["a"][0]
    assert (words["<toy>"], words["grass"]) == ([first + 1, first + 2, first + 3], [first + 5])
    named = {word: words[word] for word in ("<toy>", "grass")}
    again = run(found.pipe, name, "a <toy> on grass", region_tokens=named, output_regions=True)
    assert torch.equal(again.images, found.guided.images)
    return WORKS


@torch.no_grad()
def _embeddings(pipe, name) -> dict:
    """Call arguments that replace the prompts PROMPT and "a dog"."""
    offered = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None}
    offered |= {"device": "cpu", "max_sequence_length": None if name == "hunyuan" else MAX_TOKENS}
    known = inspect.signature(pipe.encode_prompt).parameters
    offered = {key: value for key, value in offered.items() if key in known}
    both = {"prompt": PROMPT, "negative_prompt": "a dog"}
    text, mask = (
        ("prompt_embeds", "negative_prompt_embeds"),
        ("prompt_attention_mask", "negative_prompt_attention_mask"),
    )
    pooled = "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    found = {"prompt": None, "negative_prompt": None}
    if name == "flux":
        for which, prompt in enumerate(both.values()):
            found |= zip((text[which], pooled[which]), pipe.encode_prompt(prompt, **offered), strict=False)
    elif name == "hunyuan":
        for index, suffix in enumerate(("", "_2")):
            names = [argument + suffix for argument in text + mask]
            found |= zip(names, pipe.encode_prompt(text_encoder_index=index, **both, **offered), strict=True)
    else:
        order = {"sd": text, "sdxl": text + pooled, "sd3": text + pooled}.get(
            name, (text[0], mask[0], text[1], mask[1])
        )
        found |= zip(order, pipe.encode_prompt(**both, **offered), strict=True)
    return found
