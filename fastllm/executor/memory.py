"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that may be allocated: what the system has free, bounded by the control group's limit."""
    free = _system_available()
    for limit, used in _cgroup_limits():
        free = min(free, max(limit - used, 0))
    return free


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    return 1 << 62  # unknown: let the allocation itself decide


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used without the reclaimable page cache) of this process's group and its ancestors; bytes."""
    found: list[tuple[int, int]] = []
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folder = _CGROUP / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group == _CGROUP.parent:
                    break
                found += _read_limit(group, "memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            group = _CGROUP / "memory" / path.lstrip("/")
            found += _read_limit(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
    return found


def _read_limit(group: Path, limit: str, used: str, cache: str) -> list[tuple[int, int]]:
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return []
        current = int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [(int(most), max(current - int(statistics.get(cache, 0)), 0))]


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError  # the loop returns
