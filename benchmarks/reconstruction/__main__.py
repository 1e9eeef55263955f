"""From picks to a map: what a filter does for it, beside 2D classes and random subsets.

    python benchmarks/reconstruction --maps FOLDER --work FOLDER [--seeds 1] [--j 2] [--only ARM]

Simulates picks of a molecule that no pre-training has seen, half of them junk of all kinds, sorts
them in several ways (arms.py), aligns all picks to the low-passed true map (RELION 3.1.3, all
orientations), and refines each arm by itself from there (`relion_refine_mpi --auto_refine`, local
searches, half sets). Does what is not in --work yet, so a stopped benchmark goes on, then writes
benchmarks/results/reconstruction.md and .png from all that is there.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))

import arms as arms_module
import picks as picks_module
import refine as refine_module
from arms import arms
from map_table import plot, report
from picks import picks
from refine import FINAL, Map, aligned, job_of, refined

from relion_cryofilter.nn.model import BUNDLED_MODEL, START_MODEL, load_model


def main() -> None:
    """Do the refinements and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--j", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only",
        help="Only arms whose names this regular expression finds, and those that are done.",
    )
    out = Path(__file__).resolve().parents[1] / "results/reconstruction.md"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    _require_same_settings(options.work / "settings.json")
    truth = picks(options.maps, options.work)
    sorted_in = arms(options.work, truth, options.j)
    start = aligned(truth, options.work, options.j)
    maps: dict[str, list[Map]] = {name: [] for name in sorted_in}
    for seed in range(1, options.seeds + 1):
        for name, kept in sorted_in.items():
            done = (options.work / job_of(name, seed) / FINAL).exists()
            if done or not options.only or re.search(options.only, name):
                maps[name].append(refined(name, kept, truth, options.work, seed, start))
                print(f"{name}, seed {seed}: {np.count_nonzero(kept):,} picks", flush=True)
    options.out.write_text(report(sorted_in, maps, truth))
    plot(maps, truth, options.out.with_suffix(".png"))
    print(f"wrote {options.out}")


def _require_same_settings(path: Path) -> None:
    """Keep what the results of a folder depend on; end where they are of something else."""
    settings: dict[str, object] = {
        name: value
        for module in (picks_module, arms_module, refine_module)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, (int, float, str))
    }
    settings["models"] = [load_model(model).hash for model in (BUNDLED_MODEL, START_MODEL)]
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{path.parent} holds results of other settings ({path.name}): name a new --work.")
    path.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    sys.exit(main())
