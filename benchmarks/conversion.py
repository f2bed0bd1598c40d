"""What a conversion costs beside a plain copy of the tensors that it takes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from recursify.conversion import convert as conversion
from recursify.conversion.layer_selection import make_plan
from recursify.training.trainer import peak_memory

from .case import Bench, Check, Table, case
from .measure import alone, give_back_when_freed, held, ratio, say, seconds
from .models import HALF_B, SEVEN_B, SHIPPED, TOY, TRACKER, Shape

GB = 1e9
TIME_BOUND, MEMORY_BOUND = 2.0, 1.3
UNREADABLE = b"a file that no reader of safetensors takes for one"


@dataclass(frozen=True)
class Donor:
    """A donor on disk.

    Args:
        layer_files: Which file holds which layer's tensors; index -1 is what stands outside the layers.
    """

    folder: Path
    shape: Shape
    layer_files: dict[int, str]

    def names(self, layers: Sequence[int]) -> dict[str, str]:
        """Tensor -> file, of these layers and of all outside of them."""
        index = json.loads((self.folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        wanted = {self.layer_files[layer] for layer in (-1, *layers)}
        return {name: file for name, file in index.items() if file in wanted}


def write_donor(folder: Path, shape: Shape, layers: Sequence[int]) -> Donor:
    """A donor in bfloat16, a file for each layer and one for the rest, as a hub has them; files of layers that are not named are no
    safetensors, so that opening one fails."""
    config = shape.config()
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SHIPPED if config.vocab_size >= 4096 else TRACKER) / file, folder)  # no more tokens than rows
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if shape.tied:
        del shapes["lm_head.weight"]
    files = {
        layer: f"model-{layer + 2:05}-of-{config.num_hidden_layers + 1:05}.safetensors" for layer in range(-1, config.num_hidden_layers)
    }
    index = {name: files[_layer(name)] for name in shapes}
    noise = torch.randn(2**22).to(torch.bfloat16) * 0.02
    for layer, file in files.items():
        if layer >= 0 and layer not in layers:
            (folder / file).write_bytes(UNREADABLE)
            continue
        mine = [name for name in shapes if index[name] == file]
        save_file({name: _filled(shapes[name], noise) for name in mine}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return Donor(folder, shape, files)


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def _filled(shape: torch.Size, noise: torch.Tensor) -> torch.Tensor:
    """The same random numbers repeated, since drawing them takes long."""
    count = shape.numel()
    return noise.repeat(-(-count // len(noise)))[:count].reshape(shape)


def copy(donor: Donor, layers: Sequence[int], target: Path) -> None:
    """The limit: the tensors as they are read, one after the other, into one file that is on the disk in the end."""
    tensors = {}
    for name, file in donor.names(layers).items():
        with safe_open(donor.folder / file, framework="pt") as handle:
            tensors[name] = handle.get_tensor(name)
    torch.save(tensors, target)
    handle = os.open(target, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def convert(donor: Donor, flags: dict[str, Any], target: Path) -> None:
    settings = conversion.ConvertSettings(qwen_model=str(donor.folder), output_path=str(target), **flags)
    conversion.run(settings, say=lambda _: None)


def weigh(donor: Donor, flags: dict[str, Any], target: Path) -> tuple[int, int]:
    """Bytes that a conversion holds above what the process held before, at most; and bytes written."""
    give_back_when_freed()
    device = torch.device("cpu")
    before = held(device)
    convert(donor, flags, target)
    return peak_memory(device) - before, target.stat().st_size


def in_turn(donor: Donor, flags: dict[str, Any], rounds: int, warm: bool) -> dict[str, list[float]]:
    """Seconds of both sides, for each round of four: ours, copy, copy, ours; of the one round of a large donor the first two. Each writes
    a new file, and both are deleted after a pair: the next writer reuses their pages, and the second one needs new ones."""
    layers, device = planned(donor.shape, flags), torch.device("cpu")
    files = {"convert": donor.folder / "convert.pt", "copy": donor.folder / "copy.pt"}
    works = {"convert": partial(convert, donor, flags, files["convert"]), "copy": partial(copy, donor, layers, files["copy"])}
    times: dict[str, list[float]] = {name: [] for name in works}
    orders = [list(works), list(works)[::-1]] if rounds > 1 else [list(works)]
    for turn in range(warm + rounds):
        took = dict.fromkeys(works, 0.0)
        for order in orders:
            for name in order:
                took[name] += seconds(works[name], device) / len(orders)
            for file in files.values():
                file.unlink()
        if turn >= warm:
            for name, value in took.items():
                times[name].append(value)
    return times


def compare(donor: Donor, flags: dict[str, Any], rounds: int, warm: bool) -> dict[str, Any]:
    """One row: time over the copy's, and memory over bytes written."""
    layers, target = planned(donor.shape, flags), donor.folder / "out.pt"
    times = in_turn(donor, flags, rounds, warm)
    above, written = alone(weigh, donor, flags, target)
    took = ratio(times["convert"], times["copy"])
    return {
        "donor": donor.shape.name,
        "plan": " ".join(f"--{name}{'' if value is True else f' {value}'}" for name, value in flags.items()),
        "layers": f"{len(layers)} of {donor.shape.layers}",
        "written, GB": written / GB,
        "seconds": sorted(times["convert"])[len(times["convert"]) // 2],
        "a copy, s": sorted(times["copy"])[len(times["copy"]) // 2],
        "time / copy": took,
        "memory, GB": above / GB,
        "memory / written": above / written,
        "limit": f"writing and flushing the file: {1 / took['median']:.0%} of the time is the copy's; the rest reads once more and checks",
    }


def planned(shape: Shape, flags: dict[str, Any]) -> list[int]:
    plan = make_plan("donor", shape.layers, L_layers=flags.get("L_layers", 4), keep_donor=flags.get("keep_donor", False))
    return list(plan.indices)


@case("conversion", "Conversion")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """`recursify convert` with all that it does (plan, copy, comparison of every tensor with the donor's file, logits against
    transformers' own class at every depth, tokenizer, file flushed to the disk) over a plain copy of the same tensors into one file,
    flushed; in rounds of ours, copy, copy, ours. The donor lies in the system's file cache for both. Memory: the resident bytes of a
    process of its own, at most, less those before; pages of the donor's mapped files count. Of the 7B shape the files of layers that no
    plan takes are no safetensors at all: to open one would fail.
    """
    small, large = (TOY, TOY) if bench.size == "quick" else (HALF_B, SEVEN_B)
    # A plan and its rounds; the compact one takes least time and varies most.
    compact, keep = bench.pick((1, 1), (5, 3), (5, 3))
    rows: list[dict[str, Any]] = []
    for shape, plans in (
        (small, [({"L_layers": min(4, small.layers)}, compact), ({"keep_donor": True, "L_layers": min(4, small.layers - 2)}, keep)]),
        (large, [({"L_layers": min(4, large.layers - 1)}, 1)]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            say(f"conversion: writing a donor of the shape of {shape.name}")
            wanted = sorted({layer for flags, _ in plans for layer in planned(shape, flags)})
            donor = write_donor(Path(folder), shape, wanted)
            for flags, rounds in plans:
                say(f"conversion: {shape.name} {flags}")
                rows.append(compare(donor, flags, rounds, warm=not rows))
    yield Table("Conversion over a plain copy", rows)
    for row in rows:
        name = f"{row['donor']}, {row['plan']}"
        yield Check(f"{name}: time / copy", row["time / copy"]["median"], most=TIME_BOUND, must=row["donor"] == small.name)
        yield Check(f"{name}: memory / written", row["memory / written"], most=MEMORY_BOUND)
