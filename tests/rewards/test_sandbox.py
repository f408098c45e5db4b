"""The sandbox of untrusted programs: what hostile programs get, what the kernel thinks of them, and when none is run."""

import contextlib
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quartet.rewards import cgroup
from quartet.rewards import sandbox as module
from quartet.rewards.protocol import RewardError
from quartet.rewards.sandbox import FIRST_USER, LAUNCHER, MAX_PROGRAM, USERS, Sandbox
from quartet.rewards.seccomp import (
    ALLOW,
    ARCHITECTURES,
    ENOSYS,
    EPERM,
    KILL_PROCESS,
    NUMBERS,
    REFUSED,
    RULES,
    seccomp_filter,
)
from tests.rewards.sandbox_probes import KINDS, Outcome, probes

pytestmark = pytest.mark.slow

BWRAP = shutil.which("bwrap")
ROOT = os.geteuid() == 0
needs_bwrap = pytest.mark.skipif(BWRAP is None, reason="no bubblewrap here")
needs_root = pytest.mark.skipif(
    BWRAP is None or not ROOT, reason="needs bubblewrap and root, to become another user"
)
PROJECT = Path(__file__).parents[2]
USER = 12345


def as_ordinary_user(*arguments: str, namespaces: bool = True) -> list[str]:
    """Return a command, for root to call, that runs Python with `arguments` as an ordinary user who can read the interpreter
    and its packages wherever they lie; without `namespaces`, on a machine that gives ordinary users no user namespaces."""
    prefix = Path(sys.base_prefix).resolve()
    home = Path("/", *prefix.parts[1:2])
    view = (
        ["--bind", "/", "/", "--dev-bind", "/dev", "/dev", "--tmpfs", str(home)]
        if home != Path("/usr")
        else ["--bind", "/", "/"]
    )
    if home != Path("/usr"):
        for folder in [*prefix.parents][-3::-1]:
            view += ["--perms", "0755", "--dir", str(folder)]
        view += ["--ro-bind", str(prefix), str(prefix)]
    # The environment may lie in a folder that only root can open, like one of `mktemp -d`.
    view += ["--ro-bind", sys.prefix, "/mnt"]
    python = str(Path("/mnt", Path(sys.executable).relative_to(sys.prefix)))
    assert BWRAP is not None
    if namespaces:
        user = [
            "--",
            "setpriv",
            f"--reuid={USER}",
            f"--regid={USER}",
            "--clear-groups",
            "--bounding-set=-all",
        ]
    else:
        user = [
            "--unshare-user",
            "--uid",
            str(USER),
            "--gid",
            str(USER),
            "--disable-userns",
            "--cap-drop",
            "ALL",
            "--",
        ]
    return [BWRAP, *view, "--chdir", str(PROJECT), *user, python, *arguments]


