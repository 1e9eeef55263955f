"""The job types of the pipeliner: score, train and metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeAlias

from pipeliner.data_structure import (
    NODE_EVALUATIONMETRIC,
    NODE_LOGFILE,
    NODE_MLMODEL,
    NODE_PARTICLEGROUPMETADATA,
)
from pipeliner.external_program_utils import ExternalProgram
from pipeliner.job_options import JobOptionCondition, JobOptionValidationResult
from pipeliner.pipeliner_job import PipelinerCommand, PipelinerJob
from pipeliner.results_display_objects import ResultsDisplayObject

from relion_cryofilter.doppio import display, job_options
from relion_cryofilter.files import ACCEPTED, ALL, CHECKPOINTS, METRICS, MODEL, REJECTED
from relion_cryofilter.options import JobOptions, MetricsOptions, ScoreOptions, TrainOptions

PROGRAM = "relion_cryofilter"
Node: TypeAlias = tuple[str, ...]
"""The pipeliner's type of a file, and further keywords."""
Display: TypeAlias = Callable[[str], list[ResultsDisplayObject]]


class CryoFilterJob(PipelinerJob):
    """What the jobs share: options of a mode, its command, its files and how they are shown."""

    OUT_DIR = "CryoFilter"
    CATEGORY_LABEL = "Subset Selection"
    MODE: str
    OPTIONS: type[JobOptions]
    TITLE: str
    PLANNED: ClassVar[Mapping[str, Node]] = {}
    """The files that the next job may be scheduled on."""
    FOUND: ClassVar[Mapping[str, Node]] = {}
    """Patterns of further files, which are not always written; reports are found, too."""
    SHOWN: ClassVar[Sequence[Display]] = ()
    """What the results tab shows before the reports."""

    def __init__(self) -> None:
        super().__init__()
        about = (self.OPTIONS.__doc__ or "").strip()
        self.jobinfo.display_name = self.TITLE
        self.jobinfo.short_desc = about
        self.jobinfo.long_desc = (
            f"{about} A small neural network looks at every particle image and gives it a score "
            "from 0 (junk) to 1 (particle)."
        )
        self.jobinfo.version = "0.1"
        self.jobinfo.job_author = "The relion_cryofilter developers"
        # This installation's program: the one beside this Python, or the one on the PATH.
        beside = Path(sys.executable).with_name(PROGRAM)
        command = str(beside) if beside.is_file() else PROGRAM
        version = [command, "--version"]
        self.jobinfo.programs = [ExternalProgram(command=command, name=PROGRAM, vers_com=version)]
        self.can_continue = True
        self.joboptions.update(job_options.job_options(self.OPTIONS))
        self.get_runtab_options(threads=True, addtl_args=True)

    def get_commands(self) -> list[PipelinerCommand]:
        """Return the version's command, for run.out, and that of the mode."""
        words = job_options.words_of(self.OPTIONS, self.joboptions)
        command = [self.jobinfo.programs[0].command, self.MODE, "--o", self.output_dir, *words]
        command += ["--j", self.joboptions["nr_threads"].get_string()]
        command += self.parse_additional_args()
        return [*self.get_program_version_commands(), PipelinerCommand(command)]

    def additional_joboption_validation(self) -> list[JobOptionValidationResult]:
        """Refuse what the command line would refuse, before the job starts."""
        return job_options.problems(self.OPTIONS, self.joboptions)

    def create_output_nodes(self) -> None:
        """Name the files that the next job may be scheduled on."""
        for name, (kind, *keywords) in self.PLANNED.items():
            self.add_output_node(name, kind, [*keywords, job_options.MODEL_KEYWORD])

    def create_post_run_output_nodes(self) -> None:
        """Add what the job wrote besides: further results, and reports."""
        reports: dict[str, Node] = dict.fromkeys(display.REPORTS, (NODE_LOGFILE,))
        for pattern, (kind, *keywords) in {**self.FOUND, **reports}.items():
            for path in sorted(Path(self.output_dir).glob(pattern)):
                self.add_output_node(path.name, kind, [*keywords, job_options.MODEL_KEYWORD])

    def create_results_display(self) -> list[ResultsDisplayObject]:
        """Return the mode's figures and tables, then the reports."""
        return [item for of in (*self.SHOWN, display.reports) for item in of(self.output_dir)]


class ScoreParticles(CryoFilterJob):
    """Score particles; accepted and rejected ones go on as particle sets."""

    PROCESS_NAME = "cryofilter.score.particles"
    MODE, OPTIONS, TITLE = "score", ScoreOptions, "Score and filter particles"
    PLANNED: ClassVar[Mapping[str, Node]] = {
        name: (NODE_PARTICLEGROUPMETADATA, "relion", display.SUBSETS[name])
        for name in (ACCEPTED, ALL)
    }
    FOUND: ClassVar[Mapping[str, Node]] = {
        REJECTED: (NODE_PARTICLEGROUPMETADATA, "relion", display.SUBSETS[REJECTED])
    }
    SHOWN: ClassVar[Sequence[Display]] = (display.of_scores,)

    def __init__(self) -> None:
        super().__init__()
        self.joboptions["in_parts"].is_required = True


class _LabelledJob(CryoFilterJob):
    """Particles with labels: from a Select job, classes, or files of good and bad ones."""

    PLANNED: ClassVar[Mapping[str, Node]] = {METRICS: (NODE_EVALUATIONMETRIC,)}
    SHOWN: ClassVar[Sequence[Display]] = (display.of_metrics,)

    def __init__(self) -> None:
        super().__init__()
        self.joboptions["in_parts"].required_if = JobOptionCondition([("pos", "=", [])])


class TrainParticles(_LabelledJob):
    """Train a model, which score and metrics jobs take as an input."""

    PROCESS_NAME = "cryofilter.train.particles"
    MODE, OPTIONS, TITLE = "train", TrainOptions, "Train a particle filter"
    PLANNED: ClassVar[Mapping[str, Node]] = {MODEL: (NODE_MLMODEL,), **_LabelledJob.PLANNED}
    FOUND: ClassVar[Mapping[str, Node]] = {"model_*.safetensors": (NODE_MLMODEL,)}  # of an ensemble
    SHOWN: ClassVar[Sequence[Display]] = (display.of_history, display.of_metrics)

    def prepare_clean_up_lists(self, do_harsh: bool = False) -> tuple[list[str], list[str]]:
        """Return the checkpoints, which are only for going on with a stopped training."""
        folder = Path(self.output_dir)
        files, folders = folder.glob("checkpoint_last*.pt"), folder.glob(CHECKPOINTS)
        return sorted(map(str, files)), sorted(map(str, folders))


class MeasureParticles(_LabelledJob):
    """Measure models on labelled particles."""

    PROCESS_NAME = "cryofilter.metrics.particles"
    MODE, OPTIONS, TITLE = "metrics", MetricsOptions, "Measure a particle filter"
