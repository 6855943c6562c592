"""
How often the range that producers are told holds, on the made-up traces of the tests; the table of docs/scheduling.md.

    python -m bench.forecast_table
"""

from __future__ import annotations

from statistics import mean, median

from tests.traces import KINDS, make_world
from tests.unit.simulate.test_forecast import Asked, noisy, traffic_of

SEEDS = 30


def main() -> None:
    """Print a row for each kind of trace, and moment of asking."""
    print(  # noqa: T201
        "| trace | asked when | jobs | ended within the range | of those no later job moved | width of the range |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |"
    )
    rows = [(kind, 200, False) for kind in KINDS]
    rows += [("steady", 300, True), ("bursts", 300, True), ("bursts of one model", 300, True), ("at once", 1500, False)]
    for kind, count, midway in rows:
        asked = Asked()
        for seed in range(SEEDS):
            world = noisy(make_world(seed, kind, count=count), 0.5)
            if midway:
                asked.ask(world, world.jobs[count // 2].arrival_s, traffic=traffic_of(world))
            else:
                asked.ask(world, max(job.arrival_s for job in world.jobs))
        when = "half of the jobs have come" if midway else "all jobs have come"
        print(  # noqa: T201
            f"| {kind}, {count:,} jobs | {when} | {len(asked.held)} | {mean(asked.held):.0%} "
            f"| {mean(asked.unmoved):.0%} | {median(asked.widths):.0%} |"
        )


if __name__ == "__main__":
    main()