def contained(command: list[str], kind: str, user: int) -> None:
    """Run the probes of one kind by a command and see that none of them got anywhere."""
    done = subprocess.run(
        [*command, kind], capture_output=True, text=True, check=False, cwd=PROJECT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    outcomes = {name: Outcome(**row) for name, row in told["outcomes"].items()}
    assert told["user"] == user and set(outcomes) == set(probes(kind))
    escaped = {name: outcome for name, outcome in outcomes.items() if not outcome.contained}
    assert not escaped, f"contained {len(outcomes) - len(escaped)} of {len(outcomes)}: {escaped}"


@needs_bwrap
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_hostile_programs_are_contained(kind):
    contained([sys.executable, "-m", "tests.rewards.sandbox_probes"], kind, os.getuid())


@needs_root
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_hostile_programs_of_an_ordinary_user_are_contained(kind):
    contained(as_ordinary_user("-m", "tests.rewards.sandbox_probes"), kind, USER)


@needs_bwrap
def test_settings_of_the_host_are_as_before():
    """The program tries the settings that were once open to it, by their harmless values: what they are already."""
    places = [
        "kernel/core_pattern",
        "kernel/hostname",
        "vm/swappiness",
        "fs/aio-max-nr",
        "vm/drop_caches",
    ]
    before = [Path("/proc/sys", place).read_text() for place in places[:4]]
    program = f"""
for place, text in zip({places!r}, {before!r}):
    try: open('/proc/sys/' + place, 'w').write(text); print('written', place)
    except OSError as error: print(type(error).__name__)
"""
    assert set(Sandbox(5.0, 128).run(program).output.split()) == {"FileNotFoundError"}
    assert [Path("/proc/sys", place).read_text() for place in places[:4]] == before


def processes_of_the_sandbox() -> list[Path]:
    """Return the folders in /proc of this process's sandboxed programs and of their keepers."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            group = (
                (folder / "stat").read_text().rpartition(")")[2].split()[2]
                if folder.name.isdigit()
                else ""
            )
            if (
                group
                and LAUNCHER.strip()[:20].encode() in Path("/proc", group, "cmdline").read_bytes()
            ):
                found.append(folder)
    return found


@needs_bwrap
def test_to_the_kernel_a_program_is_nobody_and_its_keepers_hold_nothing_of_the_caller(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "open.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        thread = threading.Thread(
            target=Sandbox(20.0).run, args=("print('up', flush=True)\nimport time\ntime.sleep(3)",)
        )
        thread.start()
        deadline = time.monotonic() + 15
        program = None
        while program is None and time.monotonic() < deadline:
            time.sleep(0.05)
            for folder in processes_of_the_sandbox():
                with contextlib.suppress(OSError):
                    status = (folder / "status").read_text()
                    if re.search(r"^Seccomp:\s+2$", status, re.MULTILINE):
                        program = status
        keepers = processes_of_the_sandbox()
        environments = [(folder / "environ").read_bytes() for folder in keepers]
        places = [(folder / "cwd").readlink() for folder in keepers]
        files = [link.readlink().name for folder in keepers for link in (folder / "fd").iterdir()]
    assert program is not None
    field = dict(line.split(":\t", 1) for line in program.splitlines() if ":\t" in line)
    assert "0" not in field["Uid"].split() + field["Gid"].split()
    assert field["Groups"].strip() == "" or not ROOT
    assert [int(field[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [
        0,
        0,
        0,
        0,
    ]
    assert field["NoNewPrivs"] == "1"
    assert len(keepers) >= 3 and not any(b"secret" in text for text in environments)
    assert str(tmp_path) not in str(places) and "open.txt" not in files
    thread.join()


@needs_bwrap
def test_nothing_is_left_running_and_the_sandbox_returns_where_the_program_closed_its_pipes():
    short = Sandbox(seconds=1.0)
    for program in (
        "import time\ntime.sleep(1234.5)",
        "import os, time\nos.close(1)\ntime.sleep(1234.5)",
    ):
        began = time.monotonic()
        assert short.run(program).code is None
        assert time.monotonic() - began < 10
    assert processes_of_the_sandbox() == []


@needs_bwrap
def test_a_long_input_is_given_whole_and_a_long_program_is_refused():
    text = "0123456789" * 50_000
    assert Sandbox().run("import sys\nprint(len(sys.stdin.read()))", text).output == "500000\n"
    assert Sandbox().run("#" + "x" * MAX_PROGRAM).code == 1


@needs_bwrap
def test_what_programs_usually_need_works():
    program = """
import asyncio, collections, concurrent.futures, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
import queue, random, re, signal, sqlite3, statistics, string, sys, tempfile, threading, typing, uuid, zoneinfo, zlib
async def work(): await asyncio.sleep(0.001); return 1
print(asyncio.run(work()), list(concurrent.futures.ThreadPoolExecutor(4).map(abs, [-2])), zoneinfo.ZoneInfo("Europe/Berlin"))
with tempfile.TemporaryDirectory() as folder:
    open(folder + "/x", "w").write("file"); print(open(folder + "/x").read())
print(sqlite3.connect(":memory:").execute("select 3").fetchall(), len(uuid.uuid4().bytes), random.SystemRandom().random() < 1)
signal.signal(signal.SIGUSR1, lambda *_: print("signal")); signal.raise_signal(signal.SIGUSR1)
print(sys.stdin.isatty(), input())
import multiprocessing.pool, os, shutil
with multiprocessing.pool.ThreadPool(2) as pool: print(pool.map(abs, [-4]))
open("a", "w").write("x"); shutil.copy2("a", "b"); print(open("b").read(), os.sysconf("SC_PHYS_PAGES") > 0, os.getpgrp() >= 0)
"""
    expected = "1 [2] Europe/Berlin\nfile\n[(3,)] 16 True\nsignal\nFalse in\n[4]\nx True True\n"
    assert Sandbox().run(program, "in\n").output == expected
    assert (
        Sandbox(memory_mb=64).run("import asyncio, json\nprint(1)").output == "1\n"
    )  # the least that a file may ask for


@needs_bwrap
def test_a_sandbox_that_fails_later_is_an_error_and_no_score(monkeypatch, tmp_path):
    made = Sandbox()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    made.bwrap = str(broken)
    with pytest.raises(
        RewardError, match="a program could not be started in the sandbox .exit code 1"
    ):
        made.run("print(1)")
    made.bwrap = str(tmp_path / "gone")
    made.bounds_all_memory = False
    with pytest.raises(RewardError, match="could not be started in the sandbox: No such file"):
        made.run("print(1)")


@needs_bwrap
def test_memory_groups_are_removed_and_without_one_the_rest_still_holds(monkeypatch):
    made = Sandbox(memory_mb=128)
    if made.bounds_all_memory:
        assert made.run("print(1)").output == "1\n"
        cgroup.remove_left(5.0)
        assert not [
            path
            for parent, _ in cgroup._parents()
            for path in parent.glob(f"quartet-{os.getpid()}-*")
        ]
    monkeypatch.setattr(module, "memory_cgroup", lambda limit: None)
    plain = Sandbox(memory_mb=128)
    assert not plain.bounds_all_memory
    assert plain.run("try: bytearray(10**9)\nexcept MemoryError: print('no')").output == "no\n"


# --- where programs cannot be contained, none is run


def test_without_bubblewrap_or_on_another_machine_no_program_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(
        RewardError, match="needs Linux and bubblewrap.*Without it no program is run"
    ):
        Sandbox()
    broken = tmp_path / "bwrap"
    broken.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(broken))
    with pytest.raises(
        RewardError,
        match="cannot isolate programs here .bwrap: No permissions to create new namespace",
    ):
        Sandbox()
    with pytest.raises(RewardError, match="not on riscv64"):
        seccomp_filter("riscv64")


def refusal(python: list[str]) -> str:
    """Return what Python, called by `python`, says about making a sandbox."""
    code = "from quartet.rewards.sandbox import Sandbox\ntry: Sandbox(); print('runs')\nexcept Exception as e: print(e)"
    done = subprocess.run(
        [*python, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    return done.stdout.strip() or done.stderr


@needs_root
@pytest.mark.parametrize("right", ["sys_admin", "setuid", "setgid"])
@pytest.mark.slow
def test_root_without_the_rights_to_contain_programs_is_refused(right):
    said = refusal(["setpriv", f"--bounding-set=-{right}", f"--inh-caps=-{right}", sys.executable])
    assert (
        "cannot isolate programs here" in said
        and "As root it needs CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID." in said
    )


@needs_root
def test_a_user_without_namespaces_is_refused():
    said = refusal(as_ordinary_user(namespaces=False))
    assert "cannot isolate programs here (bwrap: " in said and "It needs user namespaces." in said


@needs_bwrap
@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("    os.setresuid(user, user, user)", "    pass"),
        (
            'check(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()), "capset")',
            "pass",
        ),
        ('"seccomp")', '"seccomp") or sys.exit("no filter here")'),
        ('b"size=16m,nr_inodes=1024,mode=1777"', 'b"size=nonsense"'),
    ],
)
def test_a_layer_that_fails_ends_the_launcher(monkeypatch, line, instead):
    """Each layer is taken out in turn; the launcher notices, or the kernel does."""
    if "setresuid" in line and not ROOT:
        pytest.skip("an ordinary caller does not become another user")
    assert line in LAUNCHER
    monkeypatch.setattr(module, "LAUNCHER", LAUNCHER.replace(line, instead))
    with pytest.raises(RewardError, match="cannot isolate programs here"):
        Sandbox()


# --- the filter, read by an interpreter of its own


def judged(code: bytes, machine: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Return what a filter says of a call: an interpreter of the instructions that it is made of."""
    data = struct.pack("<IIQ6Q", number, machine, 0, *(*arguments, *[0] * (6 - len(arguments))))
    program = list(struct.iter_unpack("HBBI", code))
    at, accumulator = 0, 0
    while True:
        operation, yes, no, value = program[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x15:
            at += yes if accumulator == value else no
        elif operation == 0x35:
            at += yes if accumulator >= value else no
        else:
            assert operation == 0x06
            return value


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_allows_the_list_and_nothing_else(machine):
    code, own = seccomp_filter(machine), ARCHITECTURES[machine]
    column = list(ARCHITECTURES).index(machine)
    names = {
        numbers[column]: name for name, numbers in NUMBERS.items() if numbers[column] is not None
    }
    assert len(names) == sum(numbers[column] is not None for numbers in NUMBERS.values())
    for number in range(600):
        name = names.get(number)
        arguments = [0] * 6
        for rule in RULES.get(name or "", ()):
            arguments[rule.argument] |= rule.values[0]
        expected = ENOSYS if name is None else REFUSED.get(name, ALLOW)
        assert judged(code, own, number, tuple(arguments)) == expected, (number, name)
        for other in ARCHITECTURES.values():
            if other != own:
                assert judged(code, other, number) == KILL_PROCESS
    if machine == "x86_64":
        assert judged(code, own, 0x40000000 + 39) == KILL_PROCESS


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("mmap", (0, 4096, 3, 0x22), True),
        ("mmap", (0, 4096, 3, 0x21), False),
        ("mmap", (0, 4096, 3, 0x03), True),
        ("clone", (0x3D0F00,), True),
        ("clone", (0x7D0F00,), True),
        ("clone", (0x01200011,), False),
        ("clone", (0x3D0F00 | 0x10000000,), False),
        ("clone", (0x3D0B00,), False),
        ("clone", (0x3D0D00,), False),
        ("clone", (0x3D0E00,), False),
        ("clone", (0x3D0700,), False),
        ("mmap", (0, 4096, 3, 0x01), True),
        ("mmap", (0, 4096, 3, 0x23), False),
        ("sendto", (1, 0, 1, 0, 0, 0), True),
        ("sendto", (1, 0, 1, 0, 0, 16), False),
        ("clone", (0x4111,), False),
        ("fcntl", (1, 4), True),
        ("fcntl", (1, 6), False),
        ("fcntl", (1, 1031), False),
        ("fcntl", (1, 1030), True),
        ("ioctl", (1, 0x5401), True),
        ("ioctl", (1, 0x5412), False),
        ("prctl", (15,), True),
        ("prctl", (1,), False),
        ("prlimit64", (0,), True),
        ("prlimit64", (1,), False),
        ("kill", (2,), True),
        ("kill", (1,), False),
        ("kill", (0xFFFFFFFF,), False),
        ("tgkill", (2, 3), True),
        ("tgkill", (1, 1), False),
        ("socketpair", (1,), True),
        ("socketpair", (2,), False),
    ],
)
def test_arguments_are_judged(name, arguments, allowed):
    for machine, number in zip(ARCHITECTURES, NUMBERS[name], strict=True):
        assert number is not None
        expected = ALLOW if allowed else EPERM
        assert (
            judged(seccomp_filter(machine), ARCHITECTURES[machine], number, arguments) == expected
        )


