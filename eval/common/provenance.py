"""How a result was made: its command, commit and versions, and digests of what it depends on."""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from eval.common.files import file_digest


PACKAGES = ("torch", "diffusers", "transformers", "goca-guidance")


def command() -> str:
    """The command line of the program that runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def model_name(model: str) -> str:
    """A folder's own name; a repository's whole one."""
    return Path(model).name if Path(model).is_dir() else model


def commit() -> str:
    """The commit of the code, marked where it was changed since; "unknown" outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.check_output(asked, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    return {package: version(package) for package in packages}


def fingerprint(*modules: str, **inputs) -> str:
    """Digest of all that a cached measurement depends on: its inputs, and the modules that compute it (see `code`)."""
    return digest_of(**inputs, code=code(*modules))


def digest_of(**inputs) -> str:
    """Digest of anything that JSON, or else its own text, can say."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code(*modules: str) -> str:
    """Digest of some modules, packages with all that is in them, and the versions of what they call.

    The modules are named, not those that happen to be loaded: what one program measured another can use, and an edit of a
    table's wording measures nothing again.
    """
    specs = [find_spec(name) for name in modules]
    folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    files = {Path(spec.origin) for spec in specs} | {file for folder in folders for file in folder.rglob("*.py")}
    parts = [file_digest(path) for path in sorted(files)] + [f"{name} {version(name)}" for name in PACKAGES]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


@cache
def weights_digest(model: str) -> str:
    """Digest of a model folder, weights and configurations; the name itself for a hub repository."""
    files = sorted(
        path for path in Path(model).glob("**/*") if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model")
    )
    digests = " ".join(f"{path.relative_to(model)} {file_digest(path)}" for path in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:16] if files else model
