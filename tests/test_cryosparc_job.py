"""The CryoSPARC External job, against the signatures of the installed cryosparc-tools.

There is no server here. The stand-ins are made by `create_autospec` from the library's own
classes: a call of a name that is not there, or with other arguments, fails.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import PurePosixPath
from unittest.mock import MagicMock, create_autospec

import numpy as np
import pytest
from making import particles_of

from relion_cryofilter.commands import cryosparc as command
from relion_cryofilter.errors import CryoSparcError, UsageError
from relion_cryofilter.options import CryosparcOptions
from relion_cryofilter.particles.cryosparc import SCORE_FIELD
from relion_cryofilter.relion.job import main
from relion_cryofilter.thresholds import Chosen

pytest.importorskip("cryosparc.tools")
from cryosparc.controllers.job import ExternalJobController
from cryosparc.controllers.project import ProjectController
from cryosparc.dataset import Dataset
from cryosparc.tools import CryoSPARC

BLOB = [("blob/path", "O"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)),
        ("blob/psize_A", "<f4"), ("blob/sign", "<f4"), ("blob/import_sig", "<u8")]  # fmt: skip


@pytest.fixture
def fields(project):
    return particles_of(project / "Extract/job001/particles.star")


@pytest.fixture
def job(fields):
    """An External job that knows its calls and keeps what is saved."""
    stand_in = create_autospec(ExternalJobController, instance=True)
    stand_in.uid = "J99"
    stand_in.load_input.side_effect = lambda name: Dataset(fields)
    stand_in.alloc_output.side_effect = lambda name, alloc: Dataset(
        {"uid": alloc["uid"]}
    ).add_fields(BLOB)
    return stand_in


@pytest.fixture
def client(job, project, monkeypatch):
    """Stand-ins for the server's client and for the project, whose folder is this one."""
    of_project = create_autospec(ProjectController, instance=True)
    of_project.dir = PurePosixPath(project)
    of_project.create_external_job.return_value = job
    of_client = create_autospec(CryoSPARC, instance=True)
    of_client.find_project.return_value = of_project
    made = create_autospec(CryoSPARC, return_value=of_client)
    monkeypatch.setattr("cryosparc.tools.CryoSPARC", made)
    return made


def options(**more):
    return CryosparcOptions(
        **{"host": "here", "email": "a@b.c", "project": "P3", "workspace": "W1", "j": 1,
           "particles": "J42:particles", "weights": "model.safetensors", "threshold": 0.5, **more}
    )  # fmt: skip


def names_of(job):
    return [call[0] for call in job.method_calls if call[0] != "log"]


def test_the_calls_of_a_job_are_those_of_the_library_in_cryosparcs_order(
    client, job, fields, monkeypatch, caplog
):
    caplog.set_level("INFO", "relion_cryofilter")
    monkeypatch.setenv("CRYOSPARC_PASSWORD", "secret")
    assert command.cryosparc(options()) == ()
    client.assert_called_once_with(
        None, host="here", base_port=39000, email="a@b.c", password="secret", license=None
    )
    project = client.return_value.find_project
    project.assert_called_once_with("P3")
    project.return_value.create_external_job.assert_called_once_with("W1", title="CryoFilter")
    job.connect.assert_called_once_with(
        "particles", "J42", "particles", slots=["blob"], title="Particles"
    )
    assert names_of(job) == [
        "connect", "add_output", "add_output", "start", "load_input", "alloc_output",
        "save_output", "alloc_output", "save_output", "upload_dataset", "log_plot",
        "set_tile_image", "stop",
    ]  # fmt: skip
    for call in job.add_output.call_args_list:
        assert call.kwargs["passthrough"] == "particles"
    job.stop.assert_called_once_with()
    lines = [call.args[0] for call in job.log.call_args_list]
    assert any("Threshold 0.5" in line for line in lines)


def test_the_librarys_own_classes_accept_our_inputs_outputs_and_plots(tmp_path):
    """The real controller and its models run; only what they send goes nowhere."""
    real = ExternalJobController.__new__(ExternalJobController)
    real.cs, real.project_uid, real.uid, real._events = MagicMock(), "P3", "J99", {}
    jobs = real.cs.api.jobs
    jobs.find_one.return_value.spec.outputs.root = {"particles": MagicMock(type="particle")}
    states = [jobs.add_external_input, jobs.add_external_output, jobs.connect, jobs.mark_running]
    for state in states:
        state.return_value.spec.inputs.root = {}
    real._model = real.model = jobs.connect.return_value
    command._connect_and_start(real, "J42", "particles")
    made = jobs.add_external_input.call_args.args
    assert made[:3] == ("P3", "J99", "particles")
    assert [slot.name for slot in made[3].slots] == ["blob"]
    for name, call in zip(command.OUTPUTS, jobs.add_external_output.call_args_list):
        assert call.args[:3] == ("P3", "J99", name)
        assert call.args[3].passthrough == "particles"
        assert call.args[3].type == "particle"
    jobs.mark_running.assert_called_once_with("P3", "J99", status="running")
    command._show(real, tmp_path, Chosen(np.linspace(0, 1, 9), np.arange(9) > 4, 0.5, ""))
    assert jobs.add_image_log.called
    assert jobs.set_tile_image.called


