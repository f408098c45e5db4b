"""Untrusted Python programs, run where they can harm nobody.

bubblewrap gives each program namespaces of its own (users, processes, network, mounts, IPC, host name), a file system that is
read-only but for a small /tmp of its own, no capabilities, an empty environment. A seccomp filter takes away new processes,
sockets, tracing, mounting, keys and kernel modules; resource limits bound memory, CPU time, files and their size; wall time and
output are bounded from outside. Where this cannot be had, nothing is run.
"""

import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from quartet.rewards.protocol import RewardError

MAX_OUTPUT = 1_000_000


@dataclass(frozen=True)
class Ran:
    """What came of a program. `output` is what it wrote to standard output, up to a megabyte."""

    output: str
    code: int | None
    """None: it was stopped, for time or for output."""


class Sandbox:
    """Runs programs for at most `seconds` each, in at most `memory_mb`."""

    def __init__(self, seconds: float = 10.0, memory_mb: int = 512) -> None:
        self.seconds, self.memory_mb = seconds, memory_mb
        self.bwrap = shutil.which("bwrap")
        if sys.platform != "linux" or self.bwrap is None:
            raise RewardError(
                'reward.type = "code" needs Linux and bubblewrap, which isolates the programs (Debian: apt install bubblewrap).'
                " Without it no program is run."
            )
        self.filter = seccomp_filter(platform.machine())
        probe = self.run("print(6 * 7)")
        if probe.output != "42\n":
            raise RewardError(
                f"bubblewrap cannot isolate programs here ({self._complaint() or 'no output'}); without it no program is run. "
                "It needs user namespaces."
            )

    def run(self, program: str, stdin: str = "") -> Ran:
        """A program as a file of its own, its standard error thrown away."""
        with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
            file.write(program)
            file.flush()
            return self._started(Path(file.name), stdin)

    def _started(self, program: Path, stdin: str) -> Ran:
        read, write = os.pipe()
        os.write(write, self.filter)
        os.close(write)
        try:
            process = subprocess.Popen(
                self._command(program, read),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[read],
                start_new_session=True,
            )
        finally:
            os.close(read)
        return _watched(process, stdin.encode(), self.seconds)

    def _command(self, program: Path, seccomp: int) -> list[str]:
        prefix = str(Path(sys.base_prefix).resolve())
        python = str(Path(prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
        shown = [*("--ro-bind", "/usr", "/usr"), *("--ro-bind-try", "/etc/alternatives", "/etc/alternatives")]
        for folder in ("bin", "lib", "lib32", "lib64"):
            path = Path("/") / folder
            if path.is_symlink():
                shown += ["--symlink", str(path.readlink()), f"/{folder}"]
            elif path.is_dir():
                shown += ["--ro-bind", f"/{folder}", f"/{folder}"]
        if not prefix.startswith("/usr"):
            shown += ["--ro-bind", prefix, prefix]
        return [
            *(str(self.bwrap), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
            *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
            *shown,
            *("--proc", "/proc", "--dev", "/dev", "--size", "16777216", "--tmpfs", "/tmp"),
            *("--ro-bind", str(program), "/program.py", "--remount-ro", "/", "--chdir", "/tmp"),
            *("--seccomp", str(seccomp), "--", python, "-I", "-S", "-c", LAUNCHER),
            *(str(self.memory_mb), str(int(self.seconds) + 1)),
        ]

    def _complaint(self) -> str:
        """What bubblewrap itself says when it cannot."""
        done = subprocess.run(
            [str(self.bwrap), "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True, check=False
        )
        return done.stderr.strip().splitlines()[0] if done.stderr.strip() else ""


LAUNCHER = """
import resource, runpy, sys
memory, seconds = int(sys.argv[1]) << 20, int(sys.argv[2])
for what, limit in (("AS", memory), ("CPU", seconds), ("FSIZE", 1 << 24), ("NOFILE", 64), ("CORE", 0), ("NPROC", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
sys.argv = ["/program.py"]
runpy.run_path("/program.py", run_name="__main__")
"""
"""What runs first inside: it bounds itself, and becomes the program."""


def _watched(process: "subprocess.Popen[bytes]", stdin: bytes, seconds: float) -> Ran:
    """Give it its input, read its output up to the limit, and stop it when its time is over."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Timer(seconds, process.kill)
    late.start()
    feeder = threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True)
    feeder.start()
    output = b""
    stopped = False
    while piece := os.read(process.stdout.fileno(), 65536):
        output += piece
        if len(output) > MAX_OUTPUT:
            process.kill()
            stopped = True
            break
    process.wait()
    stopped = stopped or not late.is_alive()
    late.cancel()
    feeder.join()
    process.stdout.close()
    return Ran(output[:MAX_OUTPUT].decode("utf-8", errors="replace"), None if stopped else process.returncode)


def _feed(pipe: IO[bytes], data: bytes) -> None:
    try:
        with pipe:
            pipe.write(data)
    except (BrokenPipeError, OSError):
        pass


# --- seccomp -------------------------------------------------------------------------------------------------------------

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
CLONE_THREAD = 0x00010000
COMMON = (425, 428, 429, 430, 432, 438)
"""io_uring_setup, open_tree, move_mount, fsopen, fsmount, pidfd_getfd: the same everywhere."""
NUMBERS = {
    # fork, vfork (not on ARM), socket, ptrace, process_vm_readv, process_vm_writev, mount, umount2, pivot_root, unshare, setns,
    # keyctl, add_key, request_key, bpf, perf_event_open, userfaultfd, kexec_load, init_module, finit_module, delete_module,
    # open_by_handle_at; and clone, clone3
    "x86_64": (
        0xC000003E,
        (*COMMON, 57, 58, 41, 101, 310, 311, 165, 166, 155, 272, 308, 250, 248, 249, 321, 298, 323, 246, 175, 313, 176, 304),
        56,
        435,
    ),
    "aarch64": (
        0xC00000B7,
        (*COMMON, 198, 117, 270, 271, 40, 39, 41, 97, 268, 219, 217, 218, 280, 241, 282, 104, 105, 273, 106, 265),
        220,
        435,
    ),
}


def seccomp_filter(machine: str) -> bytes:
    """A classic BPF program over (number, architecture, arguments) of each system call: what is named is refused with EPERM,
    clone but for threads too, clone3 does not exist (libraries then take clone), another architecture's calls kill."""
    if machine not in NUMBERS:
        raise RewardError(f"programs can be isolated on {' and '.join(NUMBERS)}, not on {machine}.")
    architecture, denied, clone, clone3 = NUMBERS[machine]
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    code: list[tuple[int, int, int, int]] = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, KILL), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, KILL)]  # x32's numbers
    for number in denied:
        code += [(equal, 0, 1, number), (give, 0, 0, EPERM)]
    code += [(equal, 0, 1, clone3), (give, 0, 0, ENOSYS)]
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (has, 1, 0, CLONE_THREAD), (give, 0, 0, EPERM)]
    code += [(give, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
