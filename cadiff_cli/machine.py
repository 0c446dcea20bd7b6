"""What this machine, or the container or job we live in, has to offer."""

import os
import tempfile
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Processors that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # docker run --cpus 2
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed or 1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or "max"
        return allowed or 1


def free_memory_bytes() -> int:
    """Memory that can be had now, within the control group."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    try:
        limit, used = (
            int((CGROUP / name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def home() -> Path:
    """The user's home; a temporary folder for one without a home, as in a container."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())
