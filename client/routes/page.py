"""``GET /ui``: the page for a browser, and the files that it is made of.

The files are read once, when the app is made, into a table by name. A request's path is looked up there and never
reaches the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

WEB_FOLDER = Path(__file__).resolve().parent.parent / "web"
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but our own files, no script or style inside the document, and no way for text to become either.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # may be kept, but not shown unasked: a new version is there at the next look
}
PAGE = {"text/html": {"schema": {"type": "string"}}}


class WebFile:
    """One file of the page, as it is sent."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self._content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._headers = {**HEADERS, "Content-Type": media_type, "ETag": self._tag}

    def response(self, request: Request) -> Response:
        """The file, or 304 if the browser has it already."""
        known = request.headers.get("if-none-match", "").split(",")
        if self._tag in (tag.strip().removeprefix("W/") for tag in known):
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def read_files(folder: Path = WEB_FOLDER) -> dict[str, WebFile]:
    """The files of the page, by name.

    Raises:
        OSError: they cannot be read.
    """
    return {
        path.name: WebFile(path.read_bytes(), MEDIA_TYPES[path.suffix])
        for path in folder.iterdir()
        if path.suffix in MEDIA_TYPES
    }


def page_router(files: Mapping[str, WebFile]) -> APIRouter:
    """The routes of a page that consists of ``files``."""
    router = APIRouter(tags=["page"])

    @router.get(
        "/ui",
        response_class=Response,
        responses={200: {"content": PAGE}, 304: {"description": "If-None-Match names the page as it is"}},
    )
    async def page(request: Request) -> Response:
        """A page to chat on and to see how busy the server is. It needs no API key; its own requests do."""
        return files[INDEX].response(request)

    @router.get("/ui/", include_in_schema=False)
    async def slash() -> Response:
        """The page has no slash at its end; what it loads is named from there."""
        return Response(status_code=308, headers={"Location": "../ui"})

    @router.get("/ui/{name}", include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        """A file that the page loads."""
        if name not in files:
            raise HTTPException(404, "there is nothing at this path; /openapi.json lists what there is")
        return files[name].response(request)

    return router
