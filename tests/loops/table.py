"""The table of families, docs/families.md: what of each denoiser was tried with a tiny pipeline, and what came of it."""

import inspect
import warnings
from collections.abc import Callable, Mapping

import diffusers
import peft
import torch
import transformers
from PIL import Image

from goca_guidance import GoCAGuidance
from goca_guidance.denoisers.adapters import denoiser_of, denoisers_of
from goca_guidance.real_images.forwards import SET
from tests.helpers.guided import NEUTRAL, guided
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.tiny_loop import build, run
from tests.helpers.loops.trace import denoisers, latents
from tests.helpers.places import ROOT
from tests.loops.census import REGIONS, SERVED, WORKS, mixes, verdict


ABSENT = "not in diffusers"
TABLE = ROOT / "docs" / "families.md"
TEXT = """# Families

What works with which denoiser. Each cell was filled by a program that ran the feature with a tiny pipeline of the family,
random weights, on a CPU: *works* says that with a rate of one the output is that of the stock pipeline, bit for bit, that
with regions it differs, and that every step which mixes two predictions had regions. Where a cell is refused, the note is the
error that a user gets; HiDream's, Ideogram 4's and Lumina 2's segmentation is refused for the tiny models' size alone, which
their pipelines do not ask for. That regions are *good* on trained weights is another matter: see "Sink" below, and
[benchmarks.md](benchmarks.md) for the models that were measured. Stable Diffusion 1 to 3, PixArt, Flux.1 and HunyuanDiT have a
longer table: [features.md](features.md).

{served} of the {mixing} pipelines of diffusers {diffusers} whose loop mixes two predictions work, each of them run so; the
others are refused, with the reasons in `results/pipelines.json`. Made by `python -m tests.loops` with transformers
{transformers} and torch {torch}.
"""
TARGETS = {
    "to_q",
    "to_k",
    "to_v",
    "qkv_proj",
    "to_query",
    "to_key",
    "to_value",
    "img_qkv_proj",
    "txt_kv_proj",
}  # of a LoRA
COLUMNS: dict[str, Callable[[str], str]] = {}  # title of a column: what fills a cell, by the name of the main pipeline


def column(title: str):
    """Enter a function in the table."""

    def enter(function):
        COLUMNS[title] = function
        return function

    return enter


# ---- families --------------------------------------------------------------------------------------------------------
def families() -> dict[str, list[str]]:
    """Names of the mixing pipelines by the class of their denoiser; the first is the one that is tried."""
    found: dict[str, list[str]] = {}
    for name, loop in LOOPS.items():
        if loop.guided and mixes(getattr(diffusers, name)):
            found.setdefault(type(denoiser_of(loop.components())).__name__, []).append(name)
    order = {kind: sorted(names, key=lambda n: (n not in SERVED, len(n), n)) for kind, names in found.items()}
    return dict(sorted(order.items()))


# ---- columns ---------------------------------------------------------------------------------------------------------
def _tried(name: str, change: Callable = lambda pipe: None, again: bool = False, **call) -> str:
    """A rate of one is stock under the same feature, bit for bit; any other is not."""
    loop = LOOPS[name]
    stock = build(name, loop)
    change(stock)
    try:
        expected = latents(run(stock, loop, **call))
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"refused by diffusers: {error}"
    try:
        pipe = guided(stock)
        if again:
            change(pipe)
        call |= {} if loop.words else {"region_tokens": REGIONS}
        neutral, output = latents(run(pipe, loop, scfg=NEUTRAL, **call)), run(pipe, loop, output_regions=True, **call)
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"refused: {error}"
    assert torch.equal(neutral, expected), name
    assert not torch.equal(latents(output), expected), name
    assert len(output["regions"]) == loop.guided, name
    return WORKS


column("Generate")(verdict)


@column("Batch of prompts")
def batch(name: str) -> str:
    if not LOOPS[name].batch:
        return ABSENT
    return _tried(name, prompt=["a cat on grass", "a dog"])


@column("Words")
def words(name: str) -> str:
    if not LOOPS[name].words:
        return "refused: its tiny pipeline is called with embeddings"
    try:
        pipe = guided(build(name, LOOPS[name]))
        found = pipe.words(LOOPS[name].written("a cat on grass"), **further(pipe, name))
    except (ValueError, TypeError) as error:
        return f"refused: {error}"
    assert {"cat", "grass"} <= set(found), name
    return WORKS


