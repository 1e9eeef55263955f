"""The job types of the pipeliner: score, train and metrics."""

from __future__ import annotations

import sys
from pathlib import Path

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
from relion_cryofilter.options import JobOptions, MetricsOptions, ScoreOptions, TrainOptions
from relion_cryofilter.result_files import ACCEPTED, ALL, METRICS, MODEL, REJECTED

PROGRAM = "relion_cryofilter"


class CryoFilterJob(PipelinerJob):
    """What the jobs share: options of a mode, its command, and reports if it writes any."""

    OUT_DIR = "CryoFilter"
    CATEGORY_LABEL = "Subset Selection"
    MODE: str
    OPTIONS: type[JobOptions]
    TITLE: str

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
        self.jobinfo.programs = [program()]
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

    def create_post_run_output_nodes(self) -> None:
        """Add the reports that the job wrote."""
        for name in display.REPORTS:
            if self._path(name).is_file():
                self.add_output_node(name, NODE_LOGFILE, [job_options.MODEL_KEYWORD])

    def create_results_display(self) -> list[ResultsDisplayObject]:
        """Return the mode's figures and tables, then the reports."""
        shown: list[ResultsDisplayObject] = display.reports(self.output_dir)
        return [*self.results(), *shown]

    def results(self) -> list[ResultsDisplayObject]:
        """Return the mode's own figures and tables; none if it makes none."""
        return []

    def _path(self, name: str) -> Path:
        return Path(self.output_dir) / name

    def _add_node(self, name: str, kind: str, *keywords: str) -> None:
        self.add_output_node(name, kind, [*keywords, job_options.MODEL_KEYWORD])


class ScoreParticles(CryoFilterJob):
    """Score particles; accepted and rejected ones go on as particle sets."""

    PROCESS_NAME = "cryofilter.score.particles"
    MODE, OPTIONS, TITLE = "score", ScoreOptions, "Score and filter particles"

    def __init__(self) -> None:
        super().__init__()
        self.joboptions["in_parts"].is_required = True

    def create_output_nodes(self) -> None:
        """Name the files that the next job may be scheduled on."""
        for name in (ACCEPTED, ALL):
            self._add_particles(name)

    def create_post_run_output_nodes(self) -> None:
        """Add the rejected particles, if there are any, and the reports."""
        if self._path(REJECTED).is_file():
            self._add_particles(REJECTED)
        super().create_post_run_output_nodes()

    def _add_particles(self, name: str) -> None:
        self._add_node(name, NODE_PARTICLEGROUPMETADATA, "relion", display.SUBSETS[name])

    def results(self) -> list[ResultsDisplayObject]:
        """Return the histogram of the scores, the counts, and images of both subsets."""
        return display.of_scores(self.output_dir)


class _LabelledJob(CryoFilterJob):
    """Particles with labels: from a Select job, classes, or files of good and bad ones."""

    def __init__(self) -> None:
        super().__init__()
        self.joboptions["in_parts"].required_if = JobOptionCondition([("pos", "=", [])])

    def create_output_nodes(self) -> None:
        """Name the table of figures."""
        self._add_node(METRICS, NODE_EVALUATIONMETRIC)

    def results(self) -> list[ResultsDisplayObject]:
        """Return the table of figures with intervals, and the curves."""
        return display.of_metrics(self.output_dir)


class TrainParticles(_LabelledJob):
    """Train a model, which score and metrics jobs take as an input."""

    PROCESS_NAME = "cryofilter.train.particles"
    MODE, OPTIONS, TITLE = "train", TrainOptions, "Train a particle filter"

    def create_output_nodes(self) -> None:
        """Name the model and the table of figures."""
        self._add_node(MODEL, NODE_MLMODEL)
        super().create_output_nodes()

    def create_post_run_output_nodes(self) -> None:
        """Add the further models of an ensemble, and the reports."""
        for path in sorted(Path(self.output_dir).glob("model_*.safetensors")):
            self._add_node(path.name, NODE_MLMODEL)
        super().create_post_run_output_nodes()

    def prepare_clean_up_lists(self, do_harsh: bool = False) -> tuple[list[str], list[str]]:
        """Return the checkpoints, which are only for going on with a stopped training."""
        found = Path(self.output_dir).glob("checkpoint_last*.pt")
        return sorted(map(str, found)), []

    def results(self) -> list[ResultsDisplayObject]:
        """Return the history of the training and the figures of the test part."""
        return [*display.of_history(self.output_dir), *super().results()]


class MeasureParticles(_LabelledJob):
    """Measure models on labelled particles."""

    PROCESS_NAME = "cryofilter.metrics.particles"
    MODE, OPTIONS, TITLE = "metrics", MetricsOptions, "Measure a particle filter"


def program() -> ExternalProgram:
    """Return this installation's program: the one beside this Python, or the one on the PATH."""
    beside = Path(sys.executable).with_name(PROGRAM)
    command = str(beside) if beside.is_file() else PROGRAM
    return ExternalProgram(command=command, name=PROGRAM, vers_com=[command, "--version"])