@pytest.mark.parametrize(
    ("machine", "header", "aliases"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", {}),
        ("aarch64", "/usr/include/asm-generic/unistd.h", {"newfstatat": "fstatat"}),
    ],
)
def test_numbers_are_those_of_the_kernels_headers(machine, header, aliases):
    if not Path(header).is_file() or (machine == "x86_64" and platform.machine() != "x86_64"):
        pytest.skip("the kernel's headers are not here")
    found = dict(re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    column = list(ARCHITECTURES).index(machine)
    for name, numbers in NUMBERS.items():
        number = numbers[column]
        assert found.get(aliases.get(name, name)) == (None if number is None else str(number)), name


def test_the_docs_count_the_calls_and_the_probes_as_they_are():
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    x86, arm = (
        sum(
            numbers[column] is not None and name not in REFUSED for name, numbers in NUMBERS.items()
        )
        for column in (0, 1)
    )
    assert f"{x86} calls on x86_64 and {arm} on aarch64, {len(RULES)} of them" in text
    assert f"({FIRST_USER} to {FIRST_USER + USERS - 1} where the run is root" in text
    if platform.machine() == "x86_64":
        count = sum(len(probes(kind)) for kind in KINDS)
        calls = len(probes("system call"))
        assert f"{count} hostile programs" in text and f"and {calls} system calls)" in text
