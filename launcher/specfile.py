"""From files and flags to a FleetSpec: site defaults < user defaults < spec file < flags. I/O."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from launcher.errors import SpecError
from launcher.spec import FleetSpec, is_folder

FILE_MAX_BYTES = 1024 * 1024
DEFAULT_FILE = "fleet.yaml"


@dataclass(frozen=True)
class Loaded:
    """A spec and where each part of it was read; `origin` names the file, or "flags"."""

    spec: FleetSpec
    origin: str


def load(file: Path | None, flags: dict[str, Any]) -> Loaded:
    """The spec of this file with these flags over it. Raises SpecError with file, line and key.

    flags: nested like the spec; paths in them are relative to the working folder, paths in the
    file to the file's own folder.
    """
    if file is None and Path(DEFAULT_FILE).is_file():
        file = Path(DEFAULT_FILE)
    written = _read_yaml(file) if file else {}
    origin = str(file) if file else "flags"
    merged = _absolute(written, file.absolute().parent if file else Path.cwd())
    merged = _over(merged, _absolute(flags, Path.cwd()))
    for defaults in (_user_config(), Path("/etc/launcher/config.yaml")):
        merged = _under_defaults(merged, defaults)
    if "name" not in merged and isinstance(merged.get("model"), str):
        merged["name"] = _name_from_model(merged["model"])
    try:
        return Loaded(FleetSpec.model_validate(merged), origin)
    except ValidationError as error:
        raise _spec_error(error, origin, file) from error


def check_model_folder(spec: FleetSpec) -> None:
    """Refuse a model folder that is visible here and is not one. Raises SpecError."""
    if not is_folder(spec.model):
        return
    folder = Path(spec.model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise SpecError(
            "the model folder has no config.json",
            where=str(folder),
            hint="Name a folder with config.json and *.safetensors, or a Hugging Face id.",
        )


def _name_from_model(model: str) -> str:
    letters = [
        letter if letter.isalnum() and letter.isascii() else "-"
        for letter in model.rstrip("/").rsplit("/", 1)[-1].lower()
    ]
    return "".join(letters).strip("-")[:40].strip("-") or "fleet"


def _user_config() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "launcher/config.yaml"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > FILE_MAX_BYTES:
            raise SpecError(f"is larger than {FILE_MAX_BYTES} bytes", where=str(file))
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(
            f"cannot be read: {error.strerror}", where=str(file), hint="Name the spec with -f."
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError("is not UTF-8 text", where=str(file)) from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise SpecError(f"is not YAML: {problem}", where=f"{file}{line}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SpecError("holds no keys; write `name:`, `model:` …", where=str(file))
    return raw


def _absolute(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same keys with every path made absolute: model folder, venv, inventory, secret files."""
    out = dict(raw)

    def path(text: Any) -> Any:
        if not isinstance(text, str) or not text:
            return text
        return str(Path(os.path.normpath(folder / Path(text).expanduser())))

    if isinstance(out.get("model"), str) and is_folder(out["model"]):
        out["model"] = path(out["model"])
    if isinstance(out.get("runtime"), dict) and "venv" in out["runtime"]:
        out["runtime"] = {**out["runtime"], "venv": path(out["runtime"]["venv"])}
    if isinstance(out.get("secrets"), dict):
        out["secrets"] = {
            name: {**source, "file": path(source["file"])}
            if isinstance(source, dict) and "file" in source
            else source
            for name, source in out["secrets"].items()
        }
    if isinstance(out.get("gateway"), dict):
        out["gateway"] = _absolute_gateway(out["gateway"], path)
    if isinstance(out.get("notify"), dict):
        out["notify"] = _absolute_notify(out["notify"], path)
    if isinstance(out.get("backend"), dict) and isinstance(out["backend"].get("ssh"), dict):
        ssh = out["backend"]["ssh"]
        if "inventory" in ssh:
            out["backend"] = {
                **out["backend"],
                "ssh": {**ssh, "inventory": path(ssh["inventory"])},
            }
    return out


