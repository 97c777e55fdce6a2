"""Three nodes, of which two can run workers: who looks at videos, and who sees the run directory."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pbd_ray.cluster import preflight
from pbd_ray.cluster.places import PlaceError, check_places
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.config import Recipe, load_recipe
from pbd_ray.data import synthetic
from pbd_ray.data.source import load_split
from pbd_ray.search.storage import Storage

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    # Where Ray looks for a free port it does not close the socket of one that is taken.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the driver and the workers of the first node run."""
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def stranger(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cluster; the id of its second node, whose processes run in another directory."""
    before = Path.cwd()
    os.chdir(here)
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        os.chdir(tmp_path_factory.mktemp("elsewhere"))
        second = cluster.add_node(num_cpus=1)
        os.chdir(here)
        ray.init(address=cluster.address, log_to_driver=False)
        yield second.node_id
    finally:
        os.chdir(before)
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def data(tiny_recipe: str, video_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_recipe(tiny_recipe).experiment.data.synthetic
    assert config is not None
    folder = shutil.copytree(
        synthetic.ensure(config, video_cache), tmp_path_factory.mktemp("data") / "videos"
    )
    (folder / "fit_0002.mp4").write_bytes(b"")
    (folder / "test_0001.mp4").write_bytes(b"no video")
    (folder / "test_0003.mp4").unlink()
    return Path(folder)


@pytest.fixture
def recipe(tiny_recipe: str, data: Path) -> Recipe:
    files = [f"experiment.data.{part}" for part in ("source=files", "synthetic=null", "max_quarantined=0.5")]
    paths = [f"data_root={data}", f"annotations={data / 'annotations.json'}", f"cache_dir={data.parent}"]
    return load_recipe(tiny_recipe, [*files, *paths, "task_retries=0"])


class Deadly:
    """The name of a file whose decoder takes the process down."""

    def __fspath__(self) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    def __str__(self) -> str:
        return "deadly.mp4"


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("stranger")
def test_workers_look_at_the_videos(recipe: Recipe, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they find is what one process finds; the driver decodes nothing; a crash costs one video."""
    split = load_split(recipe, print)
    local = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"backend": "local"})})
    _, _, expected = usable_videos(local, split)
    assert sorted(expected.reasons) == ["fit_0002", "test_0001", "test_0003"]
    monkeypatch.delattr(preflight, "examine")
    first, *others = split.fit.videos
    deadly = replace(split, fit=replace(split.fit, videos=(replace(first, path=Deadly()), *others)))
    kept, _, found = usable_videos(recipe, deadly)
    crash = {first.id: "deadly.mp4: whoever decodes it crashes"}
    assert found.reasons == {**expected.reasons, **crash}
    ids = [video.id for video in split.everything().videos if video.id not in found.reasons]
    assert [video.id for video in kept.everything().videos] == ids


@pytest.mark.usefixtures("stranger")
def test_a_shared_run_dir(recipe: Recipe, tmp_path: Path) -> None:
    check_places(recipe, Storage.at(str(tmp_path / "run")), 0)
    assert list(tmp_path.iterdir()) == [], "the markers are gone"


def test_a_run_dir_that_one_node_does_not_share(recipe: Recipe, here: Path, stranger: str) -> None:
    """One path, and another directory in the processes of the second node: it names the one they run in."""
    (here / "run").mkdir()
    with pytest.raises(PlaceError) as error:
        check_places(recipe, Storage.at("/proc/self/cwd/run"), 0)
    line = str(error.value)
    assert line.startswith("run_dir /proc/self/cwd/run is not shared: node ")
    assert f"({stranger[:8]}) cannot read there: " in line
    assert "\n" not in line
    assert not (here / "run").exists()
