"""Processors, memory and home folder of this machine, container or job."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
ITK_THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"
"""Environment variable of ANTs' number of threads."""
MEMBERSHIP = Path("/proc/self/cgroup")
THREADS = "OMP_NUM_THREADS"
"""Environment variable of the user's number of threads for torch, numpy and others."""
THREAD_VARIABLES = (THREADS, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt`` (malloc.h)."""
MMAP_THRESHOLD, MMAP_MAX = 128 * 1024, 65536
"""What glibc begins with."""
_is_kept = False


def share_cores() -> None:
    """Limit libraries imported from now on to ``cores()`` threads, unless the user set a number.

    They see the processors of the host, but not the quota of a container.  Without a quota they
    choose for themselves: some use one thread per core of two hardware threads.
    """
    if THREADS not in os.environ and cores() < _processors():
        for name, value in thread_variables(cores()).items():
            os.environ.setdefault(name, value)


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that limit libraries to a number of ``threads``."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def cores() -> int:
    """Number of processors that this process may use: a quota is rounded down, but at least 1."""
    limits = [_processors()]
    for group in _groups("cpu"):  # docker run --cpus 2, a SLURM job
        quota, period = _numbers(group, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        if quota and period:
            limits.append(quota // period)
    return max(1, min(limits))


@contextmanager
def work_folder(prefix: str = "cadiff-", where: str | Path | None = None) -> Iterator[str]:
    """A folder for temporary files, removed at the end.

    It lies in ``where``, by default the system's place.  Network file systems keep files that are
    open: a folder that cannot be removed fails nothing, because results are written before.
    """
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=where, ignore_cleanup_errors=True
    ) as folder:
        yield folder
    if os.path.isdir(folder):
        log.warning("the temporary folder %s could not be removed", folder)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Use freed memory again for the time being, rather than give it back and fetch it anew.

    The kernel clears every page that it hands out: a quarter of the time of a network whose
    tensors come and go.  Where pieces do not fit, more memory is taken: a fifth more was measured.
    Afterwards all of it is given back, but later tensors may fill the gaps and stay there.
    Does nothing where the C library is not glibc, nor within another block of its kind: a training
    that validates keeps its memory.
    """
    import ctypes
    import platform

    global _is_kept
    if _is_kept or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    try:
        _is_kept = True
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        yield
    finally:
        _is_kept = False
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD)
        libc.malloc_trim(0)


def _processors() -> int:
    """Number of processors that this process may run on, regardless of a quota of their time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1


def free_memory_bytes() -> int:
    """Memory that is available now, within the limit of the control group."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    for group in _groups("memory"):
        (limit,) = _numbers(group, "memory.max", "memory.limit_in_bytes")
        (used,) = _numbers(group, "memory.current", "memory.usage_in_bytes")
        if limit and used is not None:
            free = min(free, limit - used + _cached(group))
    return max(free, 0)


def _groups(controller: str) -> list[Path]:
    """Folders of the control groups that hold this process, the root last (versions 2 and 1)."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    groups = []
    for line in lines:
        _, controllers, inner = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controller if controllers else CGROUP
        here = root / inner.strip("/")
        groups += [here, *(above for above in here.parents if above.is_relative_to(root))]
    return groups


def _numbers(group: Path, version_2: str, *version_1: str) -> list[int | None]:
    """The numbers in a control group's files, one for each of version 1's; None is no limit."""
    try:
        words = (group / version_2).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            words = [(group / name).read_text(encoding="ascii").strip() for name in version_1]
        except (OSError, ValueError):
            return [None] * len(version_1)
    return [int(word) if word.isdigit() else None for word in words]


def _cached(group: Path) -> int:
    """Bytes of cached files in a group's memory, which the kernel frees on demand."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        return int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def without_home(text: str) -> str:
    """Replace the user's home by ``~`` in ``text``, which others may read."""
    here = str(home())
    return text if here == "/" else text.replace(f"{here}/", "~/")


def home() -> Path:
    """The user's home; a temporary folder for a user without one, as in a container."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())
