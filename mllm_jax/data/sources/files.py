"""Which files a path means: one, those of a folder, or those of a pattern; and in which of them a record is."""

from pathlib import Path

import numpy as np


def files(path: Path, suffix: str) -> list[Path]:
    """The files that a path means: itself, those with `suffix` in a folder, or those of a pattern, sorted."""
    if path.is_dir():
        found = sorted(path.rglob(f"*{suffix}"))
    elif path.is_file():
        found = [path]
    else:
        found = [file for pattern in _braces(str(path)) for file in _matching(pattern)]
    if not found:
        raise FileNotFoundError(f"{path} (no file *{suffix} there)")
    return found


def locate(index: int, ends: np.ndarray, name: str) -> tuple[int, int]:
    """(file, record in that file) of a record of all files together, of which file i ends before record ends[i]."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"record {index} of {ends[-1]} in {name}")
    file = int(np.searchsorted(ends, index, side="right"))
    return file, index - (int(ends[file - 1]) if file else 0)


def _matching(pattern: str) -> list[Path]:
    """The files of a pattern with `*`; without one, the file itself, which must be there."""
    if "*" not in pattern:
        if not Path(pattern).is_file():
            raise FileNotFoundError(pattern)
        return [Path(pattern)]
    anchor = Path(pattern.split("*")[0].rpartition("/")[0] or ("/" if pattern.startswith("/") else "."))
    return sorted(anchor.glob(str(Path(pattern).relative_to(anchor))))


def _braces(pattern: str) -> list[str]:
    """`a{008..010}b` as three patterns; the zeros are kept."""
    before, brace, rest = pattern.partition("{")
    inside, close, after = rest.partition("}")
    first, dots, last = inside.partition("..")
    if not (brace and close and dots and first.isdigit() and last.isdigit()):
        return [pattern]
    width = len(first) if first.startswith("0") else 0
    return [f"{before}{i:0{width}d}{tail}" for i in range(int(first), int(last) + 1) for tail in _braces(after)]
