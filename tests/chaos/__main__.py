"""
Runs the chaos suite: python -m tests.chaos --seeds 1 2 3 --jobs 500 --faults 36
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.chaos.faults import draw_faults
from tests.chaos.report import as_table, write_table
from tests.chaos.run import make_jobs, run_storm
from tests.chaos.world import LEASE_S


def main() -> int:
    """Run a quiet run and one storm for each seed; returns 1 if a promise was broken."""
    options = _parser().parse_args()
    jobs = make_jobs(options.jobs)
    quiet, expected = run_storm(jobs, (), keep=options.keep)
    print(f"quiet run: {len(jobs)} jobs in {quiet.took_s:.0f} s", flush=True)
    if not quiet.whole:
        print(quiet, flush=True)
    reports = []
    for seed in options.seeds:
        faults = draw_faults(seed, options.faults, lease_s=LEASE_S)
        keep = None if options.keep is None else options.keep.with_name(f"{options.keep.name}-{seed}")
        report, _ = run_storm(jobs, faults, expected=expected, seed=seed, keep=keep)
        print(report, flush=True)
        reports.append(report)
    if options.write is not None:
        write_table(options.write, as_table(reports))
    return 0 if all(report.whole for report in (quiet, *reports)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--faults", type=int, default=36)
    parser.add_argument("--keep", type=Path, help="where to leave the files of a run that broke a promise")
    parser.add_argument("--write", type=Path, help="the page whose table to replace: docs/reliability.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
