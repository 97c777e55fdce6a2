"""What a user can get wrong ends in one line that names it, exit status 2, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.data import synthetic
from pbd_ray.search import patience


@pytest.fixture
def own_data(videos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(videos, tmp_path / "videos"))


def own(data: Path, run_dir: Path) -> list[str]:
    """Overrides that read `data` as a user's files."""
    return [
        "experiment.data.source=files",
        "experiment.data.synthetic=null",
        f"data_root={data}",
        f"annotations={data / 'annotations.json'}",
        f"run_dir={run_dir}",
        "backend=local",
    ]


def first_fit_video(data: Path) -> Path:
    return min(data.glob("fit_*.mp4"))


def remove_annotations(data: Path) -> str:
    (data / "annotations.json").unlink()
    return "annotations.json: cannot be read"


def remove_video(data: Path) -> str:
    first_fit_video(data).unlink()
    return "no file for video 'fit_0000'"


def other_video(data: Path) -> str:
    """A file that opens, but is not the annotated one."""
    annotations = json.loads((data / "annotations.json").read_text())
    entry = annotations["database"]["fit_0000"]
    entry["frame"] *= 2
    entry["fps"] *= 2
    (data / "annotations.json").write_text(json.dumps(annotations))
    return "its annotation says"


def reversed_segment(data: Path) -> str:
    annotations = json.loads((data / "annotations.json").read_text())
    annotations["database"]["fit_0000"]["annotations"][0]["segment"] = [3.0, 1.0]
    (data / "annotations.json").write_text(json.dumps(annotations))
    return "the segment ends before it starts"


@pytest.mark.parametrize("spoil", [remove_annotations, remove_video, other_video, reversed_segment])
def test_spoiled_data(
    spoil: Callable[[Path], str],
    own_data: Path,
    tiny_recipe: str,
    tmp_path: Path,
    run_job: Callable[..., Any],
) -> None:
    expected = spoil(own_data)
    outcome = run_job("compress.py", tiny_recipe, *own(own_data, tmp_path / "run"))
    assert outcome.status == 2
    assert expected in _error(outcome.err)
    assert not (tmp_path / "run").exists()


