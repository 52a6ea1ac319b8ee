"""The only place where text becomes shell. Pure.

Everything from a spec that reaches a shell passes through `word`, `export` or `array`.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.errors import SpecError


def word(text: str) -> str:
    """One shell word that stands for exactly this text."""
    if "\0" in text:
        raise SpecError("a NUL byte cannot be passed to a program", where=repr(text)[:80])
    return shlex.quote(text)


def line(arguments: Iterable[str]) -> str:
    """A command line of exactly these arguments."""
    return " ".join(word(argument) for argument in arguments)


def export(name: str, value: str) -> str:
    return f"export {name}={word(value)}"


def array(name: str, values: Iterable[str]) -> str:
    """A bash array, one value a line, so that a person can read a long command."""
    rows = "".join(f"  {word(value)}\n" for value in values)
    return f"{name}=(\n{rows})"


def engine_arguments(args: Mapping[str, Any]) -> list[str]:
    """`{max-model-len: 4096, enforce-eager: true}` → `--max-model-len 4096 --enforce-eager`.

    true: the bare flag. false: `--no-…`. null: left out. A list: the flag with each value. A
    mapping: one JSON argument.
    """
    out: list[str] = []
    for name, value in args.items():
        flag = "--" + name.lstrip("-").replace("_", "-")
        if value is None:
            continue
        if value is True:
            out.append(flag)
        elif value is False:
            out.append("--no-" + flag[2:])
        elif isinstance(value, list | tuple):
            out += [flag, *(str(item) for item in value)]
        elif isinstance(value, dict):
            out += [flag, json.dumps(value, separators=(",", ":"), sort_keys=True)]
        else:
            out.append(f"{flag}={value}" if str(value).startswith("-") else flag)
            if not str(value).startswith("-"):
                out.append(str(value))
    return out
