"""Programs that try to leave the sandbox, to forge, to exhaust, to persist and to observe.

Each prints a line that begins with ESCAPED where its attempt succeeds; it may do anything else. None of them could harm the
host if it succeeded: files are opened for writing but not written, settings are left as they are, and what takes memory or
time is bounded by itself. `python -m tests.rewards.sandbox_probes [KIND]` runs them as the calling user and prints the outcomes
as JSON.
"""

import json
import os
import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache

from quartet.rewards.cgroup import memory_cgroup
from quartet.rewards.sandbox import Sandbox

KINDS = ("escape", "persist", "exhaust", "observe", "system call")
MEMORY_MB = 192
SECONDS = 2.0
TIME_ALLOWED = 20.0
"""Seconds after which a program counts as having outlived its limit of `SECONDS`; machines may be busy."""
WALKS = (
    "escape: no file anywhere opens for writing but null devices",
    "escape: no folder takes a new file but /tmp and /dev/shm",
)
"""Probes that visit every file, and are given a minute for it."""
SECRET = "QUARTET_PROBE_SECRET"

PRELUDE = f"""
import ctypes, errno, os, sys, mmap, signal, socket, struct, threading, time, resource
MEMORY = {MEMORY_MB} << 20
CGROUP = {memory_cgroup(MEMORY_MB) is not None}
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
def escaped(*words):
    print("ESCAPED", *words, flush=True)
def refused(attempt, *words):
    try:
        result = attempt()
    except BaseException as error:
        print(type(error).__name__, error)
    else:
        if result is None or not (isinstance(result, int) and result == -1):
            escaped(result, *words)
"""

SYSCALLS_X86 = {
    "fork": (57,), "vfork is never tried: it shares the stack": (57,), "clone without a thread": (56, 17, 0, 0, 0, 0),
    "clone3": (435, 0, 88), "execve": (59, 0, 0, 0), "socket": (41, 2, 1, 0), "ptrace": (101, 16, 1, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0), "process_vm_writev": (311, 1, 0, 0, 0, 0, 0), "pidfd_open": (434, 1, 0),
    "pidfd_getfd": (438, 0, 0, 0), "mount": (165, 0, 0, 0, 0, 0), "umount2": (166, 0, 0), "pivot_root": (155, 0, 0),
    "chroot": (161, 0), "open_tree": (428, -100, 0, 0), "fsopen": (430, 0, 0), "mount_setattr": (442, 0, 0, 0, 0, 0),
    "unshare": (272, 0x10000000), "setns": (308, 0, 0), "keyctl": (250, 0, -3, 0, 0, 0), "add_key": (248, 0, 0, 0, 0, 0),
    "bpf": (321, 0, 0, 0), "perf_event_open": (298, 0, 0, 0, 0, 0), "userfaultfd": (323, 0), "io_uring_setup": (425, 1, 0),
    "init_module": (175, 0, 0, 0), "finit_module": (313, 0, 0, 0), "kexec_load": (246, 0, 0, 0, 0),
    "open_by_handle_at": (304, 0, 0, 0), "name_to_handle_at": (303, -100, 0, 0, 0, 0), "memfd_create": (319, 0, 0),
    "memfd_secret": (447, 0), "shmget": (29, 0, 4096, 0o1600), "msgget": (68, 0, 0o1600), "semget": (64, 0, 1, 0o1600),
    "mq_open": (240, 0, 0, 0, 0), "inotify_init1": (294, 0), "fanotify_init": (300, 0, 0), "setuid": (105, 0),
    "setresuid": (117, 0, 0, 0), "capset": (126, 0, 0), "setrlimit of another": (302, 1, 7, 0, 0), "prctl pdeathsig": (157, 1, 0),
    "seccomp": (317, 0, 0, 0), "sendto an address": (44, 0, 0, 0, 0, 0, 16), "setsid": (112,), "setpgid": (109, 0, 0), "personality": (135, 0x0040000),
    "syslog": (103, 3, 0, 0), "reboot is asked with wrong magic": (169, 0, 0, 0, 0), "sethostname": (170, 0, 0),
    "settimeofday": (164, 0, 0), "adjtimex": (159, 0), "swapon": (167, 0, 0), "acct": (163, 0), "quotactl": (179, 0, 0, 0, 0),
    "iopl": (172, 3), "modify_ldt": (154, 0, 0, 0), "kcmp": (312, 1, 1, 0, 0, 0), "setxattr": (188, 0, 0, 0, 0, 0),
    "flock": (73, 0, 0), "sched_setaffinity": (203, 1, 0, 0), "setpriority": (141, 0, 1, 0), "migrate_pages": (256, 1, 0, 0, 0),
    "timer_create": (222, 0, 0, 0), "splice": (275, 0, 0, 0, 0, 0, 0), "vmsplice": (278, 0, 0, 0, 0), "sendmsg": (46, 0, 0, 0),
    "recvmsg": (47, 0, 0, 0), "x32 getpid": (0x40000000 + 39,),
}  # fmt: skip
"""A call is contained where it is refused with EPERM or ENOSYS (before its arguments are looked at), or ends the program."""

