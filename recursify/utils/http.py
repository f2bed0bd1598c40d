"""The HTTP client that huggingface_hub speaks with, for its errors: httpx up to 1.x, httpx2 since, which 2.x exports under the old name."""

from __future__ import annotations

try:
    from huggingface_hub.utils import httpx
except ImportError:  # huggingface_hub 1.x
    import httpx  # type: ignore[no-redef]

__all__ = ["httpx"]
