"""What made a number: the command, and the code."""

import os
import subprocess
import sys

from eval.common import provenance


def test_the_command_of_a_module_and_of_a_script(tmp_path):
    (tmp_path / "script.py").write_text("from eval.common.provenance import command\nprint(command())\n")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for arguments, expected in (
        (["script.py", "a b"], "python script.py 'a b'"),
        (["-m", "script", "1"], "python -m script 1"),
    ):
        told = subprocess.check_output([sys.executable, *arguments], cwd=tmp_path, env=environment, text=True)
        assert told.strip() == expected


def test_a_measurement_depends_on_named_modules(tmp_path, monkeypatch):
    """On their files and on nothing else that is loaded; a package stands for all that is in it."""
    package = tmp_path / "pretended"
    package.mkdir()
    for name in ("__init__", "one", "two"):
        (package / f"{name}.py").write_text(f"# {name}\n")
    monkeypatch.syspath_prepend(tmp_path)

    def digests():
        provenance.code.cache_clear()
        return [
            provenance.fingerprint(*names, seed=1) for names in (["pretended"], ["pretended.one"], ["pretended.two"])
        ]

    before = digests()
    (package / "two.py").write_text("# changed\n")
    after = digests()
    assert len(set(before)) == 3
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False]
    assert provenance.fingerprint("pretended.one", seed=2) != after[1]
