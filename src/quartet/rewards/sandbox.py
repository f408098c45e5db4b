"""Untrusted Python programs, run where they can do no harm.

Three layers:

- bubblewrap gives each program namespaces of its own (processes, network, mounts, IPC, host name;
  users too where the caller is not root) and a read-only file system of the interpreter and its
  libraries. There is no `/proc` and no `/sys`, `/dev` holds null, full, random and urandom, and
  nothing of the caller is visible but the interpreter's path: no environment, arguments, open
  files, working directory.
- A launcher inside mounts a small `/tmp` and `/dev/shm`, limits its resources, gives up every right
  and becomes the program. Where the caller is root, it becomes an unprivileged host user first: to
  the kernel, too, the program is not root.
- A seccomp filter allows the calls that a Python program needs and no others (`seccomp.py`).

A memory cgroup bounds the sum of all memory where one can be made (`cgroup.py`). The caller bounds
wall time and output, and ends the whole process group. Where any of the three layers cannot be had,
nothing is run.
"""

import contextlib
import itertools
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from quartet.rewards.cgroup import memory_cgroup
from quartet.rewards.protocol import RewardError
from quartet.rewards.seccomp import seccomp_filter

MAX_OUTPUT = 1_000_000
MAX_PROGRAM = 1_000_000
OUTSIDE_MB = 32
"""What a program can make the kernel hold beside its address space: files in /tmp (16 MB) and
/dev/shm (1 MB), buffers of pipes and socket pairs (64 descriptors), stacks of threads (64)."""
START_SECONDS = 60.0
"""How long a program may take to be started."""
GRACE_SECONDS = 2.0
"""How long the end of a killed process is waited for."""
FIRST_USER, USERS = 60600, 512
"""Host users that programs run as where the caller is root: ids that neither Debian nor systemd
gives to anybody. Programs that run at the same time are different users."""


@dataclass(frozen=True)
class Ran:
    """The outcome of a program. `output` is its standard output, up to `MAX_OUTPUT` bytes."""

    output: str
    code: int | None
    """The exit code; None where the program was stopped, for time or for output."""


