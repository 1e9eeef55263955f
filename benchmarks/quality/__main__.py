"""Quality of the default model beside the 2020 networks and linear baselines.

    python benchmarks/quality --maps FOLDER [--real FOLDER] --work FOLDER [--seeds 3] [--j 2]

Runs what is not in --work yet, then writes benchmarks/results/quality.md from all that is there;
a stopped benchmark goes on. --maps holds the densities of the simulated sets (1u6g, 5gjv,
4v4r_30S); --real, for each real set, NAME.mrcs and NAME.csv (image, micrograph, label).
"""

import argparse
import multiprocessing
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path

from classes import classified_sets
from nulls import NULLS, do_null
from runs import do, runs_of
from sets import all_sets
from table import report


def main() -> None:
    """Do the runs and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--j", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only", help="Only models whose names this regular expression finds; null: the nulls."
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.md"))
    options = parser.parse_args()
    sets = list(all_sets(options.real, options.maps, options.work))
    sets += classified_sets(options.maps, options.work)
    of_each = [[(data, run, options.work) for run in runs_of(data, options.seeds)] for data in sets]
    jobs = [
        job
        for round_of_jobs in zip_longest(*of_each)
        for job in round_of_jobs
        if job and (not options.only or re.search(options.only, job[1].model))
    ]
    with multiprocessing.get_context("spawn").Pool(options.j) as pool:
        nulls = [
            pool.apply_async(do_null, (data, kind, seed, options.work))
            for kind, count in NULLS.items()
            for seed in range(count)
            for data in sets
            if options.only in (None, "null")
        ]
        waiting = [pool.apply_async(do, job) for job in jobs]
        for number, (job, done) in enumerate(zip(jobs, waiting), 1):
            done.get()
            print(f"{number} of {len(jobs)}: {job[0].name}, {job[1].stem}", flush=True)
        for done in nulls:
            done.get()
    options.out.write_text(report(sets, options.work, options.seeds))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
