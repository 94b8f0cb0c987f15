"""mkdocs: pages that lie outside docs/, and links from a page to a file of the repository."""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# What a page's text is where it lies elsewhere in the repository, as the files of its root do.
PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "notes.md": "benchmarks/NOTES.md",
    "results.md": "benchmarks/reproduction/RESULTS.md",
    "embedded.md": "reflective/data/smollm2-135m-instruct/README.md",
}
BESIDE = "repository"  # in the site: files that pages link, and pictures that they show
_LINK = re.compile(r"(\]\(|<img [^>]*src=\"|srcset=\"|^\[[^\]]+\]: )(?!https?:|#|mailto:)([^)\s\"#]+)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them."""
    for page, source in PAGES.items():
        if (ROOT / source).is_file() and files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=_without_front_matter((ROOT / source).read_text(encoding="utf-8"))))
    for file in list(files.documentation_pages()):
        for _, target in _LINK.findall(_prose(file.content_string)):
            found = _outside(file.src_uri, target)
            if found and files.get_file_from_path(f"{BESIDE}/{found}") is None and (ROOT / found).is_file():
                files.append(File.generated(config, f"{BESIDE}/{found}", abs_src_path=str(ROOT / found)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages and files that were added; mkdocs warns of what is in neither place, which is an error under --strict."""
    here = page.file.src_uri

    def to(match: re.Match[str]) -> str:
        found = _outside(here, match[2])
        return match[1] + _relative(here, f"{BESIDE}/{found}") if found else match[1] + _moved(here, match[2])

    return _LINK.sub(to, markdown)


def _moved(here: str, target: str) -> str:
    """A link as it is to be: what lies under another name in the site goes by that."""
    found = _repository_path(here, target)
    page = next((page for page, source in PAGES.items() if source == found), None)
    if page is None and found.startswith("docs/"):
        page = found.removeprefix("docs/")
    return _relative(here, page) if page else target


def _outside(here: str, target: str) -> str | None:
    """The path in the repository of what ``target`` names there, where that is no page of the site."""
    found = _repository_path(here, target)
    return None if found.startswith(("docs/", "../")) or found in PAGES.values() else found


def _repository_path(here: str, target: str) -> str:
    source = PurePosixPath(PAGES.get(here, f"docs/{here}"))
    return os.path.normpath(source.parent / target).replace(os.sep, "/")


def _relative(here: str, target: str) -> str:
    return os.path.relpath(target, PurePosixPath(here).parent).replace(os.sep, "/")


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
