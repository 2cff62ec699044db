"""One case tried: fine, refused, raw, a leak, or a difference without a word."""

import math
import re
import traceback
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

import numpy as np
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from PIL import Image

from eval.segment.experiment import images_of, method_of, rule_of, source_of
from goca_guidance import Background, SCFGConfig, Segmentation
from tests.fuzz.cases import CONFIGURATIONS, Case, embeddings
from tests.fuzz.faults import injected, is_injected
from tests.fuzz.pairs import Pair, pair, renew, surroundings
from tests.fuzz.state import changed, state_of
from tests.fuzz.tomls import READERS
from tests.fuzz.values import MISSPELT, made


HOUSE = (ValueError, TypeError, RuntimeError, NotImplementedError)
FORMS = re.compile(
    r"(.*: )?Expected |.*(unexpected keyword argument|missing \d+ required)"
)  # the house's; Python's of a call
FINDINGS = ("raw", "leak", "difference")
TOWER = BeartypeConf(is_pep484_tower=True)


@dataclass(frozen=True)
class Outcome:
    """`verdict`: fine, refused, or one of `FINDINGS`; `kind` is the same for findings of one cause; `detail` is to be read."""

    verdict: str
    kind: str = ""
    detail: str = ""


class DifferenceError(Exception):
    """What a call gave is not what it says, or not what stock gives."""


def attempt(case: Case) -> Outcome:
    """Try a case; whatever happens, and whatever it was, all must be as before."""
    if not case.family:
        return _judged(case, None)
    on = pair(case.family)
    before = state_of(on)
    outcome = _judged(case, on)
    left = changed(before, state_of(on))
    if not left and _is_looked_at(case) and not torch.equal(on.plain(), on.expected):
        left = ["the stock output"]
    if left:
        renew(case.family)
        return Outcome("leak", f"{case.surface}: {', '.join(left)}", outcome.detail)
    return outcome


def _is_looked_at(case: Case) -> bool:
    """Whether the stock output is made again afterwards: after all faults, and after some other calls, for it takes time."""
    return case.fault is not None or zlib.crc32(repr(case).encode(errors="replace")) % 8 == 0


def _judged(case: Case, on: Pair | None) -> Outcome:
    try:
        with warnings.catch_warnings(action="ignore"), surroundings(case.around), injected(on, case.fault):
            output = CALLS.get(case.surface, _configure)(case, on)
    except DifferenceError as error:
        return Outcome("difference", f"{case.surface}: {str(error).partition(':')[0]}", str(error))
    except BaseException as error:
        return _of_error(case, on, error)
    try:
        return _checked(case, on, output)
    except DifferenceError as error:
        return Outcome("difference", f"{case.surface}: {str(error).partition(':')[0]}", str(error))


def is_own(error: BaseException) -> bool:
    """Whether an error is the fuzzer's, or the house's."""
    return is_injected(error) or (isinstance(error, HOUSE) and FORMS.match(str(error)) is not None)


