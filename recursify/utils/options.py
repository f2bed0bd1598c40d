"""Flags that commands of several rooms have: each stands here once, with one help text and one default, and is inherited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class DeviceOptions:
    """What a job runs on."""

    device: str | None = None
    """cpu, cuda, cuda:1 or mps. Default: cuda where there is one, else mps, else cpu."""


@dataclass(kw_only=True)
class JsonOutput:
    """How the result of a job is printed."""

    json: bool = False
    """Print the result as one JSON object on stdout; everything else goes to stderr."""