def test_a_quarantined_video(
    own_data: Path, tiny_recipe: str, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    """The run goes on without it and says so; a video that it began with must be there for ever."""
    run_dir, bad = tmp_path / "run", first_fit_video(own_data)
    bad.write_bytes(b"")
    command = [tiny_recipe, *own(own_data, run_dir), "experiment.data.max_quarantined=0.2"]
    assert run_job("compress.py", *command, "stopping.max_drops=0").status == 0
    reason = f"{bad}: the video file is empty (0 bytes)"
    left_out = json.loads((run_dir / "quarantine.json").read_text())
    assert left_out == {
        "videos": {"fit_0000": reason},
        "shares": {"fit": pytest.approx(1 / 6), "selection": 0.0, "test": 0.0},
    }
    assert json.loads((run_dir / "summary.json").read_text())["quarantined"] == {"fit_0000": reason}
    before = _content(run_dir / "teacher")
    (own_data / "fit_0001.mp4").unlink()
    outcome = run_job("compress.py", *command, "stopping.max_drops=0")
    assert outcome.status == 2
    assert "the run began with this video" in _error(outcome.err)
    assert _content(run_dir / "teacher") == before


def test_a_run_dir_without_room(
    tiny_recipe: str, tmp_path: Path, video_cache: Path, run_job: Callable[..., Any]
) -> None:
    """A recipe that keeps 10^12 detections a video."""
    endless = "experiment.detector.postprocess.max_detections=1000000000000"
    place = [f"run_dir={tmp_path / 'run'}", f"cache_dir={video_cache}", "backend=local"]
    outcome = run_job("compress.py", tiny_recipe, *place, endless)
    assert outcome.status == 2
    assert "/run: the run writes up to " in _error(outcome.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nosuch"], "recipe 'nosuch' is neither a file nor one of: activitynet"),
        (["demo", "alignment.ranks=3"], "unknown key 'experiment.alignment.ranks'"),
        (["demo", "max_workers=0"], "execution.max_workers"),
        (["demo", "seed"], "override 'seed' is not of the form key=value"),
        (["demo", "experiment.scoring.criterion=loss"], "experiment.scoring.criterion"),
        (["demo", "stopping.max_drops=8"], "stopping.max_drops 8 must leave a block"),
        (["demo", "device=cuda"], "gpus_per_worker is 0"),
        (["thumos14_videomae_s"], "execution.annotations is not set"),
    ],
)
def test_wrong_recipe(arguments: list[str], expected: str, run_job: Callable[..., Any]) -> None:
    outcome = run_job("compress.py", *arguments)
    assert outcome.status == 2
    assert expected in _error(outcome.err)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "RECIPE is missing"),
        (["--print-config"], "RECIPE is missing"),
        (["--plan"], "RECIPE is missing"),
        (["demo", "--plan", "--print-config"], "not allowed with argument"),
        (["--verify", "run", "demo"], "--verify and --explain take no RECIPE"),
        (["--verify", "run", "--explain", "1", "run"], "not allowed with argument"),
        (["--explain", "1"], "expected 2 arguments"),
    ],
)
def test_usage(
    arguments: list[str],
    expected: str,
    run_job: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job("compress.py", *arguments)
    assert ended.value.code == 2
    assert expected in capfd.readouterr().err.splitlines()[-1]


def test_teacher_of_another_shape(
    own_data: Path, tiny_recipe: str, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    shipped = Path(synthetic.__file__).parents[1] / "demo_teacher"
    arguments = [*own(own_data, tmp_path / "run"), f"teacher.source={shipped}"]
    outcome = run_job("compress.py", tiny_recipe, *arguments)
    assert outcome.status == 2
    assert "grid.window_frames is 128, experiment.detector.grid.window_frames is 32" in _error(outcome.err)


def test_run_dir_of_another_recipe(
    tiny_recipe: str, run_dir: Path, video_cache: Path, run_job: Callable[..., Any]
) -> None:
    """The one clear line names the difference; the run that is there stays as it is."""
    place = [f"run_dir={run_dir}", f"cache_dir={video_cache}", "backend=local"]
    before = _content(run_dir)
    outcome = run_job("compress.py", tiny_recipe, *place, "stopping.max_drops=1", "experiment.seed=5")
    assert outcome.status == 2
    assert _error(outcome.err).endswith("holds another experiment: seed: 0 -> 5")
    assert _content(run_dir) == before


def test_bucket_that_is_not_there(
    tiny_recipe: str, s3_uri: Callable[[str], str], run_job: Callable[..., Any]
) -> None:
    place = s3_uri("run").replace("s3://", "s3://no-such-")
    outcome = run_job("compress.py", tiny_recipe, f"run_dir={place}", "backend=local")
    assert outcome.status == 2
    assert "there is no bucket 'no-such-bucket-" in _error(outcome.err)


def test_bucket_without_credentials(tiny_recipe: str, refusing_s3: str, run_job: Callable[..., Any]) -> None:
    """What S3 answers to an unsigned request is 403; pyarrow's client sends one when it finds no key."""
    place = f"s3://bucket/run?scheme=http&endpoint_override={refusing_s3}&region=us-east-1"
    outcome = run_job("compress.py", tiny_recipe, f"run_dir={place}", "backend=local")
    assert outcome.status == 2
    assert re.search(r"cannot look up bucket: .*AWS Error ACCESS_DENIED", _error(outcome.err))


def test_credentials_in_the_uri(tiny_recipe: str, run_job: Callable[..., Any]) -> None:
    outcome = run_job("compress.py", tiny_recipe, "run_dir=s3://key:secret@bucket/run", "backend=local")
    assert outcome.status == 2
    assert "credentials belong in the environment" in _error(outcome.err)
    assert "secret" not in outcome.out + outcome.err


def test_storage_that_fails_for_good(
    tiny_recipe: str, s3_uri: Callable[..., str], run_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1: nothing the user wrote is wrong."""
    monkeypatch.setattr(patience, "sleep", lambda seconds: None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = s3_uri("run", f"127.0.0.1:{closed.getsockname()[1]}")
        outcome = run_job("compress.py", tiny_recipe, f"run_dir={place}", "backend=local")
    assert outcome.status == 1
    assert _error(outcome.err).endswith("(tried 5 times); the same command goes on from here")


@pytest.fixture
def refusing_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """host:port of a server that refuses unsigned requests, and an environment without a key."""

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if "Authorization" in self.headers else 403)
            self.end_headers()

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.integration
def test_gpu_recipe_without_gpu(tiny_recipe: str, tmp_path: Path, video_cache: Path) -> None:
    """As a process of its own, for the real exit status."""
    job = Path(__file__).parents[2] / "jobs" / "compress.py"
    overrides = [
        "device=cuda",
        "gpus_per_worker=1",
        f"run_dir={tmp_path / 'run'}",
        f"cache_dir={video_cache}",
    ]
    done = subprocess.run(
        [sys.executable, str(job), tiny_recipe, *overrides], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "1 GPU a worker" in done.stderr
    assert "at most" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def _error(text: str) -> str:
    """The error line; there must be exactly one, and no traceback."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
