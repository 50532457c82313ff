"""The page at / to try prompts: one file, with nothing from elsewhere."""

import base64
import functools
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


async def show(request: Request) -> Response:
    content, headers = _load()
    return HTMLResponse(content, headers=headers)


@functools.cache
def _load() -> tuple[str, dict[str, str]]:
    """The page, and headers under which a browser runs this very script and style and no other."""
    content = resources.files("moe_jax.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'",
        f"script-src {_hash_of('script', content)}",
        f"style-src {_hash_of('style', content)}",
        "connect-src 'self'",
        "img-src data:",  # the empty icon, for which the browser would ask otherwise
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return content, headers


def _hash_of(element: str, content: str) -> str:
    (inside,) = re.findall(f"<{element}>(.*?)</{element}>", content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