def _of_error(case: Case, on: Pair | None, error: BaseException) -> Outcome:
    if is_own(error):
        return Outcome("refused", detail=str(error))
    if case.surface == "generate" and type(_error_of_stock(case, on)) is type(error):
        return Outcome("refused", detail=f"as stock: {error}")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.name == "check_inputs" and "diffusers" in frame.filename:  # of the stock pipeline that reads a picture
        return Outcome("refused", detail=f"as stock: {error}")
    ours = [
        each
        for each in traceback.extract_tb(error.__traceback__)
        if "goca_guidance" in each.filename or "/eval/" in each.filename
    ]
    place = f"{Path(frame.filename).name}:{frame.name}" + (
        f" from {Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    )
    return Outcome("raw", f"{case.surface}: {type(error).__name__} in {place}", f"{type(error).__name__}: {error}")


def _error_of_stock(case, on) -> BaseException | None:
    try:
        _stock(case, on)
    except BaseException as error:
        return error
    return None


# ---- calls -----------------------------------------------------------------------------------------------------------
def _generate(case, on):
    torch.manual_seed(0)
    return on.ours(**_arguments(case, on), **made(case.ours, on))


def _arguments(case, on) -> dict:
    stock = {name: value for name, value in case.stock.items() if name != "embeds"}
    given = on.call | {"generator": torch.Generator().manual_seed(0)} | made(stock, on)
    if "embeds" in case.stock:
        given |= embeddings(on.name)
    return given


def _stock(case, on):
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"), surroundings(case.around), torch.no_grad():
        return on.stock(**_arguments(case, on))


def _read(case, on):
    return getattr(on.ours, case.surface)(**made(case.ours, on))


def _words(case, on):
    return on.ours.words(*made(case.ours, on).values())


def _configure(case, on):
    make = Background.of if case.surface == "Background.of" else CONFIGURATIONS[case.surface][0]
    given = made(case.ours, None)
    return make(given["value"]) if case.surface == "Background.of" else make(**given)


def _toml(case, on):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(case.ours["text"], encoding="utf-8", errors="replace")
        found = READERS[case.ours["program"]].read(path)
        if case.ours["program"] == "segmentation":
            images = images_of(found)
            for row, settings in found.rows.items():
                method = method_of(row, settings)
                for each in (method, method.config, rule_of(found, method, images)):
                    _check_fields(each)
            if found.prompts.get("source", "tags") in ("tags", "vocabulary"):
                source_of(found, images)
        return found


CALLS = {"generate": _generate, "segment": _read, "discover": _read, "words": _words, "TOML": _toml}


# ---- what a call gave --------------------------------------------------------------------------------------------------
def _checked(case: Case, on: Pair | None, output: Any) -> Outcome:
    checks = {
        "generate": _check_generated,
        "segment": _check_segmented,
        "discover": _check_discovered,
        "words": _check_words,
    }
    checks.get(case.surface, lambda case, on, output: _check_fields(output))(case, on, output)
    return Outcome("fine")


def _check_generated(case, on, output) -> None:
    if asked := {*case.stock} & {*MISSPELT}:
        raise DifferenceError(f"misspelt arguments are swallowed: {sorted(asked)}")
    if case.fault is not None:
        return
    ours = output[0] if isinstance(output, tuple) else output.images
    scfg = case.ours.get("scfg")
    neutral = isinstance(scfg, SCFGConfig) and scfg.rate_min == scfg.rate_max == 1
    if neutral or case.ours.get("use_scfg") is False:
        _check_equal_to_stock(case, on, ours)
    elif not _finite(ours):
        with suppress(Exception):
            if _finite(_images(_stock(case, on))):
                raise DifferenceError("not finite, where stock is")


def _check_equal_to_stock(case, on, ours) -> None:
    after = torch.get_rng_state()
    theirs = _error_of_stock(case, on)
    if theirs is not None:
        raise DifferenceError(f"stock refuses what we take: {type(theirs).__name__}: {theirs}")
    theirs = _images(_stock(case, on))
    if not _equal(ours, theirs):
        raise DifferenceError("another output than stock's")
    if not torch.equal(after, torch.get_rng_state()):
        raise DifferenceError("another state of torch's generator than after stock")


def _images(output):
    return output[0] if isinstance(output, tuple) else output.images


def _as_array(images) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        return images.detach().float().numpy()
    return np.stack([np.asarray(each) for each in images]) if isinstance(images, list) else np.asarray(images)


def _finite(images) -> bool:
    return bool(np.isfinite(_as_array(images)).all())


def _equal(a, b) -> bool:
    return type(a) is type(b) and np.array_equal(_as_array(a), _as_array(b), equal_nan=True)


def _check_segmented(case, on, found: Segmentation) -> None:
    for maps in (found.scores, found.entities):
        if not torch.isfinite(maps).all() or (maps.numel() and not 0 <= maps.min() <= maps.max() <= 1 + 1e-5):
            raise DifferenceError(f"scores beyond 0 to 1: {maps.min()} to {maps.max()}")
    groups = found.classes if isinstance(found.classes[0], tuple) else [found.classes] * len(found.sizes)
    for labels, names, size in zip(found.label_maps, groups, found.sizes, strict=True):
        if tuple(labels.shape) != size or not 0 <= labels.min() <= labels.max() < len(names):
            raise DifferenceError(f"labels beyond the names, or of another size: {tuple(labels.shape)}, {size}")


def _check_discovered(case, on, found) -> None:
    images = case.ours["images"].make(on) if hasattr(case.ours["images"], "make") else case.ours["images"]
    pictures = images if isinstance(images, (list, tuple)) else [images]
    if len(found) != len(pictures):
        raise DifferenceError(f"{len(found)} maps of {len(pictures)} pictures")
    for labels, picture in zip(found, pictures, strict=True):
        if isinstance(picture, Image.Image) and tuple(labels.shape) != picture.size[::-1]:
            raise DifferenceError(f"another size: {tuple(labels.shape)}")


def _check_words(case, on, found) -> None:
    for word, positions in found.items():
        if not word or not positions or not all(isinstance(p, int) and p >= 0 for p in positions):
            raise DifferenceError(f"no words with positions: {word!r}: {positions}")


def _check_fields(value) -> None:
    """Each is of the type that the class says, no number is NaN, and true and false are none."""
    hints = get_type_hints(type(value)) if is_dataclass(value) else {}
    for name in [each.name for each in fields(value)] if hints else ():
        given, hint = getattr(value, name), hints[name]
        odd = isinstance(given, bool) and bool not in _options(hint)
        if odd or not is_bearable(given, hint, conf=TOWER) or (isinstance(given, float) and not math.isfinite(given)):
            raise DifferenceError(f"`{name}` is taken though it is no {hint}: {given!r}")


def _options(hint) -> tuple:
    return getattr(hint, "__args__", None) or (hint,)
