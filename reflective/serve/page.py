"""``GET /``: a page on which one asks a question and watches its candidates. It holds no secret and is given without a key; what it asks of the
server it asks as any client does."""

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from ..view import style

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = ("index.html", "live.css", "live.js", "icon.svg")
HEADERS = {
    # All that it runs and shows is its own, and it is part of no other page; text becomes markup nowhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for each time whether it is still what the server has
}  # fmt: skip
router = APIRouter()


def _add(path: str, name: str, text: str) -> None:
    body, kind = text.encode(), TYPES[name.rpartition(".")[2]]
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}

    async def give(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if headers["ETag"] in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=f"{kind}; charset=utf-8", headers=headers)

    router.add_api_route(path, give, methods=["GET", "HEAD"], include_in_schema=False, name=name)
    PATHS.append(path)


PATHS: list[str] = []  # of the page and of what it consists of
for _name in FILES:
    _add("/" if _name == "index.html" else f"/page/{_name}", _name, files(__package__).joinpath("page", _name).read_text(encoding="utf-8"))
_add("/page/scores.css", "scores.css", style())
