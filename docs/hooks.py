"""Hooks of mkdocs: pages of the site that lie beside docs/ in the repository, and links that hold in both places.

On GitHub a link is a path in the repository. Here the target is a page of the site (`BESIDE`), or a picture that is taken
along; of a link to another file that the repository has, the text stays. What it has not fails the build.
"""

import posixpath
import re
from pathlib import Path

from markdown import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
BESIDE = {  # path in the repository to page of the site
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "eval/README.md": "programs.md",
    "goca_guidance/models/tiny-sd/README.md": "embedded_model.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")  # no address, no anchor alone
NAME = re.compile(r"\[`(~?)((?:goca_guidance\.)?[\w.]+)`\](?!\(|\[)")  # a name, as diffusers' docstrings write it
PICTURES = (".png", ".gif", ".jpg")


def on_config(config):
    config.markdown_extensions.append(_Names())
    return config


def on_files(files, config):
    for path, page in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path in BESIDE:
        for target in _targets((ROOT / path).read_text(), path):
            if target.endswith(PICTURES) and not target.startswith("docs/"):
                files.append(File.generated(config, _picture(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    origin = {page: path for path, page in BESIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda match: _on_site(match, origin), markdown)


def _targets(text, origin):
    return [_in_repository(match[2], origin) for match in LINK.finditer(text)]


def _in_repository(link, origin):
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _on_site(match, origin):
    """A link of a file of the repository, as a link between pages, which all lie in one folder."""
    text, link, anchor = match[1], match[2], match[3] or ""
    target = _in_repository(link, origin)
    if target.startswith("docs/") and not target.endswith(".py"):
        return f"[{text}]({target.removeprefix('docs/')}{anchor})"
    if target in BESIDE:
        return f"[{text}]({BESIDE[target]}{anchor})"
    if target.endswith(PICTURES):
        return f"[{text}]({_picture(target)})"
    return text if (ROOT / target).exists() else match[0]


def _picture(path):
    return f"beside/{path.replace('/', '-')}"


class _Names(Extension):
    """[`Name`] of a docstring as a link to the reference where it stands there, else as code."""

    def extendMarkdown(self, md):  # noqa: N802 (the library's name)
        md.preprocessors.register(_Named(md), "names", 100)


class _Named(Preprocessor):
    def run(self, lines):
        return [NAME.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", line) for line in lines]
