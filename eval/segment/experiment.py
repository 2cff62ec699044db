"""What one TOML file says: which images, which model, which prompts, which methods; and the parts that are built from it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from eval.common.configs import check_keys, from_mapping, read_toml
from eval.common.files import file_digest
from eval.common.load import DTYPES
from eval.common.provenance import weights_digest
from eval.datasets.benchmarks import Benchmark, benchmark, dataset_of
from eval.datasets.protocols import PROTOCOLS, Protocol
from eval.prompts.endpoint import Endpoint
from eval.prompts.phrases import aliases_of
from eval.prompts.prompt_file import Written
from eval.prompts.sources import Captions, Source, Tags, Vocabulary, read_captions, release
from eval.prompts.tagger import Tagger
from eval.segment.crf import CRF
from eval.segment.methods import METHODS, BackgroundRule, Method
from goca_guidance import TINY_SD, GoCAConfig


SOURCES: Mapping[str, Callable] = {
    "tags": Tags,
    "vocabulary": Vocabulary,
    "captions": Captions,
    "tagger": Tagger,
    "endpoint": Endpoint,
    "written": Written,
}


NOT_GOCA = ("base", "timestep", "num_noises", "background", "crf")  # a row's keys that are no field of `GoCAConfig`


@dataclass(frozen=True)
class Experiment:
    """The fields of a TOML file.

    Args:
        methods: a table for each row: a method of `eval.segment.methods` by its name or by `base`, with changes of its
            `GoCAConfig`, of `timestep`, `num_noises`, `crf`, the background's rule, and of what only this method has.
        grid: values of `GoCAConfig` fields; every combination is a row.
        benchmark, root: a name of `eval.datasets.benchmarks`, and the folder of its files; Scenes have none.
        split: None is the protocol's.
        limit: the first so many images.
        protocol: see `eval.datasets.protocols`.
        prompts: `source` and its settings, see `source_of`.
        background: `kind` and `values` of a `BackgroundRule`.
        tune: so many training images choose among several values of the background's rule.
        model: the pipeline's repository or folder.
        dtype: "float32", "float16" or "bfloat16".
        size: side of the model's input in pixels; None is its native one.
        timestep: of the noise, of the scheduler's training steps; None is the preset's.
        num_noises: noise samples to average.
        batch: prompts in a forward.
        seed: noise is seeded by it and the image's id.
    """

    methods: dict[str, dict] = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    benchmark: str = "scenes"
    root: str | None = None
    split: str | None = None
    limit: int | None = None
    protocol: str = "standard"
    prompts: dict = field(default_factory=lambda: {"source": "tags"})
    background: dict = field(default_factory=lambda: {"kind": "offset", "values": [0.2]})
    tune: int = 0
    model: str = TINY_SD
    dtype: str = "float32"
    size: int | None = None
    timestep: int | None = None
    num_noises: int = 1
    batch: int = 8
    seed: int = 0

    def __post_init__(self):
        dataset_of(self.benchmark)
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"Expected a protocol among {', '.join(PROTOCOLS)}, but got {self.protocol!r}.")
        if not self.methods and not self.grid:
            raise ValueError("Expected at least one method or a grid, but got neither.")
        self._check_numbers()
        rule_from(self.background)
        for name, settings in self.rows.items():
            method_of(name, settings)

    def _check_numbers(self):
        least = {"batch": 1, "num_noises": 1, "limit": 1, "size": 8, "tune": 0, "timestep": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ValueError(f"Expected `{name}` to be a whole number of at least {low}, but got {value!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Expected `dtype` among {', '.join(DTYPES)}, but got {self.dtype!r}.")

    @property
    def rows(self) -> dict[str, dict]:
        """Settings of every row by its name, those of the grid last."""
        names = list(self.grid)
        combinations = (
            [dict(zip(names, values, strict=True)) for values in product(*self.grid.values())] if names else []
        )
        named = {
            ", ".join(f"{k} {_in_words(v)}" for k, v in row.items()): {"base": "goca", **row} for row in combinations
        }
        return self.methods | named

    @property
    def evaluated_split(self) -> str:
        """The split that is evaluated."""
        return self.split or self.chosen_protocol.split(self.benchmark)

    @property
    def chosen_protocol(self) -> Protocol:
        """The protocol itself."""
        return PROTOCOLS[self.protocol]

    def conditions(self) -> dict:
        """What all rows share and each image's counts depend on: the weights and the files of prompts by their digests."""
        left_out = ("methods", "grid", "model", "limit", "tune", "batch")
        shared = {name: value for name, value in asdict(self).items() if name not in left_out}
        read = [Path(str(self.prompts[key])).expanduser() for key in ("path", "pretrained") if key in self.prompts]
        files = [file_digest(path) for path in read if path.is_file()]
        return {**shared, "split": self.evaluated_split, "weights": weights_digest(self.model), "files": files}

    @classmethod
    def read(cls, path: Path, **changes: Any) -> "Experiment":
        """From a TOML file, with some fields changed; unknown keys are an error."""
        return from_mapping(cls, read_toml(path) | changes)

    def only(self, names: list[str]) -> "Experiment":
        """Some of the rows."""
        if unknown := sorted(set(names) - set(self.rows)):
            raise ValueError(f"Expected methods among {list(self.rows)}, but got {unknown}.")
        return replace(self, methods={name: self.rows[name] for name in names}, grid={})


