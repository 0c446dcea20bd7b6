"""What this machine, or the container or job we live in, has to offer."""

import os
import tempfile
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
ITK_THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"
"""By which ANTs is told how many threads to use."""
MEMBERSHIP = Path("/proc/self/cgroup")
THREADS = "OMP_NUM_THREADS"
"""By which a user tells torch, numpy and their like how many threads to use."""
THREAD_VARIABLES = (THREADS, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def share_cores() -> None:
    """Keep libraries that are imported from now on to ``cores()``, unless the user set a number.

    They see the processors of the host, but not the quota of a container.  Without a quota their
    own choice stands: some take one thread for the two that a core of two threads offers.
    """
    if THREADS not in os.environ and cores() < _processors():
        for name, value in thread_variables(cores()).items():
            os.environ.setdefault(name, value)


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process whose libraries are to use so many threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def cores() -> int:
    """Processors that this process may use: whole ones of a quota, at least one."""
    found = [_processors()]
    for group in _groups("cpu"):  # docker run --cpus 2, a SLURM job
        quota, period = _numbers(group, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        if quota and period:
            found.append(quota // period)
    return max(1, min(found))


def _processors() -> int:
    """Those that this process may run on, whichever part of their time is its own."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1


def free_memory_bytes() -> int:
    """Memory that can be had now, within the control group."""
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
    found = []
    for line in lines:
        _, controllers, inner = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controller if controllers else CGROUP
        here = root / inner.strip("/")
        found += [here, *(above for above in here.parents if above.is_relative_to(root))]
    return found


def _numbers(group: Path, version_2: str, *version_1: str) -> list[int | None]:
    """What a control group's files say, one number for each of version 1's; None is no limit."""
    try:
        words = (group / version_2).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            words = [(group / name).read_text(encoding="ascii").strip() for name in version_1]
        except (OSError, ValueError):
            return [None] * len(version_1)
    return [int(word) if word.isdigit() else None for word in words]


def _cached(group: Path) -> int:
    """Bytes of files that the kernel keeps in a group's memory, and gives back when asked."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        return int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def without_home(text: str) -> str:
    """``text`` with ``~`` for the user's home: where somebody lives is nobody's business."""
    here = str(home())
    return text if here == "/" else text.replace(f"{here}/", "~/")


def home() -> Path:
    """The user's home; a temporary folder for one without a home, as in a container."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())
