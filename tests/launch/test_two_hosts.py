"""Two hosts as network namespaces with a cable between them, and a Ray cluster over both."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_launch import QUARTET, WORDS, assert_alike, metrics

HOSTS, CABLE, ADDRESS = ("quartet-a", "quartet-b"), "quartet0", "10.77.0.1:6399"
pytestmark = pytest.mark.long


def said(*words, **more):
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, **more)


def ip(*words):
    done = said("ip", *words)
    if done.returncode:
        pytest.skip(
            f"this machine does not let us make network namespaces: ip {' '.join(words)}: {done.stderr.strip()}"
        )


@pytest.fixture
def hosts():
    """Two namespaces, 10.77.0.1 and 10.77.0.2."""
    pytest.importorskip("ray")
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    for host in HOSTS:
        said("ip", "netns", "del", host)
        ip("netns", "add", host)
    ip("link", "add", "quartet1", "type", "veth", "peer", "name", "quartet2")
    for number, host in enumerate(HOSTS, 1):
        ip("link", "set", f"quartet{number}", "netns", host, "name", CABLE)
        ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", CABLE)
        for device in ("lo", CABLE):
            ip("-n", host, "link", "set", device, "up")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    yield os.environ | token | {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
    ray("stop", "--force")
    for host in HOSTS:
        said("ip", "netns", "del", host)


def ray(*words, host=HOSTS[0], **more):
    return said(
        "ip", "netns", "exec", host, str(Path(sys.executable).parent / "ray"), *words, **more
    )


def cluster(environment, folder):
    ray("stop", "--force")
    ends = ("--num-cpus=1", "--disable-usage-stats")
    head = (
        "--head",
        "--node-ip-address=10.77.0.1",
        "--port=6399",
        "--include-dashboard=false",
        f"--temp-dir={folder}",
    )
    assert ray("start", *head, *ends, env=environment).returncode == 0
    other = ray(
        "start",
        f"--address={ADDRESS}",
        "--node-ip-address=10.77.0.2",
        *ends,
        host=HOSTS[1],
        env=environment,
    )
    assert other.returncode == 0, other.stdout + other.stderr


def test_a_cluster_over_both_trains_and_a_cut_cable_ends_in_a_named_rank_and_a_resumed_run(
    hosts, tmp_path
):
    words = [w for w in WORDS if not w.startswith("launch")] + ["run.name=x"]
    on_ray = [
        "launch.type=ray",
        "launch.processes=2",
        f"launch.address={ADDRESS}",
        "launch.deadline=15",
    ]
    inside = ["ip", "netns", "exec", HOSTS[0], QUARTET]
    (tmp_path / "alone").mkdir()
    alone = said(QUARTET, *words, cwd=tmp_path / "alone", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert alone.returncode == 0, alone.stderr
    scratch = Path("/tmp") / f"q{os.getpid()}"  # sockets have short names
    cluster(hosts, scratch / "1")
    process = subprocess.Popen(
        [*inside, *words, *on_ray], cwd=tmp_path, env=hosts, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = [
            f
            for f in tmp_path.glob("runs/[!.]*/events.jsonl")
            if '"stage": "ppo", "step": 3' in f.read_text()
        ]
        if found:
            break
        time.sleep(0.05)
    ip("-n", HOSTS[1], "link", "set", CABLE, "down")
    cut = time.monotonic()
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped: rank 1 of the run was lost" in told, told
    assert time.monotonic() - cut < 60
    ip("-n", HOSTS[1], "link", "set", CABLE, "up")
    cluster(hosts, scratch / "2")
    again = said(*inside, *words, *on_ray, "--resume", cwd=tmp_path, env=hosts)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path / "alone", "x"), 2e-5)
    shutil.rmtree(scratch, ignore_errors=True)
