"""The system calls that an untrusted program may make, as a seccomp filter.

The list names what is allowed. A call that is not on it fails with ENOSYS, as on a kernel that does
not have it, so a kernel's new calls are closed until someone has thought about them. What the list
leaves out on purpose:

- new processes and programs (fork, vfork, execve; clone makes threads only), so that one process
  is all there is to bound;
- memory that belongs to no address space and would escape RLIMIT_AS: memfd_create, System V shared
  memory, message queues, shared anonymous mappings (their pages stay after a partial unmap), larger
  pipes, record locks, extended attributes, threads with a descriptor table of their own;
- other processes: ptrace, process_vm_readv, pidfd calls, signals to any other process, limits of
  any other process;
- sockets (but for a pair connected to itself, which asyncio needs), passing of descriptors,
  devices' ioctls;
- names and rights: mounting, namespaces, users, capabilities, keys, further filters, bpf, io_uring,
  modules.
"""

import struct
from dataclasses import dataclass

from quartet.rewards.protocol import RewardError

ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
EPERM, ENOSYS, EOPNOTSUPP = 0x00050001, 0x00050026, 0x0005005F

THREAD = 0x00010F00
"""The flags of clone that every thread has: VM, FS, FILES, SIGHAND, THREAD. One without FILES would
copy the descriptors."""
THREAD_FLAGS = 0x007D0F00
"""All flags that glibc and musl pass for a thread: those, SYSVSEM, SETTLS, PARENT_SETTID,
CHILD_CLEARTID, DETACHED."""
SHARED, ANONYMOUS = 0x01, 0x20
"""Flags of mmap. A shared mapping of a file is bounded by the size of /tmp or /dev/shm, one of no
file by nothing."""
PROGRAM_PID = 2
"""The program's process id in its own namespace; bubblewrap's reaper is 1."""

NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # files: reading, writing and naming them; the mounts decide which exist
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62),
    "open": (2, None), "openat": (257, 56), "close": (3, 57),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78),
    "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "truncate": (76, 45), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83),
    "umask": (95, 166), "utimensat": (280, 88), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53),
    # descriptors and waiting for them
    "pipe": (22, None), "pipe2": (293, 59), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
    # private memory
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233),
    # threads and signals of its own
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None), "pause": (34, None),
    # time
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    # what it is, and its end
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgrp": (111, None),
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94),
    # allowed with some arguments only: see RULES
    "mmap": (9, 222), "clone": (56, 220), "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167),
    "prlimit64": (302, 261), "kill": (62, 129), "tgkill": (234, 131),
    # refused with another error than ENOSYS: see REFUSED
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198),
    "ptrace": (101, 117), "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280),
    "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
}  # fmt: skip
"""The number of each call on x86_64 and on aarch64; None where that machine has no such call."""

REFUSED = {
    **dict.fromkeys(
        (
            "fork",
            "vfork",
            "execve",
            "execveat",
            "socket",
            "ptrace",
            "mount",
            "unshare",
            "setns",
            "bpf",
        ),
        EPERM,
    ),
    **dict.fromkeys(("listxattr", "llistxattr", "flistxattr"), EOPNOTSUPP),
}
"""Calls that fail with the error that programs expect: of a missing right, and of a file system
without extended attributes, which shutil copies from all the same."""


@dataclass(frozen=True)
class Rule:
    """An argument's condition: its low 32 bits, masked, must be one of `values`."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


RULES: dict[str, tuple[Rule, ...]] = {
    "mmap": (Rule(3, (0, SHARED, ANONYMOUS), SHARED | ANONYMOUS),),
    "clone": (Rule(0, (THREAD,), THREAD), Rule(0, (0,), 0xFFFFFFFF & ~THREAD_FLAGS)),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, no pipe sizes, no
    # owners, no leases
    "fcntl": (Rule(1, (0, 1, 2, 3, 4, 1030)),),
    # TCGETS (isatty), FIONREAD, FIONBIO, FIOCLEX
    "ioctl": (Rule(1, (0x5401, 0x541B, 0x5421, 0x5451)),),
    "prctl": (Rule(0, (15,)),),  # PR_SET_NAME, of the calling thread
    "prlimit64": (Rule(0, (0,)),),  # of the calling process
    "kill": (Rule(0, (PROGRAM_PID,)),),
    "tgkill": (Rule(0, (PROGRAM_PID,)),),
    "socketpair": (Rule(0, (1,)),),  # AF_UNIX
    "sendto": (Rule(5, (0,)),),  # to the other end; no address is looked up
}

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def seccomp_filter(machine: str) -> bytes:
    """Return the filter for a machine as `struct sock_filter` instructions: classic BPF over
    `struct seccomp_data` (call number at 0, architecture at 4, arguments at 16 + 8 i). Calls of
    another architecture kill the process, and so do the numbers of the x32 interface."""
    if machine not in ARCHITECTURES:
        raise RewardError(
            f"programs can be isolated on {' and '.join(ARCHITECTURES)}, not on {machine}."
        )
    column = list(ARCHITECTURES).index(machine)
    load, mask, jump_equal, jump_at_least, give = 0x20, 0x54, 0x15, 0x35, 0x06
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, ARCHITECTURES[machine]),
        (give, 0, 0, KILL_PROCESS),
        (load, 0, 0, 0),
    ]
    if machine == "x86_64":
        code += [(jump_at_least, 0, 1, 0x40000000), (give, 0, 0, KILL_PROCESS)]
    for name, numbers in NUMBERS.items():
        number = numbers[column]
        if number is None:
            continue
        body: list[tuple[int, int, int, int]] = []
        for rule in RULES.get(name, ()):
            body += [(load, 0, 0, 16 + 8 * rule.argument), (mask, 0, 0, rule.mask)]
            remaining = len(rule.values)
            for value in rule.values:
                remaining -= 1
                body.append((jump_equal, remaining + 1, 0, value))
            body.append((give, 0, 0, EPERM))
        body.append((give, 0, 0, REFUSED.get(name, ALLOW)))
        code += [(jump_equal, 0, len(body), number), *body]
    code.append((give, 0, 0, ENOSYS))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
