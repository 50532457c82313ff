"""The page at / to try prompts: one file that loads nothing from elsewhere."""

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
    """The page, and headers under which a browser runs its script and style and no others."""
    content = resources.files("moe_jax.server").joinpath("page.html").read_text(encoding="utf-8")
    # The empty icon is data:, which a browser would ask for otherwise.
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    policy += "frame-ancestors 'none'"
    for element in ("script", "style"):
        (inside,) = re.findall(f"<{element}>(.*?)</{element}>", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        policy += f"; {element}-src 'sha256-{digest}'"
    headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
    return content, headers | {"Content-Security-Policy": policy}