def _absolute_gateway(gateway: dict[str, Any], path: Callable[[Any], Any]) -> dict[str, Any]:
    out = dict(gateway)
    if isinstance(out.get("tls"), dict):
        out["tls"] = {name: path(value) for name, value in out["tls"].items()}
    fallback = out.get("fallback")
    if isinstance(fallback, dict) and isinstance(fallback.get("key"), dict):
        key = fallback["key"]
        out["fallback"] = {
            **fallback,
            "key": {**key, "file": path(key["file"])} if "file" in key else key,
        }
    return out


def _absolute_notify(notify: dict[str, Any], path: Callable[[Any], Any]) -> dict[str, Any]:
    """A program that is written as a path is one; any other word is looked for on the PATH."""
    out = dict(notify)
    webhook, command = out.get("webhook"), out.get("command")
    if isinstance(webhook, dict) and "file" in webhook:
        out["webhook"] = {**webhook, "file": path(webhook["file"])}
    if isinstance(command, list) and command and is_folder(str(command[0])):
        out["command"] = [path(command[0]), *command[1:]]
    return out


def _over(base: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in flags.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _over(out[key], value)
        else:
            out[key] = value
    return out


def _under_defaults(merged: dict[str, Any], file: Path) -> dict[str, Any]:
    """Site or user defaults: `interface`, `runtime`, and a `slurm:` block for Slurm fleets."""
    if not file.is_file():
        return merged
    defaults = _absolute(_read_yaml(file), file.parent)
    unknown = set(defaults) - {"interface", "runtime", "slurm", "env"}
    if unknown:
        raise SpecError(
            f"unknown key {sorted(unknown)[0]!r}",
            where=str(file),
            hint="Defaults may hold interface, runtime, env and slurm.",
        )
    slurm = defaults.pop("slurm", None)
    out = _over(defaults, merged)
    backend = out.get("backend")
    if isinstance(slurm, dict) and (
        backend == "slurm" or (isinstance(backend, dict) and "slurm" in backend)
    ):
        own = backend["slurm"] or {} if isinstance(backend, dict) else {}
        out["backend"] = {"slurm": {**slurm, **own}}
    return out


def _spec_error(error: ValidationError, origin: str, file: Path | None) -> SpecError:
    """The first thing that is wrong, with its line and the nearest right name."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    location = [
        part
        for part in first["loc"]
        if part not in ("Parallelism", "literal['auto']") and "function" not in str(part)
    ]
    key = ".".join(str(part) for part in location)
    line = _line_of(file, location) if file else None
    where = f"{origin}:{line}" if line else origin
    if first["type"] == "extra_forbidden":
        names = _names_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(sorted(names))}."
        return SpecError(f"unknown key {key}", where=where, hint=hint)
    if first["type"] == "missing":
        missing = {str(p["loc"][0]) for p in problems if p["type"] == "missing"}
        if "model" in missing:  # the name would follow from it
            hint = f"Give --model, or name a spec with -f (there is no ./{DEFAULT_FILE})."
            return SpecError("no model is named", where=where, hint=hint)
        flag = "--fleet" if key == "name" else f"--{location[-1]}"
        return SpecError(f"{key} is missing", where=where, hint=f"Write `{key}:` or give {flag}.")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch" and key == "name":
        message = "use lower-case letters, digits and -, at most 40"
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return SpecError(f"{key}: {message}{more}" if key else message, where=where)


def _names_at(location: list[Any]) -> list[str]:
    """The keys that a spec may hold at this place."""
    model: type[BaseModel] = FleetSpec
    for part in location:
        field = model.model_fields.get(str(part))
        candidates = [field.annotation, *get_args(field.annotation)] if field else []
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _line_of(file: Path, location: list[Any]) -> int | None:
    """The line of a key in the file, or of its nearest parent that is written there."""
    try:
        node: Any = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    line: int | None = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line
