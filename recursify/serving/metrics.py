"""Metrics in the Prometheus text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Labels = tuple[tuple[str, str], ...]

_HELP = {
    "recursify_requests_total": ("counter", "HTTP requests answered, by route and status; 499 is a client that went before."),
    "recursify_texts_total": ("counter", "Texts asked for, by depth and by how they ended."),
    "recursify_prompt_tokens_total": ("counter", "Tokens read, by depth."),
    "recursify_completion_tokens_total": ("counter", "Tokens written and handed on, by depth."),
    "recursify_running": ("gauge", "Texts being written, by depth."),
    "recursify_queued": ("gauge", "Texts that wait, by depth."),
    "recursify_cache_blocks": ("gauge", "Blocks of the cache, by depth."),
    "recursify_cache_blocks_free": ("gauge", "Blocks of the cache that no text holds, by depth."),
    "recursify_up": ("gauge", "1 while requests are taken."),
}


class Metrics:
    """Counters, rendered in Prometheus' text format. Not thread-safe."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[Labels]] = {name: Counter() for name, (kind, _) in _HELP.items() if kind == "counter"}

    def add(self, name: str, amount: int = 1, **labels: object) -> None:
        self.counts[name][_labels(labels)] += amount

    def render(self, gauges: Mapping[str, Mapping[Labels, float]]) -> str:
        """The whole page; `gauges` maps names to current values, with keys from `labelled`."""
        values = {**self.counts, **gauges}
        lines = []
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_rendered(labels)} {value}" for labels, value in values.get(name, {}).items()]
        return "\n".join(lines) + "\n"


def labelled(**labels: object) -> Labels:
    """The key of a gauge with labels."""
    return _labels(labels)


def _labels(labels: Mapping[str, object]) -> Labels:
    return tuple((name, str(value)) for name, value in labels.items())


def _rendered(labels: Labels) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
