"""Workers, nodes and drivers die at random moments; every story is finished, and is the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import ray
from clusters import STORE_BYTES, cluster_of, wait_until, workers_of
from ray.cluster_utils import Cluster
from test_render_on_ray import STORY, expected, hashes, settings
from whereabouts import Whereabouts

from bachvid.driver.events import Event, Failed, FrameStep, IdentityStep, WorkerLost
from bachvid.driver.renderer import StoryRenderer

__all__ = ["expected"]  # a fixture

Hashes = dict[tuple[str, str], tuple[str, str]]
KINDS = ("frame", "identity", "node", "driver")
DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_render_on_ray import STORY, settings
from bachvid.driver.renderer import StoryRenderer

_, tests, model, out, address, *overrides = sys.argv
config = settings(Path(model), *overrides)
with StoryRenderer(config, Path(out), address=address) as renderer:
    for event in renderer.stream(STORY):
        print(type(event).__name__, flush=True)
"""


class Runs:
    """A cluster of three nodes that runs go through while parts of it are killed."""

    def __init__(self, cluster: Cluster, model: Path) -> None:
        self.cluster, self.model = cluster, model

    def render(self, out: Path, kind: str, at: int, policy: str) -> int:
        """Render with one kill after the event number `at`; return 1 if the driver lost a worker.

        A kill loses nothing where the worker was done, and its last events were still on the way.
        """
        if kind == "driver":
            return self._render_killed(out, at, policy)
        kills = lost = 0
        where = Whereabouts()
        config = settings(self.model, f"cache.policy={policy}", "cache.window=2")
        with StoryRenderer(config, out, address=self.cluster.address) as renderer:
            for number, event in enumerate(renderer.stream(STORY)):
                assert not isinstance(event, Failed), event
                where.note(event)
                lost += isinstance(event, WorkerLost)
                if number >= at and not kills:
                    kills += self._kill(kind, event, where)
        return min(lost, kills)

    def _kill(self, kind: str, event: Event, where: Whereabouts) -> int:
        if kind == "node":
            nodes = self.cluster.list_all_nodes()[1:]  # the head has the driver
            self.cluster.remove_node(nodes[0], allow_graceful=False)
            self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            return 1
        match kind, event:
            case "identity", IdentityStep(scene=scene):
                os.kill(where.pid_of(scene, "identity"), signal.SIGKILL)
            case "frame", FrameStep(scene=scene, video=video):
                os.kill(where.pid_of(scene, video), signal.SIGKILL)
            case _:
                return 0
        return 1

    def _render_killed(self, out: Path, at: int, policy: str) -> int:
        """Kill the driver's process after `at` events, then go on here, without a cluster."""
        command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(self.model)]
        command += [str(out), self.cluster.address, f"cache.policy={policy}", "cache.window=2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            for _ in range(at):
                if not driver.stdout.readline():
                    break
            driver.kill()
        with StoryRenderer(settings(self.model), out) as renderer:
            assert not [event for event in renderer.stream(STORY) if isinstance(event, Failed)]
        return 1


def left_overs(cluster: Cluster) -> tuple[list[int], list[str]]:
    """Return the workers and placement groups that a render has left behind."""
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        groups = ray.util.placement_group_table().values()
        return workers_of(cluster), [g["state"] for g in groups if g["state"] != "REMOVED"]
    finally:
        ray.shutdown()


def check_kills(
    number: int, *, seed: int, folder: Path, model: Path, expected: Hashes
) -> Counter[str]:
    """Render until there were `number` kills, one in each run; return how many of each kind."""
    chance = random.Random(seed)
    killed: Counter[str] = Counter()
    with cluster_of(3) as cluster:
        runs = Runs(cluster, model)
        for run in range(3 * number):
            if killed.total() == number:
                break
            kind = min(KINDS, key=killed.__getitem__)  # a moment may have come too late for it
            policy = ("window", "retain")[run // len(KINDS) % 2]
            at = chance.randint(6, 60)
            out = folder / f"run-{run}"
            killed[kind] += runs.render(out, kind, at, policy)
            assert hashes(out) == expected, (kind, at, policy)
            rows = (out / "journal.jsonl").read_text().splitlines()
            done = [row for row in rows if '"event": "video"' in row]
            assert len(done) == len(expected)  # no video was rendered to its end twice
            shutil.rmtree(out)
        assert wait_until(lambda: left_overs(cluster) == ([], []), seconds=30)
    return killed


def test_four_kinds_of_loss_change_nothing(
    tiny_cogvideox_folder: Path,
    expected: Hashes,
    tmp_path: Path,
) -> None:
    killed = check_kills(4, seed=0, folder=tmp_path, model=tiny_cogvideox_folder, expected=expected)
    assert killed == Counter(dict.fromkeys(KINDS, 1))


@pytest.mark.slow
def test_thirty_random_losses_change_nothing(
    tiny_cogvideox_folder: Path,
    expected: Hashes,
    tmp_path: Path,
) -> None:
    killed = check_kills(
        30, seed=1, folder=tmp_path, model=tiny_cogvideox_folder, expected=expected
    )
    assert killed.total() == 30


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_render_with_its_own_exit_code(
    number: signal.Signals,
    code: int,
    tiny_cogvideox_folder: Path,
    tmp_path: Path,
) -> None:
    story = tmp_path / "story.yaml"
    story.write_text(STORY.model_dump_json())
    config = settings(tiny_cogvideox_folder, "sampling.num_steps=40")  # long enough to be ended
    with StoryRenderer(config, tmp_path / "whole") as renderer:
        list(renderer.stream(STORY))
    expected = hashes(tmp_path / "whole")
    (tmp_path / "config.yaml").write_text(config.model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "bachvid", "render", str(story), "-v"]
    command += ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    command += ["--address", "local"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "forest/identity: " in line:  # one video is done
                break
        first.send_signal(number)
        _, rest = first.communicate(timeout=60)
    assert first.returncode == code, rest
    assert "Cancelled; render again to go on." in rest
    assert "Traceback" not in rest
    before = hashes(tmp_path / "run")
    assert before
    assert len(before) < len(expected)
    assert all(expected[video] == found for video, found in before.items())
    # Another process goes on, and needs no cluster for it.
    with StoryRenderer(config, tmp_path / "run") as renderer:
        assert not [event for event in renderer.stream(STORY) if isinstance(event, Failed)]
    assert hashes(tmp_path / "run") == expected
