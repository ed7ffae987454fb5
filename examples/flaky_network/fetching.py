"""A client with retries: what may pass is tried again, what will not is told at once."""

from __future__ import annotations

import anyio
import httpx

ATTEMPTS = 5
FINAL = ("NXDOMAIN", "Name or service not known")
"""What an error says of a name that does not exist: httpx has no type for it."""


class NoSuchHost(LookupError):
    """The name in the URL does not exist."""


class GaveUp(Exception):
    """Every attempt has failed; the arguments are what each has met."""


async def fetch(client: httpx.AsyncClient, url: str, *, timeout: float = 5.0) -> bytes:
    """Return the body of a resource, after up to five attempts with a pause that doubles."""
    met: list[str] = []
    for attempt in range(ATTEMPTS):
        try:
            response = await client.get(url, timeout=timeout)
        except httpx.TransportError as error:
            if any(word in str(error) for word in FINAL):
                raise NoSuchHost(httpx.URL(url).host) from error
            met.append(type(error).__name__)
        else:
            if response.status_code < 500:
                return response.raise_for_status().content
            met.append(str(response.status_code))
        if attempt + 1 < ATTEMPTS:
            await anyio.sleep(0.5 * 2**attempt)
    raise GaveUp(*met)
