"""Cost of deep supervision over a loss at the last cycle alone."""

from __future__ import annotations

from collections.abc import Iterator

from recursify.training.cost import step_flops

from .case import Bench, Check, Table, case
from .measure import alternate, ratio, say
from .models import HALF_B, TOY, recursive_config
from .profile import training_step
from .training import CYCLE, LAST, Batch, applications, flops

BOUND = 1.10


@case("supervision", "Supervision of every cycle")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """Steps with every cycle scored (`--backprop cycle`) and with the last alone (`--backprop last`) take turns, of the compact model of
    the case before; without loader and log. The guides expected 2 to 3 times the time. The work differs: the first goes back through
    all cycles and reads three out, the second through one. Memory is in the case before.
    """
    batch, config = bench.pick(Batch(2, 32), Batch(1, 128), Batch(8, 1024)), recursive_config(bench.pick(TOY, HALF_B, HALF_B).config())
    say("supervision: both ways")
    sides = {way.name: training_step(way, batch, bench) for way in (CYCLE, LAST)}
    times = alternate(sides, bench.pick(1, 2, 8), bench.device)
    donor = bench.pick(TOY, HALF_B, HALF_B).config()
    passes = applications(config, CYCLE, donor.num_hidden_layers) / applications(config, LAST, donor.num_hidden_layers)
    work = flops(config, CYCLE, batch) / flops(config, LAST, batch)
    took = ratio(times[CYCLE.name], times[LAST.name])
    row = {
        "batch": str(batch),
        "time, every cycle / last": took,
        "layer applications": passes,
        "FLOPs": work,
        "time / FLOPs": ratio(times[CYCLE.name], times[LAST.name], by=work),
        "limit": f"{step_flops(config, batch.tokens, batch.length, supervised=3, backprop='cycle') / 1e9:,.0f} GFLOP a step",
    }
    yield Table("Time of a step", [row])
    yield Check("supervision of every cycle over none: time / FLOPs", took["median"] / work, most=BOUND)
