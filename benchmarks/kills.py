"""Kill jobs at random moments, start them again, compare with an undisturbed run.

The modes are score, train and select.

Usage: ``python -m benchmarks.kills --kills 30 --shells 2``. Each kill is a SIGKILL at a random
moment up to a little after the time at which the undisturbed run leaves its first result; with two
shells, of both programs that were started in one folder at once (one of them is refused). They are
forked from a program that has imported everything, so that kills meet their work rather than their
start. After one or a few kills in one folder the job is started again and run to its end: its
results must be byte for byte those of the undisturbed run, with one exit file and nothing
unfinished left behind. A line a mode says how many kills there were, and when: before any result,
among results, or after the end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from relion_cryofilter.relion import job
from relion_cryofilter.simulate import simulate_project, simulate_selection

ROOT = Path(__file__).resolve().parents[1]
PARTICLES, SCORED = "Extract/job001/particles.star", "scored/particles.star"
MODES = {
    "score": f"score --in_parts {PARTICLES} --j 1 --batch_size 16",
    "train": "train --in_parts Select/job003/particles.star --j 1 --epochs 2",
    "select": f"select --in_parts {SCORED} --threshold keep=0.4",
}


def start(mode: str, folder: str) -> int:
    """Start a mode that writes into `folder`, as a process of its own; return its number."""
    return forked(lambda: job.main([*MODES[mode].split(), "--o", folder, "--quiet"]))


def forked(work: Callable[[], int]) -> int:
    """Do `work` in a copy of this process, in which everything is imported; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = work()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process and return its exit code; below 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
    for pid in running:
        os.kill(pid, signal.SIGKILL)  # one that has ended waits to be asked
    if not any(ended(pid) == -signal.SIGKILL for pid in running):
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
    for name in ("commands.score", "commands.train", "commands.select", "results.report"):
        import_module(f"relion_cryofilter.{name}")
    for name in ("matplotlib.figure", "matplotlib.backends.backend_pdf", "PIL.Image", "pandas"):
        import_module(name)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        assert ended(forked(simulated)) == 0
        os.chdir("p")
        assert ended(start("score", "scored")) == 0
        failures = sum(run(mode, options) for mode in options.modes)
        os.chdir(ROOT)
    sys.exit(1 if failures else 0)


def simulated() -> int:
    """Make the project p, with a Select job."""
    simulate_selection(
        simulate_project("p", n_micrographs=8, particles_per_micrograph=20, snr=0.1, seed=1)
    )
    return 0


def run(mode: str, options: argparse.Namespace) -> int:
    """Kill one mode many times; return how often the results were not what they should be."""
    begin = time.monotonic()
    pid = start(mode, f"{mode}_whole")
    while not results(Path(f"{mode}_whole")):
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    assert ended(pid) == 0
    whole = results(Path(f"{mode}_whole"))
    rng, moments, failures = random.Random(options.seed), Counter[str](), 0
    folder = Path(f"{mode}_killed")
    for number in range(options.kills):
        moments[kill(mode, folder, rng.uniform(0, 1.2 * seconds), options.shells)] += 1
        if rng.random() < 0.4 and number + 1 < options.kills:
            continue
        code = ended(start(mode, folder.name))
        exits = [path.name for path in folder.glob("RELION_JOB_EXIT_*")]
        hidden = [path.name for path in folder.glob(".*")]
        if code or results(folder) != whole or exits != ["RELION_JOB_EXIT_SUCCESS"] or hidden:
            failures += 1
            print(f"{mode}: after kill {number + 1}: code {code}, {exits}, {hidden}")
        shutil.rmtree(folder)
    said = ", ".join(f"{count} {when}" for when, count in sorted(moments.items()))
    print(f"{mode}: {options.kills} kills of {options.shells} at once ({said}), the first result "
          f"after {seconds:.1f} s: {failures} results that differ", flush=True)  # fmt: skip
    return failures


if __name__ == "__main__":
    main()
