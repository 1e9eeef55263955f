"""How fast particles are scored: against reading the same bytes, and against the 2020 program.

    python benchmarks/score.py --work FOLDER [--n 20000] [--box 256] [--j 2] [--only TEXT]
        [--original "PYTHON CRYOFILTER/score.py" --original_weights WEIGHTS.h5]

Makes stacks of noise (20,000 images of 256 x 256 px are 5.2 GB, and half that as float16), then
runs each line in a process of its own. CPU seconds are user and system time of all threads
from the first batch to the last. "2020" is that program's algorithm on part of the same images:
scikit-image's blur, resize and Roberts cross, its network in torch, batches of 32, one image
after the other; eight views in turn with TTA. Reading is the package's own reader and nothing
else, in the same process just before; cold lines drop the files from the page cache first.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PER_STACK = 500
OF_2020 = 600
SHARE = 10  # a tenth of the images for the slow lines


def lines_of(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return what to measure."""
    lines: list[dict[str, object]] = []
    for model in ("default", "straight 28", "roberts 28", "straight 64"):
        lines += [
            {"model": model, "tta": tta, "precision": precision}
            for precision in ("float32", "bf16")
            for tta in (False, True)
        ]
    lines += [
        {"images": "float16"},
        {"images": "float16", "precision": "bf16"},
        {"threads": 1},
        {"disk": "cold"},
        {"disk": 700},
        {"disk": 1000},
    ]
    usual = {
        "model": "default", "tta": False, "images": "float32", "precision": "float32",
        "threads": options.j, "disk": "warm", "work": str(options.work), "what": "now",
    }  # fmt: skip
    return [{**usual, **line} for line in lines]


