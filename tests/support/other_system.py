"""Another operating system, simulated for the modules of quartet alone, in a process of its own:

    python -m tests.support.other_system win32 all-modules
    python -m tests.support.other_system darwin run sums …

Modules that the system does not have cannot be imported by quartet, `os`, `signal`, `sys` and `ctypes` lack there what it does not
have, folders cannot be opened, and no link can be made. What other packages see is the real machine.
"""

import builtins
import errno
import importlib
import os
import pkgutil
import signal
import sys
import types
from pathlib import Path

import quartet

NO_MODULES = {
    "win32": {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"},
    "darwin": set(),
}
NOT_LINUX = {
    "os": {"sched_getaffinity", "sched_setaffinity", "pidfd_open", "memfd_create", "O_DIRECT"},
    "signal": {"SIGPWR", "SIGSTKFLT"},
}
NOT_WINDOWS = {
    "os": {
        *("fork", "killpg", "getpgid", "setsid", "getuid", "geteuid", "getgid", "getegid", "wait4", "statvfs", "mkfifo"),
        *("uname", "nice", "getpriority", "chown", "WNOHANG", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"),
        *("sysconf", "fchmod", "WIFSIGNALED", "pread", "pwrite"),
    },
    "signal": {
        *("SIGKILL", "SIGALRM", "SIGSTOP", "SIGCONT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGQUIT"),
        *("setitimer", "ITIMER_REAL", "alarm", "pthread_sigmask", "pthread_kill", "sigwait", "siginterrupt"),
    },
}  # fmt: skip


class Limited(types.ModuleType):
    """A module without some of its names, and with others in place of its own."""

    def __init__(self, module, missing=(), instead=None):
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _missing=set(missing), _instead=instead or {})

    def __getattr__(self, name):
        if name in self._missing:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}' here")
        return self._instead[name] if name in self._instead else getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)


def open_no_folder(path, flags, *rest, **kept):
    if Path(path).is_dir():
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
    return os.open(path, flags, *rest, **kept)


def sync_written(handle):
    """Windows flushes only what is open for writing."""
    import fcntl

    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(handle)


def load_library(name=None, *rest, **kept):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    raise FileNotFoundError(f"Could not find module '{name}'")


def no_link(self, target, target_is_directory=False):
    raise OSError(errno.EPERM, "A required privilege is not held by the client", os.fspath(self))


def simulate(system: str) -> None:
    import ctypes

    windows = system == "win32"
    missing = {n: names | (NOT_WINDOWS[n] if windows else set()) for n, names in NOT_LINUX.items()}
    instead = {"open": open_no_folder, "fsync": sync_written} if windows else {}
    modules = {
        "os": Limited(os, missing["os"], instead),
        "signal": Limited(signal, missing["signal"]),
        "sys": Limited(sys, (), {"platform": system}),
        "ctypes": Limited(ctypes, (), {"CDLL": load_library} if windows else {}),
    }
    if windows:
        Path.symlink_to = no_link
    real = builtins.__import__

    def simulated(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and (globals or {}).get("__name__", "").startswith("quartet"):
            if name in NO_MODULES[system]:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            if name in modules:
                return modules[name]
        return real(name, globals, locals, fromlist, level)

    for name in [name for name in sys.modules if name.startswith("quartet")]:
        del sys.modules[name]
    builtins.__import__ = simulated


def import_all_modules() -> None:
    """Import every module of quartet; print how many there were, or each that failed."""
    names, failed = [], []
    for module in pkgutil.walk_packages(quartet.__path__, "quartet.", onerror=lambda name: None):
        if module.name != "quartet.__main__":
            names.append(module.name)
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                if error.name != "ray":  # an extra
                    failed.append(f"{module.name}: {error}")
            except Exception as error:
                failed.append(f"{module.name}: {type(error).__name__}: {error}")
    print(len(names), "modules", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    system, *words = sys.argv[1:]
    simulate(system)
    if words == ["all-modules"]:
        import_all_modules()
    sys.argv = ["quartet", *words]
    importlib.import_module("quartet.cli").main()
