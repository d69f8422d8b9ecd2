"""Two Ray nodes on this machine: join them, train over both, lose one, go on with the other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.running import ROOT, end_training, read_steps, training, wait_for
from tests.ray_nodes import RayNodes, end_node, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_JOIN = """
import asyncio, json, sys
from pathlib import Path
import ray
from tests.verl.utils.test_actors import Counter
from verl.errors import ConfigError
from verl.utils.cluster import Share, join_cluster

async def main(address, folder):
    share = Share(address=address, num_nodes=2, cpus=1, gpus=2)
    launcher = await join_cluster(share, paths=[Path.cwd()], shared=folder, timeout_s=30)
    actors = [
        launcher.launch(Counter, kwargs={"start": node}, name=f"counter-{node}", node=node)
        for node in range(2)
    ]
    sums = await asyncio.gather(*(actor.call("add", 10) for actor in actors))
    homes = await asyncio.gather(*(actor.call("read_env", "HF_HOME") for actor in actors))
    secrets = await asyncio.gather(*(actor.call("read_env", "HF_TOKEN") for actor in actors))
    gpus = [node.gpus for node in launcher.nodes]
    launcher.shutdown()
    again = await join_cluster(share, paths=[], shared=folder, timeout_s=30)  # it is free again
    again._ray._group = "gone"
    try:
        again.shutdown()
    except AttributeError:  # Ray cannot remove it
        is_left = not ray.is_initialized()
    try:
        await join_cluster(Share(address=address, num_nodes=3, cpus=1), paths=[], shared=folder, timeout_s=0)
    except ConfigError as error:
        refused = str(error)
    found = {"sums": sums, "homes": homes, "secrets": secrets, "gpus": gpus}
    return found | {"refused": refused, "is_left": is_left}

print(json.dumps(asyncio.run(main(sys.argv[1], Path(sys.argv[2])))))
"""

_LOSE_HEAD = """
import asyncio, sys
from pathlib import Path
from tests.verl.utils.test_actors import Counter
from verl.utils.cluster import Share, join_cluster
from verl.utils.entry import error_line

async def main(address, folder, num_nodes):
    print("waiting", flush=True)
    share = Share(address=address, num_nodes=num_nodes, cpus=1)
    launcher = await join_cluster(share, paths=[], shared=folder, timeout_s=3600)
    actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter")
    print("the actor holds", await actor.call("add", 1), flush=True)
    try:
        await launcher.watch()
    finally:
        actor.kill()
        launcher.shutdown()

with error_line():
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with ray_nodes(2, "--num-cpus=2", "--num-gpus=2") as nodes:
        yield nodes


