"""An mkdocs hook: files outside docs/ become pages of the site, and links between files keep working there.

On GitHub a page links to the files of the repository. On the site a link to a file that is a page leads to that page.
A link to any other file leads to `repo_url` if mkdocs.yml sets one, and becomes plain text otherwise.
"""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
HOME = {"README.md": "index.md"}  # README.md is not a page of the site; index.md takes its place
_CODE_OR_LINK = re.compile(r"(?ms)^```.*?^```|`[^`\n]+`(?!\])|(?<!!)\[((?:[^\]`]|`[^`]*`)*)\]\(([^)\s]+)\)")


def site_link(target: str, page: str, sources: Mapping[str, str], repo_url: str | None) -> str | None:
    """The target of a link on a page of the site; None if it has none there.

    Args:
        target: of the link as written, relative to its file.
        page: path on the site, relative to its root. sources: the file in the repository of each page.
    """
    path, _, anchor = target.partition("#")
    if not path or ":" in path:
        return target
    file = posixpath.normpath(posixpath.join(posixpath.dirname(sources[page]), path))
    pages = {source: name for name, source in sources.items()} | HOME
    if file in pages:
        there = posixpath.relpath(pages[file], posixpath.dirname(page) or ".")
        return f"{there}#{anchor}" if anchor else there
    return f"{repo_url.rstrip('/')}/blob/main/{file}" if repo_url else None


def rewritten(markdown: str, page: str, sources: Mapping[str, str], repo_url: str | None) -> str:
    """The text of a page with its links as the site needs them; code stays as it is."""

    def replace(match: re.Match) -> str:
        if match[2] is None:
            return match[0]
        link = site_link(match[2], page, sources, repo_url)
        return match[1] if link is None else f"[{match[1]}]({link})"

    return _CODE_OR_LINK.sub(replace, markdown)


def on_files(files, config):
    """Add the pages whose files are outside docs/."""
    from mkdocs.structure.files import File

    for page, source in config.extra["pages"].items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page."""
    names = [file.src_uri for file in files.documentation_pages()]
    sources = {name: config.extra["pages"].get(name, f"docs/{name}") for name in names}
    return rewritten(markdown, page.file.src_uri, sources, config.repo_url)