# ---- the parts -------------------------------------------------------------------------------------------------------
def images_of(experiment: Experiment) -> Benchmark:
    """The benchmark as the protocol counts it, with the images that are evaluated.

    GoCA's protocol evaluates the images that a caption file names, where there is one.
    """
    protocol, prompts, ids = experiment.chosen_protocol, experiment.prompts, None
    if protocol.name == "goca" and prompts.get("source") == "captions":
        ids = list(read_captions(Path(prompts["path"])))
    root = None if experiment.root is None else Path(experiment.root).expanduser()
    found = benchmark(experiment.benchmark, root, experiment.evaluated_split, ids)
    return protocol.applied(replace(found, ids=found.ids[: experiment.limit]))


def source_of(experiment: Experiment, images: Benchmark) -> Source:
    """The source of prompts: "tags", "vocabulary", "captions", "tagger", "endpoint" or "written"."""
    settings = dict(experiment.prompts)
    kind = settings.pop("source", "tags")
    if kind not in SOURCES:
        raise ValueError(f"Expected a source of prompts among {', '.join(SOURCES)}, but got {kind!r}.")
    if kind in ("captions", "endpoint"):
        aliases = aliases_of(images.name, images.classes)
        counted = {phrase: experiment.chosen_protocol.asked(images.name, name) for phrase, name in aliases.items()}
        settings = {"aliases": counted, **release(images.name), **settings}
    try:
        return SOURCES[kind](classes=images.classes, **settings)
    except TypeError as error:
        given = sorted(experiment.prompts)
        raise ValueError(f"Expected the settings of the source {kind!r}, but got {given} ({error}).") from error


def base_of(name: str, settings: Mapping[str, Any]) -> str:
    """The method of `eval.segment.methods` that a row starts from: the one that it says as `base`, or the one of its name."""
    base = settings.get("base", name)
    if base not in METHODS:
        raise ValueError(
            f"Expected a row with the name of a method, or with a `base`, among {', '.join(METHODS)}, but got {base!r}."
        )
    return base


def method_of(name: str, settings: Mapping[str, Any]) -> Method:
    """A method of `eval.segment.methods`, with what a row changes."""
    method = METHODS[base_of(name, settings)]
    config = {key: value for key, value in settings.items() if key not in (*NOT_GOCA, *method.extra)}
    check_keys(GoCAConfig, config, (*NOT_GOCA, *method.extra))
    changes = {key: settings[key] for key in ("timestep", "num_noises") if key in settings}
    if "crf" in settings:
        changes["crf"] = crf_from(settings["crf"])
    if "background" in settings:
        changes["rule"] = rule_from(settings["background"])
    changes["extra"] = {key: settings.get(key, value) for key, value in method.extra.items()}
    return replace(method, config=replace(method.config, **config), **changes)


def crf_from(settings: bool | Mapping[str, Any]) -> CRF | None:
    """A CRF as a TOML file has it: true, false, or a table of the constants that differ from FTTM's."""
    if isinstance(settings, bool):
        return CRF() if settings else None
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"Expected `crf` to be true, false or a table such as {{theta_beta = 10}}, but got {settings!r}."
        )
    return from_mapping(CRF, settings)


def rule_of(experiment: Experiment, method: Method, images: Benchmark) -> BackgroundRule | None:
    """The background's rule, where the benchmark has a background and the method names what it sees."""
    if images.background is None or method.nameless:
        return None
    rule = method.rule or rule_from(experiment.background)
    if len(rule.values) > 1 and not experiment.chosen_protocol.best_value and not experiment.tune:
        raise ValueError(
            f"Expected one value of the background's rule under the protocol {experiment.protocol!r}, or `tune` training "
            f"images to choose among the {len(rule.values)} that came."
        )
    return rule


def rule_from(settings: Mapping[str, Any]) -> BackgroundRule:
    """A rule as a TOML file has it: its kind, and a list of values."""
    if set(settings) != {"kind", "values"} or not isinstance(settings["values"], list):
        raise ValueError(
            f'Expected a background such as {{kind = "offset", values = [0.2]}}, but got {dict(settings)}.'
        )
    return BackgroundRule(settings["kind"], tuple(map(float, settings["values"])))


def _in_words(value) -> str:
    return " + ".join(value) if isinstance(value, list) else str(value)
