"""Make a RELION 3.1 Schedule that extracts new micrographs and scores their particles, in rounds.

    cd my_project                       # the folder of the RELION project
    python .../examples/schedule.py --angpix 0.885 --box 256 --score "threshold keep=0.6"
    relion_scheduler --schedule filter --run

Each round imports the micrographs and picks that have come, extracts the new ones, and goes on
with the External job that scores. All jobs are continued, so each keeps its folder and
External/job…/particles_accepted.star grows. docs/schemes.md tells more, and what RELION 4 and 5
need.
"""

import argparse
import subprocess
from itertools import pairwise
from pathlib import Path

from relion_cryofilter.relion.templates import executable

NAME = "filter"
FOLDER = f"Schedules/{NAME}/"
JOB_STAR = """
data_job

_rlnJobType            {kind}
_rlnJobIsContinue       0

data_joboptions_values

loop_
_rlnJobOptionVariable #1
_rlnJobOptionValue #2
"""
IMPORT, EXTRACT, EXTERNAL = 0, 5, 99  # job types of RELION 3.1
COORDINATES = "Particle coordinates (*.box, *_pick.star)"
VARIABLES = {"one": "1", "round": "0", "finished": "False"}
OPERATORS = (
    ("wait", "--i", "wait_sec"),
    ("float=plus", "--i", "round", "--i2", "one", "--o", "round"),
    ("bool=ge", "--i", "round", "--i2", "rounds", "--o", "finished"),
    ("exit",),
)
NEXT_ROUND, LAST_ROUND, WAIT = "round=round_PLUS_one", "finished=round_GE_rounds", "WAIT_wait_sec"


def jobs(options: argparse.Namespace) -> dict[str, tuple[int, dict[str, object]]]:
    """Return type and options of each job by name, in their order."""
    words = [word.split(maxsplit=1) for word in options.score]
    score = {"fn_exe": executable(), "in_part": f"{FOLDER}extract/particles.star",
             "param1_label": "mode", "param1_value": "score"}  # fmt: skip
    for number, (label, value) in enumerate(words, 2):
        score |= {f"param{number}_label": label, f"param{number}_value": value}
    return {
        "import_mics": (IMPORT, {
            "do_raw": "Yes", "is_multiframe": "No", "fn_in_raw": options.micrographs,
            "angpix": options.angpix, "kV": options.kv, "Cs": options.cs, "Q0": 0.1}),
        "import_picks": (IMPORT, {
            "do_raw": "No", "do_other": "Yes", "fn_in_other": options.picks,
            "node_type": COORDINATES}),
        "extract": (EXTRACT, {
            "star_mics": f"{FOLDER}import_mics/micrographs.star",
            "coords_suffix": f"{FOLDER}import_picks/coords_suffix{options.suffix}",
            "extract_size": options.box, "bg_diameter": -1, "do_invert": "Yes", "do_norm": "Yes"}),
        "score": (EXTERNAL, score),
    }  # fmt: skip


def scheduler(*words: str) -> None:
    """Run relion_scheduler; it never waits long for anything but --run."""
    command = ["relion_scheduler", "--schedule", NAME, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def add_job(name: str, kind: int, values: dict[str, object]) -> None:
    """Add a job that is continued whenever the schedule comes back to it."""
    text = JOB_STAR.format(kind=kind) + "".join(f'{k} "{v}"\n' for k, v in values.items()) + "\n"
    temporary = Path(f"{name}job.star")  # relion_scheduler finds it by the job's name, here
    temporary.write_text(text)
    try:
        scheduler("--add", "job", "--i", name, "--mode", "continue")
    finally:
        temporary.unlink()


def main() -> None:
    """Build the schedule in the working directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micrographs", default="Micrographs/*.mrc")
    parser.add_argument("--picks", default="Micrographs/*_pick.star")
    parser.add_argument("--suffix", default="_pick.star", help="What the names of picks end with.")
    parser.add_argument("--angpix", type=float, required=True, help="Å/px of the micrographs.")
    parser.add_argument("--kv", type=float, default=300)
    parser.add_argument("--cs", type=float, default=2.7)
    parser.add_argument("--box", type=int, required=True, help="px")
    parser.add_argument("--score", nargs="*", default=["threshold keep=0.6"],
                        help="E.g. 'weights External/job010/model.safetensors'")  # fmt: skip
    parser.add_argument("--rounds", default="1000")
    parser.add_argument("--wait_sec", default="60", help="Least seconds from round to round.")
    options = parser.parse_args()
    if Path(FOLDER).exists():
        raise SystemExit(f"{FOLDER} exists already; remove it to make it anew.")
    variables = {**VARIABLES, "rounds": options.rounds, "wait_sec": options.wait_sec}
    for name, value in variables.items():
        scheduler("--add", "variable", "--name", name, "--value", value)
    for words in OPERATORS:
        scheduler("--add", "operator", "--type", *words)
    made = jobs(options)
    for name, (kind, values) in made.items():
        add_job(name, kind, values)
    chain = [WAIT, *made, NEXT_ROUND, LAST_ROUND]
    for before, after in pairwise(chain):
        scheduler("--add", "edge", "--i", before, "--o", after)
    scheduler("--add", "fork", "--i", LAST_ROUND, "--bool", "finished", "--o", "EXIT", "--o2", WAIT)
    scheduler("--reset")
    print(f"Made {FOLDER}. Start it with: relion_scheduler --schedule {NAME} --run")


if __name__ == "__main__":
    main()
