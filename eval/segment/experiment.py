"""What one TOML file says: which images, which model, which prompts, which methods; and the parts that are built from it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from eval.common.configs import Seed, check_keys, checked_value, from_file, from_mapping, inside
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
from eval.segment.methods import METHODS, BackgroundRule, Method
from goca_guidance import CRF, TINY_SD, GoCAConfig
from goca_guidance.schema import FILLED, Count, at_least, checked


SOURCES: Mapping[str, Callable] = {
    "tags": Tags,
    "vocabulary": Vocabulary,
    "captions": Captions,
    "tagger": Tagger,
    "endpoint": Endpoint,
    "written": Written,
}


Timestep = Annotated[int, at_least(0)] | None
ROW = {  # of a row, what is no field of `GoCAConfig`; the last ones are of single methods
    "timestep": Timestep, "num_noises": Count | None, "crf": bool | dict[str, Any], "template": str,
    "text_layers": list[str] | None, "self_layer": str | None, "grid_weights": list[float] | None,
    "threshold": float, "alpha": float, "layer": str | None,
}  # fmt: skip
NOT_GOCA = ("base", "timestep", "num_noises", "background", "crf")  # a row's keys that are no field of `GoCAConfig`


@checked
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
        background: `kind`, `values` and `merged` of a `BackgroundRule`; None is the protocol's.
        tune: so many training images choose among several values of the background's rule.
        model: the pipeline's repository or folder.
        dtype: "float32", "float16" or "bfloat16".
        size: side of the model's input in pixels; None is its native one.
        timestep: of the noise, of the scheduler's training steps; None is the preset's.
        num_noises: noise samples to average.
        batch: prompts in a forward.
        seed: noise is seeded by it and the image's id.
    """

    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, Annotated[list[Any], FILLED]] = field(default_factory=dict)
    benchmark: str = "scenes"
    root: str | None = None
    split: str | None = None
    limit: Count | None = None
    protocol: Literal[*PROTOCOLS] = "standard"
    prompts: dict[str, Any] = field(default_factory=lambda: {"source": "tags"})
    background: dict[str, Any] | None = None
    tune: Annotated[int, at_least(0)] = 0
    model: str = TINY_SD
    dtype: Literal[*DTYPES] = "float32"
    size: Annotated[int, at_least(8)] | None = None
    timestep: Timestep = None
    num_noises: Count = 1
    batch: Count = 8
    seed: Seed = 0

    def __post_init__(self):
        dataset_of(self.benchmark)
        if not self.methods and not self.grid:
            raise ValueError("Expected at least one method or a grid, but got neither.")
        rule_from(self.background_settings)
        for name, settings in self.rows.items():
            with inside(f"the row {name!r}"):
                method_of(name, settings)

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

    @property
    def background_settings(self) -> Mapping[str, Any]:
        """Of the background's rule, its own or the protocol's."""
        return self.chosen_protocol.background if self.background is None else self.background

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
        return from_file(cls, path, **changes)

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
    kind = checked_value("source", settings.pop("source", "tags"), Literal[*SOURCES])
    if kind in ("captions", "endpoint"):
        aliases = aliases_of(images.name, images.classes)
        counted = {phrase: experiment.chosen_protocol.asked(images.name, name) for phrase, name in aliases.items()}
        settings = {"aliases": counted, **release(images.name), **settings}
    known = {"classes": images.classes} | ({"words": images.words} if kind == "tags" else {})
    with inside(f"prompts of the source {kind!r}"):
        return SOURCES[kind](**known, **settings)


def base_of(name: str, settings: Mapping[str, Any]) -> str:
    """The method of `eval.segment.methods` that a row starts from: the one that it says as `base`, or the one of its name."""
    base = checked_value("base", settings.get("base", name), str)
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
    given = {key: checked_value(key, settings[key], hint) for key, hint in ROW.items() if key in settings}
    changes = {key: given[key] for key in ("timestep", "num_noises") if key in given}
    if "crf" in given:
        changes["crf"] = crf_from(given["crf"])
    if "background" in settings:
        changes["rule"] = rule_from(settings["background"])
    changes["extra"] = {key: given.get(key, value) for key, value in method.extra.items()}
    return replace(method, config=replace(method.config, **config), **changes)


def crf_from(settings: bool | Mapping[str, Any]) -> CRF | None:
    """A CRF as a TOML file has it: true, false, or a table of the constants that differ from FTTM's."""
    if isinstance(settings, bool):
        return CRF() if settings else None
    with inside("crf"):
        return from_mapping(CRF, settings)


def rule_of(experiment: Experiment, method: Method, images: Benchmark) -> BackgroundRule | None:
    """The background's rule, where the benchmark has a background and the method names what it sees."""
    if images.background is None or method.nameless:
        return None
    rule = method.rule or rule_from(experiment.background_settings)
    if len(rule.values) > 1 and not experiment.chosen_protocol.best_value and not experiment.tune:
        raise ValueError(
            f"Expected one value of the background's rule under the protocol {experiment.protocol!r}, or `tune` training "
            f"images to choose among the {len(rule.values)} that came."
        )
    return rule


def rule_from(settings: Mapping[str, Any]) -> BackgroundRule:
    """A rule as a TOML file has it: its kind, and a list of values."""
    settings = checked_value("background", settings, dict[str, Any])
    if missing := sorted({"kind", "values"} - set(settings)):
        raise ValueError(
            f'Expected a background such as {{kind = "offset", values = [0.2]}}, but got {settings}, without {missing}.'
        )
    with inside("background"):
        return from_mapping(BackgroundRule, settings)


def _in_words(value) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)
