"""
What do the policies do with made-up traces? Makes the tables of docs/scheduling.md.

    python bench/scheduling_table.py [--seeds 100] [--write docs/scheduling.md]

The traces are those of the tests (tests/traces.py): 3-6 models, loads of 0.7-0.95, 20-1,600 jobs; beside the lower
bound (tests/lower_bound.py), 2,000 jobs or those of an hour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.lower_bound import lower_bound_s
from tests.traces import KINDS, MAX_WAIT_S, World, make_mixed, make_starvation, make_world
from worker.simulate.policies import PolicyName
from worker.simulate.report import Report

_MARKS = "<!-- tables: made by bench/scheduling_table.py -->", "<!-- end of the tables -->"
_SHOWN = 0, 18  # seeds of the traces that are shown one by one


def main() -> None:
    """Print the tables, or put them between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    seeds = range(given.seeds)
    text = "\n".join(
        [*examples(), "", *against_collation(seeds), "", *with_classes(seeds), "", *against_the_bound(seeds)]
    )
    if given.write is None:
        sys.stdout.write(text + "\n")
        return
    page = given.write.read_text(encoding="utf-8")
    before, rest = page.split(_MARKS[0])
    given.write.write_text(f"{before}{_MARKS[0]}\n{text}\n{_MARKS[1]}{rest.split(_MARKS[1])[1]}", encoding="utf-8")


def examples() -> Iterator[str]:
    """Lay out each policy on a few traces."""
    yield "| trace | policy | makespan s | switches | p95 wait s | max wait s | over the bound |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name, world in shown():
        for policy in PolicyName:
            found = world.report(policy)
            yield (
                f"| {name} | {policy} | {found.makespan_s:,.0f} | {found.switches:,} | {found.p95_wait_s:,.1f} "
                f"| {found.max_wait_s:,.0f} | {found.bound_violations:,} |"
            )


def shown() -> Iterator[tuple[str, World]]:
    """Name the traces that are shown one by one."""
    for kind in KINDS:
        for seed in _SHOWN:
            world = make_world(seed, kind)
            yield f"{kind} {seed}, {len(world.jobs):,} jobs", world
    for seed in _SHOWN[:1]:
        world = make_starvation(seed)
        yield f"starvation {seed}, {len(world.jobs):,} jobs", world


def against_collation(seeds: Sequence[int]) -> Iterator[str]:
    """Lay out how ours compares with plain collation, over many traces of each kind."""
    yield "| traces | number | p95 worse | and collation in the bound | worst p95 | worst makespan | over the bound |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for kind in KINDS:
        yield row(kind, [(world.report(), world.report(PolicyName.COLLATE)) for world in worlds(kind, seeds)])


def worlds(kind: str, seeds: Sequence[int]) -> Iterator[World]:
    """Make the traces of one kind."""
    return (make_world(seed, kind) for seed in seeds)


def row(kind: str, pairs: Sequence[tuple[Report, Report]]) -> str:
    """Sum up the reports of one kind: ours, and collation's."""
    worse = [plain for ours, plain in pairs if ours.p95_wait_s > plain.p95_wait_s + 1e-6]
    within = sum(plain.max_wait_s <= MAX_WAIT_S for plain in worse)
    p95 = max(ours.p95_wait_s / plain.p95_wait_s if plain.p95_wait_s else 1.0 for ours, plain in pairs)
    makespan = max(ours.makespan_s / plain.makespan_s for ours, plain in pairs)
    late = [sum(report.bound_violations > 0 for report in reports) for reports in zip(*pairs, strict=True)]
    cells = len(pairs), len(worse), within, f"{100 * (p95 - 1):+.1f} %", f"{100 * (makespan - 1):+.1f} %"
    return f"| {kind} | {' | '.join(map(str, cells))} | {late[0]} (collation {late[1]}) |"


def with_classes(seeds: Sequence[int]) -> Iterator[str]:
    """Lay out the bound and the deadlines where jobs have classes, tenants and deadlines."""
    pairs = [(world.report(), world.report(PolicyName.COLLATE)) for world in map(make_mixed, seeds)]
    kept = [(ours, plain) for ours, plain in pairs if not plain.bound_violations]
    yield "| traces | number | collation in the bound | ours over it there | jobs | deadlines missed | by collation |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    over = [ours.bound_violations for ours, _ in kept if ours.bound_violations]
    missed = (sum(report.deadline_misses for report in reports) for reports in zip(*kept, strict=True))
    cells = len(pairs), len(kept), len(over), f"{sum(over)} of {sum(ours.jobs for ours, _ in kept):,}"
    yield f"| classes and deadlines | {' | '.join([*map(str, cells), *(f'{sum_:,}' for sum_ in missed)])} |"


_ALLOWED = 1.10  # of what no schedule can beat
_LONG = 15_000  # traces of more jobs are left out, lest it takes long


def against_the_bound(seeds: Sequence[int]) -> Iterator[str]:
    """Lay out how the makespan compares with what no schedule can beat, by jobs at once."""
    arriving = [kind for kind in KINDS if kind != "at once"]
    yield "| traces, by jobs at once | 1 | 4 | 16 | 64 |"
    yield "| --- | --- | --- | --- | --- |"
    yield over_the_bound("2,000 jobs, all there", (make_world(seed, "at once", count=2000) for seed in seeds))
    short = (make_world(seed, kind, count=2000) for kind in arriving for seed in seeds)
    yield over_the_bound("2,000 jobs, arriving", short)
    long = (make_world(seed, kind, lasts_s=3600) for kind in arriving for seed in seeds)
    yield over_the_bound("arriving for an hour, none over the bound", long, kept=True)


def over_the_bound(name: str, worlds: Iterable[World], *, kept: bool = False) -> str:
    """Sum up the makespans of one kind, as ratios to the bound: the mean, the worst, how many over 1.10."""
    ratios: dict[int, list[float]] = {1: [], 4: [], 16: [], 64: []}
    for world in worlds:
        if len(world.jobs) > _LONG:
            continue
        found = world.report()
        if not (kept and found.bound_violations):
            ratios[world.costs["m0"].max_num_seqs].append(found.makespan_s / lower_bound_s(world))
    cells = (
        f"{mean(some):.2f}, at worst {max(some):.2f}; {sum(one > _ALLOWED for one in some)} of {len(some)} over 1.10"
        if some
        else ""
        for some in ratios.values()
    )
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
