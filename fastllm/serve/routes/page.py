"""/: a small page to talk with a model. Its files are read once; nothing of it comes from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from fastllm.serve.errors import HTTPError

router = APIRouter(include_in_schema=False)
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/")
async def index() -> Response:
    return _answer("index.html")


@router.get("/page/{name}")
async def file(name: str) -> Response:
    return _answer(name)


def _answer(name: str) -> Response:
    if name not in KINDS:
        raise HTTPError(404, "there is no such page")
    return Response(_read(name), media_type=KINDS[name], headers=HEADERS)


@cache
def _read(name: str) -> bytes:
    return (resources.files("fastllm.serve") / "page" / name).read_bytes()