SYSCALL_PROBE = """
result = syscall(*{arguments!r})
code = ctypes.get_errno()
if result != -1 or code not in (errno.EPERM, errno.ENOSYS):
    escaped(result, errno.errorcode.get(code, code))
"""

PROGRAMS = {
    # --- escape
    "escape: no file of /proc and /sys is there": """
for place in ("/proc", "/sys", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/mem", "/proc/self/mem", "/proc/1/environ"):
    if os.path.lexists(place): escaped(place)
""",
    "escape: no file anywhere opens for writing but null devices": """
allowed = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}
count = 0
for folder, folders, files in os.walk("/"):
    for name in files:
        path = os.path.join(folder, name)
        count += 1
        try: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
        except OSError: continue
        if path not in allowed: escaped(path)
print(count)
""",
    "escape: no folder takes a new file but /tmp and /dev/shm": """
for folder, folders, files in os.walk("/"):
    if folder.split("/")[1] == "tmp" or folder == "/dev/shm": continue
    try: os.mkdir(os.path.join(folder, "quartet_probe")); escaped(folder)
    except OSError: pass
""",
    "escape: no folder can be renamed, removed or given other rights": """
for path in ("/usr", "/usr/lib", "/dev/null", "/dev", "/program.py", "/lib", "/"):
    for attempt in (lambda: os.rename(path, path + "2"), lambda: os.chmod(path, 0o777), lambda: os.rmdir(path), lambda: os.unlink(path)):
        try: attempt(); escaped(path)
        except OSError: pass
""",
    "escape: the program is nobody": """
if 0 in os.getresuid() + os.getresgid(): escaped(os.getresuid())
""",
    "escape: rights cannot be taken again": """
for attempt in (lambda: os.setuid(0), lambda: os.seteuid(0), lambda: os.setgroups([0]), lambda: os.setresgid(0, 0, 0), lambda: os.chroot("/tmp")):
    refused(attempt)
""",
    "escape: no device node can be made": """
refused(lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0)))
refused(lambda: os.mkfifo("/tmp/fifo"))
""",
    "escape: no program can be started": """
import subprocess
for attempt in (lambda: subprocess.run([sys.executable, "-c", "1"]), lambda: os.execv(sys.executable, [sys.executable, "-c", "print('ESCAPED')"]),
                lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", "print('ESCAPED')"], {}), lambda: os.system("true") or None, os.fork, os.forkpty):
    try:
        result = attempt()
        if isinstance(result, int) and (result == 0 or os.getpid() != 2): escaped(result)
    except OSError as error: print(error)
""",
    "escape: a process pool gets no process": """
import concurrent.futures, multiprocessing
def attempt():
    with concurrent.futures.ProcessPoolExecutor(1) as pool: return list(pool.map(abs, [1]))
refused(attempt)
refused(lambda: multiprocessing.Process(target=print).start() or "started")
""",
    "escape: no network": """
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, getattr(socket, "AF_VSOCK", 40)):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try: socket.socket(family, kind); escaped(family, kind)
        except OSError: pass
""",
    "escape: signals reach nobody but the program": """
for pid in [1, 0, -1, os.getppid(), *range(3, 400)]:
    try: os.kill(pid, 0); escaped(pid)
    except OSError: pass
""",
    "escape: limits of others cannot be read or set": """
for pid in (1, os.getppid()):
    refused(lambda: resource.prlimit(pid, resource.RLIMIT_CPU))
for what in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC"):
    soft, hard = resource.getrlimit(getattr(resource, "RLIMIT_" + what))
    try: resource.setrlimit(getattr(resource, "RLIMIT_" + what), (hard + 1, hard + 1)); escaped(what)
    except (OSError, ValueError): pass
""",
    "escape: descriptors cannot be passed or found": """
for fd in range(3, 4096):
    try: os.fstat(fd); escaped(fd)
    except OSError: pass
a, b = socket.socketpair()
refused(lambda: socket.send_fds(a, [b"x"], [0]))
""",
    "escape: terminal input cannot be pushed": """
import fcntl
for fd in (0, 1, 2):
    refused(lambda: fcntl.ioctl(fd, 0x5412, b"x"))
refused(lambda: os.open("/dev/tty", os.O_RDWR))
""",
    # --- persist
    "persist: a thread that never ends": """
threading.Thread(target=lambda: [time.sleep(60) for _ in range(60)]).start()
""",
    "persist: signals ignored": """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(60)
""",
    "persist: output closed, then sleep": """
os.close(1); os.close(0); os.close(2)
time.sleep(3600)
""",
    "persist: output closed, then a busy loop": """
os.close(1); os.close(0)
while True: pass
""",
    "persist: the reaper is stopped or killed": """
for number in (9, 19, 15, 6):
    try: os.kill(1, number)
    except OSError: pass
    try: os.kill(0, number)
    except OSError: pass
time.sleep(3600)
""",
    "persist: the reaper's memory": """
for path in ("/proc/1/mem", "/proc/1/task/1/mem", "/proc/self/../1/mem"):
    try: open(path, "r+b"); escaped(path)
    except OSError: pass
refused(lambda: libc.ptrace(16, 1, 0, 0))
time.sleep(3600)
""",
    "persist: the parent-death signal is cleared": """
if libc.prctl(1, 0, 0, 0, 0) == 0: escaped("prctl")
time.sleep(3600)
""",
    "persist: input that is never read": """
time.sleep(3600)
""",
    "persist: another session": """
refused(os.setsid); refused(os.setpgrp)
time.sleep(3600)
""",
    "persist: a file for the next program": """
open("/tmp/left", "w").write("x"); open("/dev/shm/left", "w").write("x")
""",
    "persist: a mark on a device of the host": """
for name in ("null", "full", "random", "urandom"):
    try: os.utime("/dev/" + name); escaped(name)
    except OSError: pass
    try: os.chmod("/dev/" + name, 0o666); escaped(name)
    except OSError: pass
""",
    "persist: nothing is left of an earlier program": """
if os.listdir("/tmp") or os.listdir("/dev/shm"): escaped(os.listdir("/tmp"), os.listdir("/dev/shm"))
""",
    "persist: alarms and interval timers": """
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01); signal.signal(signal.SIGALRM, lambda *_: None)
while True: pass
""",
    # --- exhaust
    "exhaust: heap": """
held = []
try:
    while True: held.append(bytearray(b"x") * (1 << 20))
except MemoryError: pass
size = sum(map(len, held))
del held
if size > MEMORY: escaped(size)
""",
    "exhaust: shared anonymous memory, unmapped but for a page": """
held = 0
for _ in range(40):
    try: area = mmap.mmap(-1, 16 << 20)
    except (OSError, MemoryError): break
    for page in range(0, 16 << 20, 4096): area[page] = 1
    held += 16 << 20
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc.munmap(ctypes.c_void_p(address + 4096), ctypes.c_size_t((16 << 20) - 4096))
if held: escaped(held)
""",
    "exhaust: /dev/zero mapped shared": """
zero = os.open("/dev/zero", os.O_RDWR)
refused(lambda: mmap.mmap(zero, 1 << 20, flags=mmap.MAP_SHARED))
""",
    "exhaust: files in every folder": """
total = 0
for folder in ("/tmp", "/dev/shm", "/dev", "/", "/usr"):
    for number in range(64):
        try:
            with open(f"{folder}/f{number}", "wb", buffering=0) as file:
                for _ in range(64): total += file.write(b"x" * (1 << 20))
        except OSError: continue
if total > 20 << 20: escaped(total)
print(total)
""",
    "exhaust: empty files": """
made = 0
for number in range(20000):
    for folder in ("/tmp", "/dev/shm"):
        try: os.mkdir(f"{folder}/{number}"); made += 1
        except OSError: pass
if made > 1200: escaped(made)
print(made)
""",
    "exhaust: huge pages of which one small page stays mapped": """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
if libc.prctl(42, 0, 0, 0, 0) == 0: escaped("huge pages can be asked for")
def free():
    with open("/dev/full"): pass
    info = (ctypes.c_ulong * 16)()
    libc.sysinfo(info)
    return info[5]
before, size = free(), 2 << 20
for _ in range(150):
    area = libc.mmap(None, 2 * size, 3, 0x22, -1, 0)
    if area in (None, ctypes.c_void_p(-1).value): break
    start = -(-area // size) * size
    libc.munmap(ctypes.c_void_p(area), ctypes.c_size_t(start - area))
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 14)
    ctypes.memset(start, 1, 1)
    libc.munmap(ctypes.c_void_p(start + 4096), ctypes.c_size_t(area + 2 * size - start - 4096))
print((before - free()) >> 20)
""",
    "exhaust: threads with descriptors of their own": """
stack = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE)
top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + (1 << 16)
pause = ctypes.cast(libc.pause, ctypes.c_void_p)
for flags in (0x10900, 0x10B00, 0x10D00, 0x10700):
    if libc.clone(pause, ctypes.c_void_p(top), flags, None) != -1: escaped(hex(flags))
""",
    "exhaust: page tables of pages far apart": """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
made = 0
for number in range(60_000):
    area = libc.mmap(0x100000000000 + (number << 30), 4096, 3, 0x22 | 0x100000, -1, 0)
    if area in (None, ctypes.c_void_p(-1).value): break
    ctypes.memset(area, 1, 1)
    made += 1
if CGROUP and made * 12 << 10 > MEMORY: escaped(made * 12 >> 10, "MiB")
print(made)
""",
    "exhaust: record locks": """
import fcntl
file = open("/tmp/locks", "w")
refused(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0))
refused(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
""",
    "exhaust: System V shared memory": """
libc.shmget.restype = ctypes.c_int
if libc.shmget(0, ctypes.c_size_t(1 << 20), 0o1600) != -1: escaped("shmget")
""",
    "exhaust: POSIX shared memory": """
total = 0
for number in range(64):
    fd = libc.shm_open(b"/s%d" % number, os.O_CREAT | os.O_RDWR, 0o600)
    if fd < 0: break
    try:
        for _ in range(8): total += os.write(fd, b"x" * (1 << 18))
    except OSError: break
if total > 2 << 20: escaped(total)
""",
    "exhaust: memfd": """
refused(lambda: os.memfd_create("m"))
""",
    "exhaust: pipes and socket pairs": """
total, held = 0, []
for make in (os.pipe, socket.socketpair):
    try:
        while True:
            pair = make(); held.append(pair)
            end = pair[1] if isinstance(pair[1], int) else pair[1].fileno()
            os.set_blocking(end, False)
            try:
                while True: total += os.write(end, b"x" * 65536)
            except OSError: pass
    except OSError: pass
if total > 24 << 20: escaped(total)
print(total)
""",
    "exhaust: larger pipes": """
import fcntl
read, write = os.pipe()
refused(lambda: fcntl.fcntl(write, 1031, 1 << 20))
""",
    "exhaust: descriptors": """
held = []
try:
    while True: held.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
if len(held) > 64: escaped(len(held))
""",
    "exhaust: threads": """
threading.stack_size(65536)
stop, made = threading.Event(), 0
try:
    while made < 500: threading.Thread(target=stop.wait, daemon=True).start(); made += 1
except RuntimeError: pass
stop.set()
if made > 64: escaped(made)
print(made)
""",
    "exhaust: everything at once": """
total, held = 0, []
for folder in ("/tmp", "/dev/shm"):
    try:
        with open(folder + "/f", "wb", buffering=0) as file:
            while True: total += file.write(b"x" * 65536)
    except OSError: pass
for make in (os.pipe, socket.socketpair):
    for _ in range(14):
        try:
            pair = make(); held.append(pair)
            end = pair[1] if isinstance(pair[1], int) else pair[1].fileno()
            os.set_blocking(end, False)
            while True: total += os.write(end, b"x" * 65536)
        except OSError: pass
try:
    while True: held.append(bytearray(b"x") * (1 << 18)); total += 1 << 18
except MemoryError: pass
held.clear()
if total > MEMORY: escaped(total)
print(total)
""",
    "exhaust: output": """
while True: os.write(1, b"x" * 65536)
""",
    "exhaust: output in packets of a byte": """
import fcntl
fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)
while True: libc.write(1, b"x", 1)
""",
    "exhaust: output drop by drop": """
while True: os.write(1, b"x"); time.sleep(0.05)
""",
    "exhaust: recursion": """
sys.setrecursionlimit(10**9)
def f(): f()
try: f()
except (RecursionError, MemoryError): pass
""",
    "exhaust: locked memory": """
if libc.mlockall(3) == 0: escaped("mlockall")
""",
    "exhaust: a core file": """
os.abort()
""",
    "exhaust: a huge integer": """
10 ** 10 ** 8
""",
    "exhaust: a hostile regular expression": """
import re
re.match("(a+)+$", "a" * 60 + "b")
""",
    # --- observe
    "observe: the caller's environment": f"""
if {SECRET!r} in repr(dict(os.environ)) or len(os.environ) > 3: escaped(dict(os.environ))
""",
    "observe: the caller's memory and environment from beside": """
for pid in range(1, 50):
    for name in ("environ", "cmdline", "cwd", "fd", "maps"):
        if os.path.lexists(f"/proc/{pid}/{name}"): escaped(pid, name)
""",
    "observe: files of people": """
for path in ("/home", "/etc/passwd", "/etc/shadow", "/etc/hostname", "/var", "/run", "/mnt", "/srv", "/opt", "/boot", "/root/.ssh", "/root/.bashrc",
             "/usr/local/etc", "/usr/src", "/usr/share/doc", "/work", "/workspace", "/usr/bin"):
    if os.path.lexists(path): escaped(path)
""",
    "observe: sockets of others by name": """
a, b = socket.socketpair()
for name in (b"\\0quartet", b"/dev/log", b"/tmp/socket"):
    refused(lambda: a.sendto(b"x", name))
""",
    "observe: the host's name": """
if os.uname().nodename != "sandbox": escaped(os.uname().nodename)
""",
    "observe: other programs": """
refused(lambda: os.pidfd_open(1))
for pid in range(3, 2000):
    try: os.getpgid(pid); escaped(pid)
    except OSError: pass
""",
    "observe: mounts and disks": """
refused(lambda: os.statvfs("/")); refused(lambda: open("/etc/mtab").read())
""",
    "observe: kernel log": """
if libc.klogctl(3, ctypes.create_string_buffer(100), 100) >= 0: escaped("klogctl")
""",
    "observe: the launcher's arguments hold nothing of the caller": """
import gc
if any(word in repr(sys.argv) + repr(sys.orig_argv[:3]) for word in ("tests", "pytest")): escaped(sys.argv)
""",
    "observe: keys of the session": """
if syscall(250, 0, -3, 0) != -1: escaped("keyctl")
""",
}


