"""Whole pages: one file each, which asks the network for nothing and runs no script but its own."""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..utils.outputs import write_text
from .escape import in_script, text
from .fragments import styles

_PAGE = ":root { color-scheme: light dark; background: light-dark(#ffffff, #161616); } body { margin: 0 auto; padding: 20px; max-width: 1200px; }\n"


def page(title: str, fragment: str) -> str:
    """A page of one of ``fragments``. It has no script, and no right to one."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return _document(title, policy, f"<style>{_PAGE}</style>", fragment + "\n")


def written(title: str, fragment: str, path: str | Path | None) -> str | None:
    """``page`` into ``path``; the fragment itself, where there is none.

    Raises:
        OSError: the file cannot be written.
    """
    if path is None:
        return fragment
    write_text(path, page(title, fragment), "path")
    return None


def browse(title: str, data: dict[str, Any]) -> str:
    """A page to search, sort and compare many candidates in; ``data`` as ``page.js`` describes it.

    The policy allows the page's own style and script by their hashes, and nothing else: were a text to get out of its place, the browser
    would not run it.
    """
    home = files(__package__)
    style = styles() + home.joinpath("page.css").read_text(encoding="utf-8")
    script = home.joinpath("page.js").read_text(encoding="utf-8")
    body = home.joinpath("page.html").read_text(encoding="utf-8").replace("{{title}}", text(title))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    end = f'<script type="application/json" id="data">{in_script(data)}</script>\n<script>{script}</script>\n'
    return _document(title, policy, f"<style>{style}</style>", body + end)


def _document(title: str, policy: str, head: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n<title>{text(title)}</title>\n{head}\n'
        f"</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
