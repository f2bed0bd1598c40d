"""Plans: the indices in the guides, properties of each selection, and refused flags."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recursify.conversion.layer_selection import SELECTIONS, candidates, make_plan, select_layers
from recursify.errors import UserError
from recursify.network.plan import ConversionPlan

COUNTED = [name for name in SELECTIONS if name != "auto"]
SIZES = [(N, K) for N in range(1, 49) for K in range(1, N + 1)]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """A donor of up to 48 layers, and counts that fit into it."""
    N = draw(st.integers(1, 48))
    K = draw(st.integers(1, N))
    prelude = draw(st.integers(0, N - K))
    return {"donor_layers": N, "L_layers": K, "prelude_layers": prelude, "coda_layers": draw(st.integers(0, N - K - prelude))}


def test_the_indices_that_the_guides_print() -> None:
    assert select_layers("uniform", 24, 4) == [0, 8, 16, 23]
    assert select_layers("stride", 24, 4) == [0, 6, 12, 18]
    assert make_plan("donor", 24).loop == (0, 8, 16, 23)


@pytest.mark.parametrize(
    ("selection", "N", "K", "layers"),
    [
        ("stride", 7, 3, [0, 2, 4]),  # 0, 2.33, 4.67
        ("stride", 8, 5, [0, 1, 3, 4, 6]),  # 0, 1.6, 3.2, 4.8, 6.4
        ("stride", 5, 1, [0]),
        ("uniform", 9, 4, [0, 3, 6, 8]),  # 0, 2.67, 5.33, 8
        ("uniform", 10, 5, [0, 3, 5, 7, 9]),  # 0, 2.25, 4.5, 6.75, 9
        ("uniform", 7, 1, [3]),
        ("uniform", 8, 1, [4]),
        ("middle", 8, 1, [4]),
        ("middle", 7, 4, [1, 2, 3, 4]),
        ("middle", 8, 3, [2, 3, 4]),
        ("last", 7, 3, [4, 5, 6]),
    ],
)
def test_odd_counts_by_hand(selection: str, N: int, K: int, layers: list[int]) -> None:
    assert select_layers(selection, N, K) == layers
    assert make_plan("donor", N + 3, L_layers=K, layer_selection=selection, prelude_layers=2, coda_layers=1).loop == tuple(
        2 + layer for layer in layers
    )


@pytest.mark.parametrize("selection", COUNTED)
def test_distinct_ascending_in_range_for_every_size(selection: str) -> None:
    for N, K in SIZES:
        layers = select_layers(selection, N, K)
        assert len(layers) == K and layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < N, (N, K)


def test_properties_of_each_selection() -> None:
    for N, K in SIZES:
        assert K == 1 or (select_layers("uniform", N, K)[0], select_layers("uniform", N, K)[-1]) == (0, N - 1)
        assert select_layers("first", N, K) == list(range(K))
        assert select_layers("last", N, K) == list(range(N - K, N))
        middle = select_layers("middle", N, K)
        assert middle == list(range(middle[0], middle[0] + K))
        assert K == 1 or middle[0] - (N - 1 - middle[-1]) in (0, -1)
        assert select_layers("uniform", N, 1) == select_layers("middle", N, 1) == [N // 2]


@pytest.mark.parametrize("selection", COUNTED)
@given(shape=shapes())
def test_counts_keep_the_ends_and_choose_the_loop_between(selection: str, shape: dict[str, Any]) -> None:
    plan = make_plan("donor", layer_selection=selection, **shape)
    N, P, C = shape["donor_layers"], shape["prelude_layers"], shape["coda_layers"]
    assert plan.prelude == tuple(range(P)) and plan.coda == tuple(range(N - C, N))
    assert [i - P for i in plan.loop] == select_layers(selection, N - P - C, shape["L_layers"])
    assert plan.indices == sorted(set(plan.indices))
    assert sorted(plan.indices + plan.dropped) == list(range(N))
    assert plan.layer_selection == selection


@given(shape=shapes(), selection=st.sampled_from([None, "first", "last", "middle"]))
def test_keep_donor_runs_every_layer_once_in_order(shape: dict[str, Any], selection: str | None) -> None:
    plan = make_plan("donor", shape["donor_layers"], L_layers=shape["L_layers"], layer_selection=selection, keep_donor=True)
    assert plan.indices == list(range(shape["donor_layers"])) and not plan.dropped and plan.keeps_donor
    assert list(plan.loop) == select_layers(selection or "middle", shape["donor_layers"], shape["L_layers"])
    assert plan.layer_selection == (selection or "middle")


@given(shape=shapes())
def test_keep_donor_with_one_count_places_the_block(shape: dict[str, Any]) -> None:
    N, K, P = shape["donor_layers"], shape["L_layers"], shape["prelude_layers"]
    if P:
        plan = make_plan("donor", N, L_layers=K, prelude_layers=P, keep_donor=True)
        assert plan.loop[0] == P and plan.keeps_donor and plan.layer_selection == "counts"
        assert plan == make_plan("donor", N, L_layers=K, prelude_layers=P, coda_layers=N - K - P, keep_donor=True)
    if C := shape["coda_layers"]:
        plan = make_plan("donor", N, L_layers=K, coda_layers=C, keep_donor=True)
        assert len(plan.coda) == C and plan.keeps_donor and plan.layer_selection == "counts"
        assert plan.loop == tuple(range(N - K - C, N - C))


def test_a_compact_plan_of_all_layers_keeps_the_donor() -> None:
    assert make_plan("donor", 5, L_layers=5).keeps_donor
    assert not make_plan("donor", 6, L_layers=5).keeps_donor
    assert not make_plan("donor", 6, L_layers=5, layer_selection="first").keeps_donor


@given(shape=shapes())
def test_every_layer_has_one_place(shape: dict[str, Any]) -> None:
    plan = make_plan("donor", **shape)
    places = [plan.place(i) for i in range(plan.donor_layers)]
    assert places.count("dropped") == len(plan.dropped)
    parts = [("prelude", plan.prelude), ("L_level", plan.loop), ("coda", plan.coda)]
    assert [place for place in places if place != "dropped"] == [f"{part} {i}" for part, layers in parts for i in range(len(layers))]


@given(shape=shapes())
def test_json_round_trip(shape: dict[str, Any]) -> None:
    plan = make_plan("some/donor", **shape)
    assert ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_defaults() -> None:
    assert make_plan("donor", 9) == ConversionPlan("donor", 9, (), (0, 3, 6, 8), (), "uniform")
    assert make_plan("donor", 9, keep_donor=True) == ConversionPlan("donor", 9, (0, 1), (2, 3, 4, 5), (6, 7, 8), "middle")


def test_layers_in_another_order_are_not_the_donor() -> None:
    swapped = ConversionPlan("donor", 4, (0,), (2, 1), (3,), "by hand")
    assert not swapped.keeps_donor and not swapped.dropped and swapped.place(1) == "L_level 1"


def test_candidates_of_auto() -> None:
    for N, K in ((8, 3), (5, 5), (4, 1)):
        plans = candidates("donor", N, K)
        assert [plan.loop[0] for plan in plans] == list(range(N - K + 1))
        assert all(plan.keeps_donor and len(plan.loop) == K and plan.layer_selection == "auto" for plan in plans)
    with pytest.raises(UserError, match=r"--L_layers: expected 1 to 4 \(the donor has 4 layers\), got 9"):
        candidates("donor", 4, 9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"L_layers": 0}, r"--L_layers: expected 1 to 24 \(the donor has 24 layers\), got 0"),
        ({"L_layers": -3}, r"--L_layers: expected 1 to 24 .*, got -3"),
        ({"L_layers": 25}, r"--L_layers: expected 1 to 24 .*, got 25"),
        ({"L_layers": 2.5}, r"--L_layers: expected 1 to 24 .*, got 2.5"),
        ({"L_layers": True}, r"--L_layers: expected 1 to 24 .*, got True"),
        ({"prelude_layers": -1}, "--prelude_layers: expected a whole number of at least 0, got -1"),
        ({"coda_layers": -2}, "--coda_layers: expected a whole number of at least 0, got -2"),
        ({"coda_layers": "2"}, "--coda_layers: expected a whole number of at least 0, got '2'"),
        (
            {"prelude_layers": 11, "coda_layers": 10},
            r"--prelude_layers 11 \+ --L_layers 4 \+ --coda_layers 10 = 25: the donor has only 24 layers; lower one of them",
        ),
        ({"layer_selection": "random"}, "--layer_selection: expected one of uniform, first, last, middle, stride, auto, got 'random'"),
        ({"layer_selection": "random", "L_layers": 1}, "--layer_selection: expected one of .*, got 'random'"),
        ({"layer_selection": "auto"}, "--layer_selection auto: needs the donor, not only its number of layers; .* --calibration_file"),
        (
            {"keep_donor": True, "layer_selection": "uniform"},
            r"--keep_donor: the loop must be a contiguous block, but --layer_selection uniform gives \[0, 8, 16, 23\]; use middle",
        ),
        ({"keep_donor": True, "layer_selection": "stride"}, r"--layer_selection stride gives \[0, 6, 12, 18\]; use middle"),
        (
            {"keep_donor": True, "layer_selection": "last", "prelude_layers": 2},
            "--layer_selection last and prelude or coda counts both place",
        ),
        (
            {"keep_donor": True, "prelude_layers": 8, "coda_layers": 8},
            r"--keep_donor: prelude 8 \+ loop 4 \+ coda 8 must be the donor's 24 layers; leave --prelude_layers or --coda_layers out",
        ),
    ],
)
def test_invalid_flags_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan("donor", 24, **flags)


@pytest.mark.parametrize(("prelude", "coda"), [(8, 8), (1, 2)])
def test_every_remedy_for_a_gap_gives_a_plan(prelude: int, coda: int) -> None:
    flags: dict[str, Any] = {"L_layers": 4, "keep_donor": True, "prelude_layers": prelude, "coda_layers": coda}
    with pytest.raises(UserError) as refused:
        make_plan("donor", 24, **flags)
    (filling,) = re.findall(r"give --L_layers (\d+)", str(refused.value))
    loops = [
        make_plan("donor", 24, **flags | changed).loop
        for changed in ({"coda_layers": 0}, {"prelude_layers": 0}, {"L_layers": int(filling)}, {"keep_donor": False})
    ]
    assert loops[0] == tuple(range(prelude, prelude + 4)) and loops[1] == tuple(range(20 - coda, 24 - coda))
    assert loops[2] == tuple(range(prelude, 24 - coda)) and len(loops[3]) == 4


@pytest.mark.parametrize(("N", "K"), [(0, 1), (3, 0), (3, 4)])
def test_layer_count_out_of_range_is_refused(N: int, K: int) -> None:
    with pytest.raises(UserError, match=rf"--L_layers: expected 1 to {N} \(the layers to choose from\), got {K}"):
        select_layers("uniform", N, K)