def test_accepted_and_rejected_share_out_the_input_and_keep_its_images(client, job, fields):
    command.cryosparc(options())
    saved = {call.args[0]: call.args[1] for call in job.save_output.call_args_list}
    name, scored = job.upload_dataset.call_args.args
    assert name == "particles_scored.cs"
    assert scored["uid"].tolist() == fields["uid"].tolist()
    good = np.asarray(scored[SCORE_FIELD]) >= 0.5
    assert 0 < good.sum() < len(good)
    for name, rows in (("particles_accepted", good), ("particles_rejected", ~good)):
        assert saved[name]["uid"].tolist() == fields["uid"][rows].tolist()
        for field in ("blob/idx", "blob/sign", "blob/shape"):
            assert (np.asarray(saved[name][field]) == fields[field][rows]).all()
        paths = np.array(fields["blob/path"], object)[rows]
        assert list(saved[name]["blob/path"]) == list(paths)


def test_an_output_without_particles_is_saved_empty(client, job, fields):
    command.cryosparc(options(threshold=1.0))
    saved = {call.args[0]: call.args[1] for call in job.save_output.call_args_list}
    assert len(saved["particles_accepted"]) == 0
    assert len(saved["particles_rejected"]) == len(fields["uid"])


def test_results_are_kept_in_a_folder_if_one_is_named(client, job, project):
    command.cryosparc(options(o="kept"))
    assert (project / "kept/particles_accepted.cs").exists()
    assert (project / "kept/scores.png").exists()


def refusal():
    return ValueError("*** [API] (GET http://here, code 404) Job J42 has no output\nmore")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["connect", "load_input", "save_output", "log_plot"])
def test_what_the_server_refuses_fails_the_external_job_with_one_sentence(client, job, call):
    getattr(job, call).side_effect = refusal()
    with pytest.raises(CryoSparcError, match=r"CryoSPARC did not .*J42 has no output\.$"):
        command.cryosparc(options())
    [stop] = job.stop.call_args_list
    assert "J42 has no output" in stop.kwargs["error"]
    assert "Traceback" not in stop.kwargs["error"]


def test_particles_that_cannot_be_scored_fail_the_external_job(client, job, fields):
    fields["blob/path"] = [">S9/none.mrc"] * len(fields["uid"])
    with pytest.raises(CryoSparcError, match=r"S9/none\.mrc is not in the project's folder"):
        command.cryosparc(options())
    [stop] = job.stop.call_args_list
    assert "S9/none.mrc" in stop.kwargs["error"]
    assert not job.save_output.called


def test_a_project_folder_that_is_not_mounted_here_is_said_before_a_job_is_made(client, project):
    of_project = client.return_value.find_project.return_value
    of_project.dir = PurePosixPath(project / "not_mounted")
    with pytest.raises(CryoSparcError, match=r"can't be seen from this machine.*--project_dir"):
        command.cryosparc(options())
    assert not of_project.create_external_job.called
    command.cryosparc(options(project_dir=project))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"particles": "J42"}, r"such as J42:particles"), ({"project": None}, r"--project P3"),
     ({"workspace": None}, r"--workspace W1")],
)  # fmt: skip
def test_what_is_missing_on_the_command_line_is_named(client, change, message):
    with pytest.raises(UsageError, match=message):
        command.cryosparc(options(**change))
    assert not client.called


LOGIN = {
    "summary": "login",
    "requestBody": {"content": {"application/x-www-form-urlencoded": {"schema": {}}}},
    "responses": {},
}
SCHEMA = {"info": {}, "components": {}, "paths": {"/login": {"post": LOGIN}}}


class _Unauthorised(BaseHTTPRequestHandler):
    """Describes itself as CryoSPARC's server does, and refuses every login."""

    def do_GET(self):
        body = json.dumps(SCHEMA).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def unauthorised():
    """The port of a server that refuses every request."""
    server = HTTPServer(("127.0.0.1", 0), _Unauthorised)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def words(port):
    return ["cryosparc", "--host", "127.0.0.1", "--port", str(port), "--email", "a@b.c",
            "--project", "P3", "--workspace", "W1", "--particles", "J42:particles"]  # fmt: skip


def test_a_server_that_refuses_the_login_is_told_from_one_that_is_not_there(
    unauthorised, monkeypatch, capsys
):
    monkeypatch.setenv("CRYOSPARC_PASSWORD", "wrong")
    assert main(words(unauthorised)) == 1
    assert "refuses the login. Check --email and CRYOSPARC_PASSWORD" in capsys.readouterr().err
    assert main(words(1)) == 1
    err = capsys.readouterr().err
    assert "http://127.0.0.1:1 can't be reached" in err
    assert "Traceback" not in err


def test_without_any_login_the_ways_to_one_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CRYOSPARC_PASSWORD", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(words(1)) == 1
    assert "no login is known here. Run `python -m cryosparc.tools login`" in (
        capsys.readouterr().err
    )


def test_a_server_of_another_version_names_the_tools_that_fit(monkeypatch):
    api = MagicMock()
    api.return_value.config.get_version.return_value = "v4.6.2"
    monkeypatch.setattr("cryosparc.tools.APIClient", api)
    monkeypatch.setenv("CRYOSPARC_PASSWORD", "x")
    with pytest.raises(CryoSparcError, match=r"version 4\.6\.2.*cryosparc-tools~=4\.6\.0'"):
        command.connect(options())
    monkeypatch.setattr("cryosparc.tools.__version__", "4.6.0")
    with pytest.raises(CryoSparcError, match=r"cryosparc-tools 4\.6\.0 is installed; expected 5"):
        command.connect(options())