class Sandbox:
    """Runs Python programs for at most `seconds` of wall time each, in `memory_mb` MiB of memory.

    `OUTSIDE_MB` of these are kept for what the kernel holds outside the program's address space.
    Page tables count only where there is a memory cgroup (`bounds_all_memory`); elsewhere a program
    that maps single pages far apart can take up to 512 MB more in them.

    Raises `RewardError` where programs cannot be isolated.
    """

    def __init__(self, seconds: float = 10.0, memory_mb: int = 512) -> None:
        self.seconds, self.memory_mb = seconds, memory_mb
        found = shutil.which("bwrap")
        self.bwrap = None if found is None else str(Path(found).absolute())
        if sys.platform != "linux" or self.bwrap is None:
            raise RewardError(
                'reward.type = "code" needs Linux and bubblewrap, which isolates the programs '
                "(Debian: apt install bubblewrap)."
                " Without it no program is run."
            )
        self.filter = seccomp_filter(platform.machine())
        self._users = itertools.count(os.getpid() * 31)
        self.bounds_all_memory = memory_cgroup(memory_mb) is not None
        output, complaint = self._probe()
        if output != "42\n":
            needs = (
                "As root it needs CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID"
                if _root()
                else "It needs user namespaces"
            )
            raise RewardError(
                f"bubblewrap cannot isolate programs here ({complaint or 'no output'}); without it "
                f"no program is run. {needs}."
            )

    def run(self, program: str, stdin: str = "") -> Ran:
        """Run a program, given as source text, with `stdin` as its standard input. Its standard
        error is thrown away.

        Raises `RewardError` where the program could not be started: that says nothing about the
        program.
        """
        data = program.encode("utf-8", errors="surrogatepass")
        if len(data) > MAX_PROGRAM:
            return Ran("", 1)
        return self._run(data, stdin.encode("utf-8", errors="surrogatepass"))

    def _probe(self) -> tuple[str, str]:
        """Run a program that is known; return its output and the last line of what bubblewrap or
        the launcher said."""
        with tempfile.TemporaryFile() as complaints:
            try:
                output = self._run(b"print(6 * 7)", b"", complaints.fileno()).output
            except RewardError:
                output = ""
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
        return output, lines[-1] if lines else ""

    def _run(self, program: bytes, stdin: bytes, stderr: int = subprocess.DEVNULL) -> Ran:
        """Run a program in a memory cgroup of its own, where there is one."""
        group = memory_cgroup(self.memory_mb) if self.bounds_all_memory else None
        with contextlib.ExitStack() as stack:
            try:
                if group is not None:
                    stack.enter_context(group)
                source = os.memfd_create("program")
                stack.callback(os.close, source)
                os.write(source, program)
                os.lseek(source, 0, os.SEEK_SET)
                started, starting = os.pipe()
                stack.callback(os.close, started)
                try:
                    process = subprocess.Popen(
                        [
                            *(group.enter_command() if group is not None else []),
                            *self._command(source, starting),
                        ],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        pass_fds=[source, starting],
                        env={},
                        cwd="/",
                        start_new_session=True,  # one process group, which is ended as a whole
                    )
                finally:
                    os.close(starting)
            except OSError as error:
                raise RewardError(
                    f"a program could not be started in the sandbox: {error.strerror or error}."
                ) from None
            return _watch(process, started, stdin, self.seconds)

    def _command(self, source: int, starting: int) -> list[str]:
        prefix = Path(sys.base_prefix).resolve()
        python = prefix / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
        user = FIRST_USER + next(self._users) % USERS if _root() else os.getuid()
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
        if _root():
            rights += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            rights += ["--unshare-user"]
        return [
            *(
                str(self.bwrap),
                "--unshare-ipc",
                "--unshare-pid",
                "--unshare-net",
                "--unshare-uts",
                "--unshare-cgroup-try",
            ),
            *(*rights, "--die-with-parent", "--clearenv", "--hostname", "sandbox"),
            *_interpreter_mounts(prefix, python),
            *(
                "--perms",
                "0755",
                "--dir",
                "/dev",
                "--perms",
                "0755",
                "--dir",
                "/dev/shm",
                "--perms",
                "0755",
                "--dir",
                "/tmp",
            ),
            *(part for name in DEVICES for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")),
            *(part for name in DEVICES for part in ("--remount-ro", f"/dev/{name}")),
            *(
                "--perms",
                "0444",
                "--ro-bind-data",
                str(source),
                "/program.py",
                "--remount-ro",
                "/",
                "--chdir",
                "/",
            ),
            *("--", str(python), "-I", "-S", "-c", LAUNCHER),
            *(
                str(self.memory_mb - OUTSIDE_MB),
                str(int(self.seconds) + 1),
                str(user),
                self.filter.hex(),
                str(starting),
            ),
        ]


DEVICES = ("null", "full", "random", "urandom")
"""Without zero: mapped shared, it is memory that RLIMIT_AS forgets after a partial unmap."""


def _root() -> bool:
    return os.geteuid() == 0


def _interpreter_mounts(prefix: Path, python: Path) -> list[str]:
    """Return bubblewrap's arguments for the interpreter, its library and the system's shared
    libraries, read-only."""
    mounts: list[str] = []
    libraries = ("lib", "lib32", "lib64")
    for folder in libraries:
        path = Path("/") / folder
        if path.is_symlink():
            mounts += ["--symlink", str(path.readlink()), f"/{folder}"]
        elif path.is_dir():
            mounts += ["--ro-bind", f"/{folder}", f"/{folder}"]
    seen = ["/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    seen += [str(prefix / folder) for folder in libraries if str(prefix / folder) not in seen]
    seen += [str(python.resolve()), str(python)]
    parents = {parent for shown in seen for parent in Path(shown).parents if parent != Path("/")}
    for parent in sorted(parents):  # bubblewrap would make them readable for its own user only
        mounts += ["--perms", "0755", "--dir", str(parent)]
    for shown in seen:
        mounts += ["--ro-bind-try", shown, shown]
    return mounts


LAUNCHER = """
import ctypes, os, resource, runpy, sys
memory, seconds, user = int(sys.argv[1]) << 20, int(sys.argv[2]), int(sys.argv[3])
code = bytes.fromhex(sys.argv[4])
libc = ctypes.CDLL(None, use_errno=True)
def check(result, what):
    if result != 0:
        sys.exit(what + ": " + os.strerror(ctypes.get_errno()))
def prctl(*numbers):
    zeros = [ctypes.c_ulong(0)] * (5 - len(numbers))
    return libc.prctl(numbers[0], *(ctypes.c_ulong(n) for n in numbers[1:]), *zeros)
for place, options in (
    (b"/tmp", b"size=16m,nr_inodes=1024,mode=1777"),
    (b"/dev/shm", b"size=1m,nr_inodes=64,mode=1777"),
):
    flags = ctypes.c_ulong(2 | 4 | 8)  # nosuid, nodev, noexec
    check(libc.mount(b"tmpfs", place, b"tmpfs", flags, options), "mount")
os.chdir("/tmp")
started = os.dup2(int(sys.argv[5]), 3, inheritable=False)
os.closerange(4, 4096)
# PR_SET_THP_DISABLE: the kernel keeps a huge page of which all but a part was unmapped.
check(prctl(41, 1), "huge pages")
for what, limit in (
    ("AS", memory), ("CPU", seconds), ("FSIZE", 1 << 24),
    ("NOFILE", 64), ("CORE", 0), ("NPROC", 64),
    ("MEMLOCK", 0), ("MSGQUEUE", 0), ("SIGPENDING", 64), ("NICE", 0), ("RTPRIO", 0),
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
if os.getuid() != user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
check(prctl(47, 4), "ambient capabilities")  # PR_CAP_AMBIENT_CLEAR_ALL
check(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()), "capset")
held = (ctypes.c_uint32 * 6)()
check(libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held), "capget")
if 0 in os.getresuid() or 0 in os.getresgid() or any(held) or prctl(39) != 1:  # PR_GET_NO_NEW_PRIVS
    sys.exit("the program would keep rights")
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
program = Filter(len(code) // 8, code)
none = ctypes.c_ulong(0)
check(libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(program), none, none), "seccomp")
os.write(started, b"1")
os.close(started)
sys.argv = ["/program.py"]
runpy.run_path("/program.py", run_name="__main__")
"""
"""The first program inside. It has CAP_SYS_ADMIN over its own mounts (and may become another user
where the caller is root) until it gives that up, and checks that nothing is left before the
untrusted program starts. For an ordinary caller, the program keeps the caller's user id, in a user
namespace of its own where that id owns nothing but /tmp and /dev/shm."""


def _watch(process: "subprocess.Popen[bytes]", started: int, stdin: bytes, seconds: float) -> Ran:
    """Feed a process its input and read its output, up to the limits, and end its whole process
    group. `seconds` count from when the launcher hands over to the program, which `started` tells.
    Nothing here waits without a deadline, whatever the program does to its pipes."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    output, begun, stopped = bytearray(), False, False
    remaining = memoryview(stdin)
    try:
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdout.fileno(), False)
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(started, selectors.EVENT_READ)
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while len(selector.get_map()) and not stopped:
                ready = [
                    key.fileobj for key, _ in selector.select(max(deadline - time.monotonic(), 0))
                ]
                if started in ready:
                    selector.unregister(started)
                    begun = os.read(started, 1) == b"1"
                    if not begun:
                        break
                    deadline = time.monotonic() + seconds
                if process.stdout in ready:
                    piece = os.read(process.stdout.fileno(), 65536)
                    output += piece
                    if not piece:
                        selector.unregister(process.stdout)
                if process.stdin in ready:
                    remaining = remaining[_write(process.stdin.fileno(), remaining) :]
                    if not remaining:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                stopped = not ready or len(output) > MAX_OUTPUT or time.monotonic() >= deadline
        if (
            not stopped
        ):  # the pipes are closed: the program has ended, or has closed them and goes on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            stopped = process.returncode is None
    finally:
        _end(process)
    if not begun:
        raise RewardError(
            f"a program could not be started in the sandbox (exit code {process.returncode})."
        )
    text = output[:MAX_OUTPUT].decode(
        "utf-8", errors="surrogateescape"
    )  # bytes that are no text equal no text
    return Ran(text, None if stopped else process.returncode)


def _write(pipe: int, data: memoryview) -> int:
    """Return how many bytes went into a pipe; all of them where it is closed at the other end."""
    try:
        return os.write(pipe, data[:65536]) if data else 0
    except BlockingIOError:
        return 0
    except OSError:
        return len(data)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of the group: bubblewrap, its reaper (the init of the process namespace,
    whose end is the end of every process in it) and the program. The group's leader has not been
    waited for, so its id is not used again."""
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RewardError(
            f"process {process.pid} of the sandbox does not end though it was killed; no further "
            f"program is run."
        ) from None
    finally:
        process.stdin.close()
        process.stdout.close()
