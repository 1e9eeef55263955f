"""Kill jobs at random moments, start them again, compare with an undisturbed run.

The modes are score, train and select.

Usage: ``python -m benchmarks.kills --kills 30 --shells 2``. Each kill is a SIGKILL after a random
part of the time that the undisturbed run takes, or, with two shells, of both programs that were
started in the same folder at once (one of which is refused, whoever comes first). After one or
a few kills in one folder the job is started again and run to its end: its results must be byte for
byte those of the undisturbed run, with one exit file and nothing unfinished left behind. A line a
mode says how many kills there were, and when: before any result, among results, or after the end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from relion_cryofilter.simulate import simulate_project, simulate_selection

ROOT = Path(__file__).resolve().parents[1]
PARTICLES, SCORED = "Extract/job001/particles.star", "scored/particles.star"
MODES = {
    "score": f"score --in_parts {PARTICLES} --j 1 --batch_size 16",
    "train": "train --in_parts Select/job003/particles.star --j 1 --epochs 3",
    "select": f"select --in_parts {SCORED} --threshold keep=0.4",
}


def start(mode: str, folder: str) -> subprocess.Popen[bytes]:
    """Start a mode that writes into `folder`."""
    words = [sys.executable, "-m", "relion_cryofilter", *MODES[mode].split(), "--o", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        words, stdout=nothing, stderr=nothing, env=environment, start_new_session=True
    )


def results(folder: Path) -> dict[str, bytes]:
    """Return what must be the same after every run: results without reports and times."""
    names = ("*.star", "scores.csv", "*.safetensors", "metrics.json", "predictions.csv")
    found = {path.name: path.read_bytes() for name in names for path in folder.glob(name)}
    found.pop("RELION_OUTPUT_NODES.star", None)  # has the folder's name
    return found


def kill(mode: str, folder: Path, seconds: float, shells: int) -> str:
    """Start `shells` programs at once, kill them after some time; say what was there then."""
    running = [start(mode, folder.name) for _ in range(shells)]
    time.sleep(seconds)
    alive = [process for process in running if process.poll() is None]
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not alive:
        return "after the end"
    return "among results" if results(folder) else "before results"


def main() -> None:
    """Run it in a new folder, or in the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of each mode")
    parser.add_argument("--shells", type=int, default=1, help="programs at once in the folder")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        star = simulate_project("p", n_micrographs=14, particles_per_micrograph=60, snr=0.1, seed=1)
        simulate_selection(star)
        os.chdir("p")
        assert start("score", "scored").wait() == 0
        failures = sum(run(mode, options) for mode in options.modes)
        os.chdir(ROOT)
    sys.exit(1 if failures else 0)


def run(mode: str, options: argparse.Namespace) -> int:
    """Kill one mode many times; return how often the results were not what they should be."""
    begin = time.monotonic()
    assert start(mode, f"{mode}_whole").wait() == 0
    whole, seconds = results(Path(f"{mode}_whole")), time.monotonic() - begin
    rng, moments, failures = random.Random(options.seed), Counter[str](), 0
    folder = Path(f"{mode}_killed")
    for number in range(options.kills):
        moments[kill(mode, folder, rng.uniform(0, seconds), options.shells)] += 1
        if rng.random() < 0.4 and number + 1 < options.kills:
            continue
        code = start(mode, folder.name).wait()
        exits = [path.name for path in folder.glob("RELION_JOB_EXIT_*")]
        hidden = [path.name for path in folder.glob(".*")]
        if code or results(folder) != whole or exits != ["RELION_JOB_EXIT_SUCCESS"] or hidden:
            failures += 1
            print(f"{mode}: after kill {number + 1}: code {code}, {exits}, {hidden}")
        shutil.rmtree(folder)
    said = ", ".join(f"{count} {when}" for when, count in sorted(moments.items()))
    print(f"{mode}: {options.kills} kills of {options.shells} at once ({said}), a whole run takes "
          f"{seconds:.1f} s: {failures} results that differ", flush=True)  # fmt: skip
    return failures


if __name__ == "__main__":
    main()