def test_a_share_of_two_nodes_is_reserved_and_given_back(cluster: RayNodes, tmp_path: Path) -> None:
    joined = subprocess.run(
        [sys.executable, "-c", _JOIN, cluster.address, str(tmp_path)],
        env={**os.environ, **cluster.variables, "HF_HOME": "/shared/hf", "HF_TOKEN": "hf_secret"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert joined.returncode == 0, joined.stderr
    found = json.loads(joined.stdout.splitlines()[-1])
    assert found["sums"] == [10, 11]
    assert found["homes"] == ["/shared/hf", "/shared/hf"]
    assert found["secrets"] == [None, None]
    assert found["is_left"]
    assert found["gpus"] == [["0", "1"], ["0", "1"]]
    assert "needs 3 nodes with 1 CPUs each" in found["refused"]
    assert not list(tmp_path.iterdir())
    assert all(node.poll() is None for node in cluster.nodes)


@pytest.mark.vllm
def test_a_run_over_two_nodes_loses_one_and_goes_on_with_the_other(
    cluster: RayNodes, tmp_path: Path, retriever: str
) -> None:
    run_dir = tmp_path / "run"
    settings = (
        "algorithm=search_r1",
        f"retriever.url={retriever}",
        f"trainer.ray_address={cluster.address}",
        "trainer.num_cpu_workers=2",
        "trainer.save_freq=1",
    )
    over_both = ("trainer.nnodes=2", "trainer.num_cpu_engines=2")
    with training(run_dir, *settings, *over_both, variables=cluster.variables) as process:
        wait_for(lambda: 2 in read_steps(run_dir), what="step 2", process=process)
        output = end_training(process, lambda: kill_policy(cluster.nodes[1]))
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: actor 'policy-"), output
    done = max(read_steps(run_dir))
    assert_engines_sampled_from_the_policy(run_dir)
    assert (run_dir / "checkpoints" / f"global_step_{done - 1}").is_dir()

    end_node(cluster.nodes[1])
    before = family_of(cluster.nodes[0])
    with training(run_dir, *settings, variables=cluster.variables) as process:
        wait_for(lambda: done + 1 in read_steps(run_dir), what="a further step", process=process)
        started = family_of(cluster.nodes[0]) - before
        output = end_training(process, lambda: os.killpg(process.pid, signal.SIGKILL))
    assert "going on from" in output
    assert sorted(read_steps(run_dir)) == list(range(1, max(read_steps(run_dir)) + 1))
    assert_engines_sampled_from_the_policy(run_dir)
    # Ray ends the actors of a trainer that was killed, and they end vLLM's processes; the cluster stays.
    assert len(started) >= 4
    psutil.wait_procs(started)
    assert cluster.nodes[0].poll() is None


@pytest.mark.vllm
def test_a_run_whose_head_ends_saves_its_steps_and_says_so(
    cluster: RayNodes, tmp_path: Path, retriever: str
) -> None:
    """The actors live on for a minute, unless they were on the head's machine."""
    run_dir = tmp_path / "run"
    settings = (
        "algorithm=search_r1",
        f"retriever.url={retriever}",
        f"trainer.ray_address={cluster.address}",
        "trainer.save_freq=0",
    )
    with training(run_dir, *settings, variables=cluster.variables) as process:
        wait_for(lambda: 1 in read_steps(run_dir), what="step 1", process=process)
        output = end_training(process, lambda: kill_head(cluster))
    assert process.returncode == 1, output
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("error: Ray's head at "), output
    assert last.endswith("start the cluster again (ray start), and repeat the command to resume")
    assert (run_dir / "checkpoints" / f"global_step_{max(read_steps(run_dir))}").is_dir(), output


def test_without_its_head_a_program_ends_with_one_line(tmp_path: Path) -> None:
    """Also where that takes the trainer's own raylet and actors with it, or the run still waits for nodes."""
    with ray_nodes(1, "--num-cpus=1") as nodes:
        programs = [
            subprocess.Popen(
                [sys.executable, "-c", _LOSE_HEAD, nodes.address, str(tmp_path), str(num_nodes)],
                env={**os.environ, **nodes.variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for num_nodes in (1, 2)
        ]
        joined, waiting = programs
        for program, line in ((joined, "the actor holds 1"), (waiting, "waiting")):
            assert program.stdout is not None
            assert any(found.strip() == line for found in program.stdout)
        end_node(nodes.nodes[0])
        ended = [program.communicate()[1].splitlines()[-1] for program in programs]
    assert [program.returncode for program in programs] == [1, 1], ended
    port = nodes.address.partition(":")[2]
    assert re.match(rf"error: Ray's head at [\d.]+:{port} ended", ended[0]), ended
    assert ended[1].startswith("error: trainer.ray_address="), ended


def kill_head(cluster: RayNodes) -> None:
    """Kill the process that all nodes need; the raylet of its machine lives on, as without `--block`."""
    cluster.nodes[0].send_signal(signal.SIGSTOP)
    for process in psutil.Process(cluster.nodes[0].pid).children(recursive=True):
        if process.name() == "gcs_server":
            process.kill()


def family_of(node: subprocess.Popen[bytes]) -> set[psutil.Process]:
    return set(psutil.Process(node.pid).children(recursive=True))


def assert_engines_sampled_from_the_policy(run_dir: Path) -> None:
    for step in read_steps(run_dir).values():
        assert step["policy/log_prob_difference_mean"] < 1e-3
        assert step["policy/publish_difference"] < 1e-3


def kill_policy(node: subprocess.Popen[bytes]) -> None:
    """Kill the rank of the policy on a node: the actor that has an interface for gloo."""
    for process in psutil.Process(node.pid).children(recursive=True):
        if process.name().startswith("ray::ActorHost") and "GLOO_SOCKET_IFNAME" in process.environ():
            process.kill()
            return
    raise AssertionError("no rank of the policy runs on the node")