def make(folder: Path, n: int, box: int) -> None:
    """Write float32 and float16 stacks, unless they are there."""
    from relion_cryofilter.particles.stacks import read_header

    rng = np.random.default_rng(0)
    images = rng.normal(size=(PER_STACK, box, box)).astype(np.float32)
    for kind, mode in (("float32", 2), ("float16", 12)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(n // PER_STACK):
            path = folder / kind / f"{number:04d}.mrcs"
            if path.exists() and read_header(path).n_complete == PER_STACK:
                continue
            header = np.zeros(256, "<i4")
            header[:4] = box, box, PER_STACK, mode
            header[7:10] = box, box, 1
            header[52:54] = np.frombuffer(b"MAP \x44\x44\0\0", "<i4")
            data = np.roll(images, number, axis=0).astype(kind)
            path.write_bytes(header.tobytes() + data.tobytes())


def cpu() -> float:
    """Return CPU seconds of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def clocked(work: Callable[[], None]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - wall, cpu() - used


def measure(line: dict[str, object]) -> dict[str, float]:
    """Read and score in this process, score as in 2020, or only start."""
    from relion_cryofilter.images.bad import check_stacks
    from relion_cryofilter.images.batches import map_batches
    from relion_cryofilter.nn.scoring import How, score_particles
    from relion_cryofilter.particles.particles import particles_of_stacks
    from relion_cryofilter.progress import Progress

    paths = sorted((Path(str(line["work"])) / str(line["images"])).glob("*.mrcs"))
    if line["what"] == "2020":
        return {"per_cpu": rate_of_2020(paths[0], str(line["model"]), bool(line["tta"]))}
    if line["what"] == "start":
        return {"start": time_to_first_batch(paths[0], float(str(line["began"])))}
    paths = paths if line["model"] == "default" else paths[: max(1, len(paths) // SHARE)]
    particles, model = particles_of_stacks(paths), model_of(line)
    headers, _ = check_stacks(particles)
    threads = int(str(line["threads"]))
    rows = np.arange(len(particles))

    def read() -> None:
        for _ in map_batches(lambda images: None, particles, rows, headers, threads=threads):
            pass

    def score() -> None:
        score_particles(
            particles, [model], Progress(len(rows), "particles"),
            How(threads=threads, tta=bool(line["tta"])),
        )  # fmt: skip

    warm = particles.take(rows[:64])
    score_particles(warm, [model], Progress(64, "particles"), How(tta=bool(line["tta"])))
    read()
    if isinstance(line["disk"], int):
        pace(line["disk"] * 1e6)
    forget(paths, line["disk"] == "cold")
    reading, _ = clocked(read)
    forget(paths, line["disk"] == "cold")
    wall, used = clocked(score)
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    n = len(rows)
    return {"rate": n / wall, "of_reading": reading / wall, "per_cpu": n / used, "mb": peak}


def time_to_first_batch(path: Path, began: float) -> float:
    """Return seconds from the start of the process to the end of a small first batch."""
    import relion_cryofilter.commands.score  # noqa: F401  # all that the job imports
    from relion_cryofilter.nn.model import BUNDLED_MODEL, load_model
    from relion_cryofilter.nn.scoring import score_particles
    from relion_cryofilter.particles.particles import particles_of_stacks
    from relion_cryofilter.progress import Progress

    one = particles_of_stacks([path]).take(np.arange(1))
    score_particles(one, [load_model(BUNDLED_MODEL)], Progress(1, "particles"))
    return time.time() - began


def pace(bytes_per_second: float) -> None:
    """Let all threads together read so many bytes a second from now on."""
    from relion_cryofilter.particles import stacks

    read, disk = stacks._read_fully, threading.Lock()

    def slow(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
        with disk:
            end = time.perf_counter() + len(view) / bytes_per_second
            read(descriptor, view, offset, path)
            time.sleep(max(0.0, end - time.perf_counter()))

    stacks._read_fully = slow


def forget(paths: list[Path], cold: bool) -> None:
    """Drop files from the page cache."""
    if cold:
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def model_of(line: dict[str, object]):
    """Return the model of a line, in its precision."""
    from dataclasses import replace

    import torch

    from relion_cryofilter.images.preprocess import BlurResize
    from relion_cryofilter.nn.model import BUNDLED_MODEL, PRECISIONS, Model, load_model
    from relion_cryofilter.nn.networks import build_network

    precision = PRECISIONS[str(line["precision"])]
    if line["model"] == "default":
        return replace(load_model(BUNDLED_MODEL), precision=precision)
    name, dim = str(line["model"]).split()
    torch.manual_seed(0)
    network = build_network(name, f=32, dim=int(dim))
    recipe = BlurResize(int(dim), roberts=name == "roberts")
    return Model(network, recipe, threshold=0.5, precision=precision)


def rate_of_2020(path: Path, model: str, tta: bool) -> float:
    """Return particles a CPU second of the 2020 algorithm; the default is held to roberts."""
    import mrcfile
    import torch
    from program_2020 import prepared

    from relion_cryofilter.images.preprocess import d4_views
    from relion_cryofilter.nn.networks import build_network

    name, dim = model.split() if " " in model else ("roberts", "28")
    torch.set_num_threads(1)
    network, size = build_network(name, f=32, dim=int(dim)).eval(), int(dim)
    with mrcfile.mmap(path, permissive=True) as file:
        raw = file.data[: OF_2020 // (4 if tta else 1)]
    both = network.channels > 1

    def score() -> None:
        with torch.inference_mode():
            for first in range(0, len(raw), 32):
                batch = [prepared(one, size, both) for one in raw[first : first + 32]]
                maps = torch.from_numpy(np.stack(batch))
                views = list(d4_views(maps)) if tta else [maps]
                torch.stack([torch.sigmoid(network(view.contiguous())) for view in views]).mean(0)

    _, used = clocked(score)
    return len(raw) / used


def in_a_process(line: dict[str, object]) -> dict[str, float]:
    """Return what `measure` finds in a fresh process."""
    command = [sys.executable, __file__, "--work", str(line["work"]), "--line", json.dumps(line)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def rate_of_original(options: argparse.Namespace, tta: bool) -> float:
    """Return images a CPU second of the 2020 program: a long stack less a short one."""
    whole = options.work / "float32" / "0000.mrcs"
    part = options.work / "part.mrcs"
    few, image = PER_STACK // 10, options.box**2 * 4
    header = np.frombuffer(whole.read_bytes()[:1024], "<i4").copy()
    header[2] = few
    part.write_bytes(header.tobytes() + whole.read_bytes()[1024 : 1024 + few * image])
    used = []
    for stack in (whole, part):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [
            *shlex.split(options.original), "--mrc", str(stack), "--model", "roberts",
            "--weights", str(options.original_weights),
            "--out_file", str(options.work / "original.csv"), *(["--tta", "True"] if tta else []),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return (PER_STACK - few) / (used[0] - used[1])


def main() -> None:
    """Make the data, run every line, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--j", type=int, default=2)
    parser.add_argument("--only", default="", help="Only lines that hold this text.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/score.md"))
    parser.add_argument("--original", help="Command of the 2020 program's score.py.")
    parser.add_argument("--original_weights", type=Path, help="Its weights (roberts, f = 32).")
    parser.add_argument("--line", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line:
        print(json.dumps(measure(json.loads(options.line))))
        return
    make(options.work, options.n, options.box)
    import torch

    rows = []
    for line in lines_of(options):
        if options.only not in json.dumps(line):
            continue
        found = in_a_process(line)
        old = 0.0
        if line["disk"] == "warm" and line["images"] == "float32" and line["threads"] == options.j:
            old = in_a_process({**line, "what": "2020"})["per_cpu"]
        disk = line["disk"] if isinstance(line["disk"], str) else f"{line['disk']} MB/s"
        rows.append(
            f"| {line['model']} | {line['images']} | {line['precision']} | "
            f"{'yes' if line['tta'] else 'no'} | {line['threads']} | {disk} | "
            f"{found['rate']:,.0f} | {found['per_cpu']:,.0f} | {found['of_reading']:.2f} | "
            f"{found['mb']:,.0f} | "
            + (f"{old:,.0f} | {found['per_cpu'] / old:.1f} |" if old else "| |")
        )
        print(rows[-1], flush=True)
    start = {**lines_of(options)[0], "what": "start", "began": time.time()}
    seconds = in_a_process(start)["start"]
    print(f"Start-up to the first batch: {seconds:.1f} s", flush=True)
    original = ""
    if options.original:
        plain, augmented = (rate_of_original(options, tta) for tta in (False, True))
        original = (
            f"The 2020 program itself (TensorFlow, roberts): {plain:,.0f} a CPU second, "
            f"{augmented:,.0f} with TTA."
        )
        print(original, flush=True)
    head = (
        f"# Speed of scoring\n\nMade by `benchmarks/score.py`: {options.n:,} images of "
        f"{options.box} x {options.box} px (a tenth of them for the 2020 networks), torch "
        f"{torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores. Each line is one run; ratios are of that run. From "
        f"the start of a process to its first batch: {seconds:.1f} s. {original}\n\n"
        "| model | images | precision | TTA | threads | disk | particles/s | per CPU second | "
        "rate / reading's | MB | 2020: per CPU second | times 2020 |\n" + "|---" * 12 + "|\n"
    )
    if not options.only:
        options.out.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