@dataclass(frozen=True)
class Outcome:
    """What came of a probe: what it printed of an escape, and how long the sandbox took to return."""

    escapes: list[str]
    seconds: float
    output: str
    code: int | None

    @property
    def contained(self) -> bool:
        return not self.escapes


def probes(kind: str = "") -> dict[str, str]:
    """Return the programs of this machine's probes by name; those of one kind, or all."""
    programs = {name: PRELUDE + text for name, text in PROGRAMS.items()}
    if platform.machine() == "x86_64":
        for name, arguments in SYSCALLS_X86.items():
            programs[f"system call: {name}"] = PRELUDE + SYSCALL_PROBE.format(arguments=arguments)
    return {name: text for name, text in programs.items() if name.startswith(kind)}


@cache
def sandbox_of(seconds: float) -> Sandbox:
    return Sandbox(seconds, MEMORY_MB)


def outcome(name: str, program: str) -> Outcome:
    """Run a probe with more input than a pipe holds; return what came of it."""
    sandbox = sandbox_of(60.0 if name in WALKS else SECONDS)
    allowed = TIME_ALLOWED + (60.0 if name in WALKS else 0.0)
    began = time.monotonic()
    result: list = []

    def run() -> None:
        result.append(sandbox.run(program, "x" * 200_000))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(allowed)
    seconds = time.monotonic() - began
    if not result:
        return Outcome(["the sandbox did not return"], seconds, "", None)
    escapes = [line for line in result[0].output.splitlines() if line.startswith("ESCAPED")]
    return Outcome(escapes, seconds, result[0].output[:2000], result[0].code)


def main() -> None:
    os.environ[SECRET] = "1"
    programs = probes(*sys.argv[1:])
    with ThreadPoolExecutor(6) as pool:
        outcomes = dict(zip(programs, pool.map(outcome, programs, programs.values()), strict=True))
    print(
        json.dumps(
            {"user": os.getuid(), "outcomes": {name: asdict(o) for name, o in outcomes.items()}}
        )
    )


if __name__ == "__main__":
    sys.exit(main())
