"""Node names folded the way Slurm writes them, `gpu-a[001-004,007]`, and unfolded again. Pure.

    >>> expand("gpu-a[001-003],login1")
    ['gpu-a001', 'gpu-a002', 'gpu-a003', 'login1']
    >>> fold(["gpu-a003", "gpu-a001", "gpu-a002"])
    'gpu-a[001-003]'

Zero padding is part of a name: `a[1-2]` and `a[01-02]` are different nodes. Several brackets in
one name are unfolded (`r[1-2]n[1-2]`); folding uses the last number only, as Slurm prints it.
"""

import re
from collections.abc import Iterable

from inventory.errors import InventoryError

EXPANDED_MAX = 65_536  # Slurm's own MAX_NODE_COUNT is of this order; more is a typing error
_NAME = re.compile(r"[A-Za-z0-9_.\-]+\Z")
_TAIL = re.compile(r"(.*?)(\d+)(\D*)\Z", re.S)


def expand(text: str) -> list[str]:
    """All node names of a folded list, in the order written, without repetition.

    Raises InventoryError with the offending part.
    """
    names: dict[str, None] = {}
    for part in _split(text):
        for name in _expand_one(part):
            if not _NAME.match(name):
                raise InventoryError(
                    f"{name!r} is not a node name", where=text, hint="Use letters, digits, . _ -"
                )
            names[name] = None
            if len(names) > EXPANDED_MAX:
                raise InventoryError(f"more than {EXPANDED_MAX} nodes", where=text)
    return list(names)


def fold(names: Iterable[str]) -> str:
    """The shortest Slurm-style list of these names, sorted by prefix and number."""
    plain: list[str] = []
    groups: dict[tuple[str, str, int], set[int]] = {}
    for name in set(names):
        match = _TAIL.match(name)
        if match is None:
            plain.append(name)
            continue
        prefix, digits, suffix = match.groups()
        # Unpadded numbers of different length fold together (n9,n10); padded ones only with
        # their own width, for 009 and 9 are different names.
        width = len(digits) if digits[0] == "0" else 0
        groups.setdefault((prefix, suffix, width), set()).add(int(digits))
    _join_padded(groups)
    parts = [(name, name) for name in plain]
    for (prefix, suffix, width), numbers in groups.items():
        ranges = _ranges(sorted(numbers), width)
        single = len(numbers) == 1
        text = f"{prefix}{ranges}{suffix}" if single else f"{prefix}[{ranges}]{suffix}"
        parts.append((f"{prefix}{min(numbers):020d}{suffix}", text))
    return ",".join(text for _, text in sorted(parts))


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """A sort key under which n2 stands before n10."""
    return tuple(
        (text, int(digits or 0))
        for text, digits in re.findall(r"(\D*)(\d*)", name)
        if text or digits
    )


def _join_padded(groups: dict[tuple[str, str, int], set[int]]) -> None:
    """Move unpadded numbers into a padded group of their width: 099 and 100 are one series."""
    for (prefix, suffix, width), numbers in list(groups.items()):
        if width == 0:
            continue
        unpadded = groups.get((prefix, suffix, 0), set())
        same_width = {number for number in unpadded if len(str(number)) == width}
        numbers.update(same_width)
        unpadded -= same_width
        if not unpadded:
            groups.pop((prefix, suffix, 0), None)


def _ranges(numbers: list[int], width: int) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        f"{run[0]:0{width}d}" if len(run) == 1 else f"{run[0]:0{width}d}-{run[-1]:0{width}d}"
        for run in runs
    )


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        if depth not in (0, 1):
            raise InventoryError("brackets do not match", where=text)
    if depth != 0:
        raise InventoryError("brackets do not match", where=text)
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _expand_one(part: str) -> list[str]:
    opening = part.find("[")
    if opening < 0:
        return [part]
    closing = part.index("]", opening)
    prefix, body, rest = part[:opening], part[opening + 1 : closing], part[closing + 1 :]
    tails = _expand_one(rest) if rest else [""]
    middles = [text for piece in body.split(",") for text in _numbers(piece.strip(), part)]
    if len(middles) * len(tails) > EXPANDED_MAX:
        raise InventoryError(f"more than {EXPANDED_MAX} nodes", where=part)
    return [prefix + middle + tail for middle in middles for tail in tails]


def _numbers(piece: str, part: str) -> list[str]:
    first, dash, last = piece.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise InventoryError(f"{piece!r} is not a number or a range", where=part)
    if not dash:
        return [first]
    if int(last) < int(first):
        raise InventoryError(f"the range {piece!r} runs backwards", where=part)
    if int(last) - int(first) >= EXPANDED_MAX:
        raise InventoryError(f"more than {EXPANDED_MAX} nodes", where=part)
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
