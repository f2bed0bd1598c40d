"""Choose the donor layers of prelude, loop and coda, before any tensor is read.

    compact      no prelude, no coda: a few layers form the loop, the rest is dropped (the guides' default)
    keep_donor   the loop is a contiguous block, all layers before and after it are kept: exact at conversion
    between      some prelude and coda layers are kept, the loop is chosen from the layers between (as (4, 8, 4) in arXiv 2511.07384)

Letters: N layers of the donor, K layers of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..network.plan import ConversionPlan

SELECTIONS = ("uniform", "first", "last", "middle", "stride", "auto")


def select_layers(selection: str, num_layers: int, count: int) -> list[int]:
    """`count` of `num_layers` layers, distinct and ascending.

    uniform includes both ends, ceil(i * (N - 1) / (K - 1)), as in the quick start: 0, 8, 16, 23 of 24. stride is int(i * N / K), as in the
    technical guide: 0, 6, 12, 18 of 24. A single layer is N // 2 for uniform and middle.

    Raises:
        UserError: An unknown selection, or a count outside 1..N.
    """
    N, K = num_layers, count
    if selection == "auto":
        raise UserError("--layer_selection auto: needs the donor, not only its number of layers; convert it with a --calibration_file")
    if selection not in SELECTIONS:
        raise UserError(f"--layer_selection: expected one of {', '.join(SELECTIONS)}, got {selection!r}")
    if not 1 <= K <= N:
        raise UserError(f"--L_layers: expected 1 to {N} (the layers to choose from), got {K}")
    if selection in ("uniform", "middle") and K == 1:
        return [N // 2]
    if selection == "uniform":
        return [math.ceil(i * (N - 1) / (K - 1)) for i in range(K)]
    if selection == "stride":
        return [int(i * N / K) for i in range(K)]
    start = {"first": 0, "last": N - K, "middle": (N - K) // 2}[selection]
    return list(range(start, start + K))


def make_plan(
    donor: str,
    donor_layers: int,
    *,
    L_layers: int = 4,
    layer_selection: str | None = None,
    keep_donor: bool = False,
    prelude_layers: int = 0,
    coda_layers: int = 0,
) -> ConversionPlan:
    """Resolve the flags of a conversion to layer indices. For `auto`, which needs the donor's weights, see `candidates`.

    Args:
        layer_selection: None means `uniform`, or `middle` with `keep_donor`.
        keep_donor: Keep every layer. Counts of prelude or coda then determine where the block is.

    Raises:
        UserError: Counts out of range or with a wrong sum, or a block that is not contiguous with `keep_donor`.
    """
    for name, value in (("--prelude_layers", prelude_layers), ("--coda_layers", coda_layers)):
        if not _is_whole(value) or value < 0:
            raise UserError(f"{name}: expected a whole number of at least 0, got {value!r}")
    if not _is_whole(L_layers) or not 1 <= L_layers <= donor_layers:
        raise UserError(f"--L_layers: expected 1 to {donor_layers} (the donor has {donor_layers} layers), got {L_layers!r}")
    if prelude_layers + L_layers + coda_layers > donor_layers:
        raise UserError(
            f"--prelude_layers {prelude_layers} + --L_layers {L_layers} + --coda_layers {coda_layers} = "
            f"{prelude_layers + L_layers + coda_layers}: the donor has only {donor_layers} layers; lower one of them"
        )
    if keep_donor:
        loop = _kept_block(donor_layers, L_layers, layer_selection, prelude_layers, coda_layers)
        prelude, coda = range(loop[0]), range(loop[-1] + 1, donor_layers)
        selection = layer_selection or ("counts" if prelude_layers or coda_layers else "middle")
    else:
        selection = layer_selection or "uniform"
        inner = donor_layers - prelude_layers - coda_layers
        loop = [prelude_layers + i for i in select_layers(selection, inner, L_layers)]
        prelude, coda = range(prelude_layers), range(donor_layers - coda_layers, donor_layers)
    return ConversionPlan(donor, donor_layers, tuple(prelude), tuple(loop), tuple(coda), selection)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kept_block(N: int, K: int, selection: str | None, prelude: int, coda: int) -> list[int]:
    """The contiguous block that is looped when all layers are kept."""
    if prelude or coda:
        if selection is not None:
            raise UserError(f"--keep_donor: --layer_selection {selection} and prelude or coda counts both place the block; give one only")
        if prelude and coda and prelude + K + coda != N:
            raise UserError(
                f"--keep_donor: prelude {prelude} + loop {K} + coda {coda} must be the donor's {N} layers; "
                f"leave --prelude_layers or --coda_layers out, give --L_layers {N - prelude - coda}, or leave --keep_donor out to drop the "
                "layers between"
            )
        first = prelude or N - K - coda
        return list(range(first, first + K))
    block = select_layers(selection or "middle", N, K)
    if block != list(range(block[0], block[0] + K)):
        raise UserError(
            f"--keep_donor: the loop must be a contiguous block, but --layer_selection {selection} gives {block}; "
            "use middle (the default with --keep_donor), first, last or auto"
        )
    return block


def candidates(donor: str, donor_layers: int, L_layers: int) -> Sequence[ConversionPlan]:
    """The plans that `auto` chooses from: the block at each start, all other layers kept."""
    make_plan(donor, donor_layers, L_layers=L_layers)  # checks L_layers
    plans = []
    for first in range(donor_layers - L_layers + 1):
        last = first + L_layers
        loop, coda = tuple(range(first, last)), tuple(range(last, donor_layers))
        plans.append(ConversionPlan(donor, donor_layers, tuple(range(first)), loop, coda, "auto"))
    return plans