@column("Segment")
def segment(name: str) -> str:
    loop, picture = LOOPS[name], Image.effect_mandelbrot((48, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    size = {key: 64 for key in ("height", "width") if key in loop.call}
    try:
        pipe = guided(build(name, loop))
        found = pipe.segment([picture, picture.rotate(90)], ["cat", "grass"], **size, **further(pipe, name))
    except (ValueError, RuntimeError, TypeError) as error:
        return f"refused: {error}"
    assert [tuple(labels.shape) for labels in found.label_maps] == [(32, 48)] * 2, name
    assert found.scores.std() > 0, name
    return WORKS


def further(pipe, name: str) -> dict:
    """Arguments of the small call that matter to how a text is read."""
    known = inspect.signature(pipe._text_to_image_class().__call__).parameters
    return {
        key: value for key, value in LOOPS[name].call.items() if key in known and key not in (*SET, "guidance_scale")
    }


@column("Guider")
def guider(name: str) -> str:
    """`GoCAGuidance` in the modular pipeline of the family, or in a stock one that has a guider."""
    kinds = (f"{name.removesuffix('Pipeline')}{kind}Blocks" for kind in ("BaseAuto", "Auto", ""))
    blocks = next((getattr(diffusers, kind) for kind in kinds if hasattr(diffusers, kind)), None)
    if blocks is None or "guider" not in [part.name for part in blocks().expected_components]:
        return ABSENT
    pipe, components = blocks().init_pipeline(), LOOPS[name].components()
    wanted = {part.name for part in blocks().expected_components}
    pipe.update_components(**{n: part for n, part in components.items() if n in wanted and part is not None})
    pipe.set_progress_bar_config(disable=True)
    known = {value.name for value in pipe.blocks.inputs}
    call = {k: v for k, v in LOOPS[name].call.items() if k in known}
    call |= {"prompt": "a cat on grass", "negative_prompt": "", "num_inference_steps": 2, "output": "latents"}
    made = []
    for scfg in (NEUTRAL, None):
        ours = GoCAGuidance(5.0, scfg=scfg)
        pipe.update_components(guider=ours)
        try:
            with ours.watching(pipe, keep_regions=True) as seen:
                made.append(pipe(**call, generator=torch.Generator().manual_seed(0)))
        except (ValueError, RuntimeError, TypeError) as error:
            return f"refused: {error}"
        except IndexError:
            return "not tried: the blocks read more layers than the tiny text encoder has"
        assert len(seen.results()[0]) == 2, name
    assert not torch.equal(*made), name
    return WORKS


@column("LoRA")
def lora(name: str) -> str:
    def adapt(pipe):
        torch.manual_seed(1)
        for denoiser in denoisers_of(pipe.components):
            names = {n.rpartition(".")[2] for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)}
            targets = sorted(names & TARGETS)
            config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets)
            peft.inject_adapter_in_model(config, denoiser)

    return _tried(name, adapt)


@column("Offload")
def offload(name: str) -> str:
    """Model offload, with the CPU in place of an accelerator."""
    return _tried(name, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), again=True)


@column("Compile")
def compiled(name: str) -> str:
    def compile_denoisers(pipe):
        for part, module in pipe.components.items():
            if any(module is denoiser for denoiser in denoisers(pipe)):
                setattr(pipe, part, torch.compile(module, backend="eager"))

    torch.compiler.reset()
    try:
        return _tried(name, compile_denoisers)
    finally:
        torch.compiler.reset()


# ---- filled by several processes ------------------------------------------------------------------------------------
def quiet() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def cell(place: tuple[str, str, str]) -> tuple[tuple[str, str], str]:
    title, kind, name = place
    return (title, kind), COLUMNS[title](name)


# ---- the document ----------------------------------------------------------------------------------------------------
Cells = Mapping[tuple[str, str], str]  # by title of the column and class of the denoiser


def to_markdown(cells: Cells, counted: Mapping) -> str:
    """The document; a cell's reason goes to a footnote."""
    notes: dict[str, int] = {}
    rows = [["Denoiser", *COLUMNS, "Tasks"], ["---"] * (len(COLUMNS) + 2)]
    for kind, names in families().items():
        row = [kind]
        for title in COLUMNS:
            said, _, reason = cells[title, kind].partition(": ")
            row.append(f"{said}[^{notes.setdefault(reason, len(notes) + 1)}]" if reason else said)
        row.append(", ".join(name.removesuffix("Pipeline") for name in names if name in counted["works"]) or "none")
        rows.append(row)
    versions = {package.__name__: package.__version__ for package in (diffusers, transformers, torch)}
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = TEXT.format(**versions, served=len(counted["works"]), mixing=counted["mixing"])
    footnotes = "".join(f"[^{n}]: {' '.join(reason.split())}\n" for reason, n in notes.items())
    return f"{text}\n{table}\n\n{footnotes}\n{_sinks()}"


def _sinks() -> str:
    """Which token is taken to look at the background, by denoiser."""
    from goca_guidance.denoisers.adapters import ADAPTERS

    rows = [
        f"| {name} | {family.sink} | {'yes' if family.sink_measured else 'no'} |"
        for name, family in sorted(ADAPTERS.items())
    ]
    head = (
        "## Sink\n\nThe token whose attention tells the background: the first one of the text (*start*) or the one behind the "
        "prompt (*end*), and\nwhether anyone has looked on trained weights that it does.\n"
    )
    return "\n".join([head, "| Denoiser | Sink | Measured |", "| --- | --- | --- |", *rows]) + "\n"
