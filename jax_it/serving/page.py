"""The chat page at `/`: the files of `static/`, which load nothing from any other address."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

STATIC = Path(__file__).with_name("static")
FILES = {"/": "index.html"} | {f"/{name}": name for name in ("page.css", "page.js", "api.js", "icon.svg")}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Add a route for each of the files."""
    for path, name in FILES.items():
        app.get(path, include_in_schema=False)(_sender(STATIC / name))


def _sender(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(file, headers=HEADERS)

    return send
