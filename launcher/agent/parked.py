"""A parked engine process: it imports what an engine needs, waits for a line, becomes the engine.

Runs with the engine's own interpreter, inside its venv, modules or container, by the standard
library alone. It tells by lines of JSON on the pipe that is its standard output, and listens on
standard input. Whoever made it holds both; when that one ends, it ends. What cannot be imported is
told and left out: it is imported later then, as in every plain start.
"""

import contextlib
import ctypes
import dis
import gc
import importlib
import json
import os
import platform
import re
import runpy
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WAITING, ENGINE = "engine-parked", "vllm"  # its name in ps and top, before and after
# What `vllm serve` imports late, in three processes one after the other. Another release has other
# names: these are tried, and more is found by asking vLLM itself.
WANTED = (
    *("vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server"),
    *("vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.engine.core_client"),
    *("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.worker_base"),
    *("vllm.v1.core.sched.scheduler", "vllm.v1.core.sched.async_scheduler"),
    *("vllm.distributed.parallel_state", "vllm.model_executor.model_loader", "transformers"),
    *("uvicorn.lifespan.on", "uvicorn.protocols.http.httptools_impl"),
)
OF_RAY = (
    *("ray.scripts.scripts", "ray._private.workers.default_worker", "ray._private.log_monitor"),
    *("ray._private.workers.setup_worker", "ray.dashboard.dashboard", "ray.dashboard.head"),
    *("ray._private.runtime_env.agent.main", "ray._private.runtime_env.agent.runtime_env_agent"),
    *("ray.dashboard.agent", "ray.util.client.server.server"),
    *("vllm.v1.executor.ray_utils", "vllm.v1.executor.ray_executor_v2"),
)
_ASKED_OF_PLATFORM = ("check_and_update_config", "get_device_communicator_cls")
_SHELL_SHEBANG = re.compile(r"'''exec' (\"?)([^\"\n]+?)\1 \"\$0\"")
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*\.[A-Z]\w*\Z")
_HARMLESS = re.compile(r"/dev/(?:null|zero|full|u?random|tty|ptmx|pts/\d+)\Z")
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IO_IDLE, _IO_USUAL = 3 << 13, 0
_AUTOGROUP_TRIES = 5


class UnfitError(Exception):
    """Why this process cannot become an engine."""


def main() -> None:
    given = set(_open_files())
    channel = os.dup(1)
    _call_ourselves(WAITING)
    try:
        script = _script()
        os.dup2(2, 1)  # what an import prints goes to the log
        steps_back = _step_back() if "LAUNCHER_PARK_QUIETLY" in os.environ else ""
        late = set(os.environ.get("LAUNCHER_PARK_LATE", "").split())
        twin = _twin()
        for name in [name for name in os.environ if name.startswith("LAUNCHER_PARK")]:
            del os.environ[name]
        before = dict(os.environ)
        _tell(channel, state="importing")
        # For a script this is its folder; for -c it would be wherever we are.
        sys.path[0] = str(Path(script).parent)
        if twin:
            twin.foresee()
        missing = _import_all(script, OF_RAY if twin else ())
        if twin:
            twin.forget()
        _check(given)
    except UnfitError as error:
        _tell(channel, state="unfit", reason=str(error))
        return
    gc.collect()
    gc.freeze()  # children share these pages as long as nobody writes to them
    installed = _installed(script)

    def stale() -> str:
        now = _installed(script)
        changed = [path for path in {*installed, *now} if installed.get(path) != now.get(path)]
        return f"{changed[0]} changed since it was parked" if changed else ""

    def wake() -> None:
        _step_forward(steps_back)

    words, why = None, ""
    if twin:
        own = twin.Own((0, channel), _call_ourselves, wake, stale)
        try:
            words = twin.leave(_twins_folder(), before, late, own)
        except OSError as error:
            why = f"Ray's processes start plainly: {error}"
    if words is None:
        _tell(channel, state="ready", missing=missing, reason=why)
        words = _ordered(channel, wake, stale)
    if words is not None:
        _become(words)


def _ordered(channel: int, wake: Callable[[], None], stale: Callable[[], str]) -> list[str] | None:
    """Wait for the order and take over what it says; its words, or None where it cannot be."""
    order = _one_line()
    if order is None:
        return None
    if why := stale():
        _tell(channel, state="stale", reason=why)
        return None
    wake()
    _take_over(order)
    _tell(channel, state="taken")
    os.close(channel)
    _call_ourselves(ENGINE)
    words: list[str] = order["argv"]
    return words


def _become(words: list[str]) -> None:
    # The very file that a plain start runs: no entry point has to be known here.
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [shutil.which(words[0]) or words[0], *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def _twin() -> Any:
    """The module that makes Ray's worker processes; None where there is no Ray."""
    text = os.environ.get("LAUNCHER_PARK_TWIN")
    if text is None:
        return None
    script, words = _program("ray")
    if not _is_ours(words):
        raise UnfitError(f"{script} is run by {words[0]}, and vllm by {sys.executable}")
    module = types.ModuleType("launcher_ray_twin")
    sys.modules[module.__name__] = module
    exec(compile(text, "ray_twin.py", "exec"), module.__dict__)  # noqa: S102
    return module


def _twins_folder() -> Path:
    return Path(os.environ["LAUNCHER_TMP"]) / "ray"


def _script() -> str:
    """The `vllm` of the PATH. Where another Python runs it than us, we go on as that one."""
    script, words = _program("vllm")
    if not _is_ours(words):
        if os.environ.get("LAUNCHER_PARK_AS") == words[0]:
            raise UnfitError(f"{script} is run by {words[0]}, which says it is {sys.executable}")
        os.environ["LAUNCHER_PARK_AS"] = words[0]
        try:
            os.execv(words[0], [*words, "-c", os.environ["LAUNCHER_PARK"]])
        except OSError as error:
            raise UnfitError(f"{script} is run by {words[0]}: {error.strerror}") from None
    return script


def _program(name: str) -> tuple[str, list[str]]:
    """A program of the PATH and the words that run it, of which the first is a Python."""
    script = shutil.which(name)
    if script is None:
        raise UnfitError(f"no {name} in the engine's PATH")
    try:
        with open(script, encoding="utf-8") as file:
            head = file.read(4096)
    except (OSError, ValueError):
        raise UnfitError(f"{script} is no script of Python") from None
    found = _SHELL_SHEBANG.search(head)  # what pip writes where the path is too long for a line
    line = head.partition("\n")[0]
    words = [found[2]] if found else line[2:].split() if line.startswith("#!") else []
    if words and Path(words[0]).name == "env":
        words = [shutil.which(words[1]) or words[1], *words[2:]] if len(words) > 1 else []
    if not words or "python" not in Path(words[0]).name:
        raise UnfitError(f"{script} is no script of Python")
    return script, words


def _is_ours(words: list[str]) -> bool:
    ours, its = (Path(one).parent.resolve() for one in (sys.executable, words[0]))
    return ours == its


def _import_all(script: str, of_ray: tuple[str, ...]) -> dict[str, str]:
    """Import what can be; what could not, and why. Raises UnfitError where nothing works."""
    missing: dict[str, str] = {}
    for name in _usual(script):
        _import(name, missing)
        if "vllm" in missing:
            raise UnfitError(f"cannot import vllm: {missing['vllm']}")
    # Libraries of linear algebra have threads from their import on, and make them anew after a
    # fork. A plain start has imported them, too, when it forks; it shall be these and no others.
    threads = _threads()
    for name in (*_more(), *of_ray):
        _import(name, missing)
        if (now := _threads()) > threads:
            raise UnfitError(f"{name} started {now - threads} thread(s) when it was imported")
    return missing


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _import(name: str, missing: dict[str, str]) -> None:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing[name] = f"{type(error).__name__}: {error}"[:300]


def _usual(script: str) -> Iterator[str]:
    """What a plain start imports before it does anything: the script's imports, its main's."""
    yield "vllm"
    with open(script, encoding="utf-8") as file:
        for name in _imported_by(compile(file.read(), script, "exec")):
            yield name
            entry = getattr(sys.modules.get(name), "main", None)
            if isinstance(entry, types.FunctionType):
                yield from _imported_by(entry.__code__)


def _more() -> Iterator[str]:
    """The modules that are imported late, each found when those before it are there."""
    yield from WANTED
    for ask in (_of_platform, _of_model):
        with contextlib.suppress(Exception):  # another release: it starts without these
            yield from ask()


def _imported_by(code: types.CodeType) -> list[str]:
    """The modules that this code imports when it runs."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"]
    return [name for name in found if name and name not in sys.modules]


def _of_platform() -> Iterator[str]:
    """The modules of the classes that the platform names: its worker, what its ranks talk by."""
    chosen = importlib.import_module("vllm.platforms").current_platform
    for kind in type(chosen).__mro__:
        for method in _ASKED_OF_PLATFORM:
            function = getattr(kind.__dict__.get(method), "__func__", None)
            if isinstance(function, types.FunctionType):
                for text in function.__code__.co_consts:
                    if isinstance(text, str) and _CLASS_PATH.match(text):
                        yield text.rpartition(".")[0]


def _of_model() -> Iterator[str]:
    """The modules of the model's architectures, as vLLM's registry and transformers know them."""
    model = os.environ.get("LAUNCHER_MODEL", "")
    config = f"{model}/config.json"
    if not model.startswith("/"):
        hub = importlib.import_module("huggingface_hub")
        config = hub.try_to_load_from_cache(model, "config.json")
    told = json.loads(Path(config).read_text(encoding="utf-8"))
    registry = importlib.import_module("vllm.model_executor.models.registry")
    for architecture in told.get("architectures") or ():
        known = registry.ModelRegistry.models.get(architecture)
        if name := getattr(known, "module_name", ""):
            yield name
            with contextlib.suppress(Exception):
                _inspect(registry, known)
    if kind := told.get("model_type"):
        kind = kind.replace("-", "_")
        yield f"transformers.models.{kind}.configuration_{kind}"


def _inspect(registry: Any, model: Any) -> None:
    """Let vLLM write down what it asks of a model's class before its first start with a cache. It
    does so in a process that imports everything once more; here the class is there already."""
    usual = registry._run_in_subprocess
    registry._run_in_subprocess = lambda ask: ask()
    try:
        model.inspect_model_cls()
    finally:
        registry._run_in_subprocess = usual


def _check(given: set[str]) -> None:
    """Raise UnfitError where an import left a process, an open device, a socket or a pipe."""
    with contextlib.suppress(ChildProcessError):  # there is none, or none any more
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        raise UnfitError("an import left a process behind")
    for file in _open_files():
        if file not in given and not _HARMLESS.match(file):
            raise UnfitError(f"an import opened {file}")


def _installed(script: str) -> dict[Path, int]:
    """Since when the installation is as it is: its folders, or the files of a source checkout.

    An installer makes or removes something in these folders whatever it does. What was imported
    from another version must not be mixed with what is imported from now on.
    """
    folders = {Path(entry) for entry in sys.path}
    places = {one for one in folders if one.name in ("site-packages", "dist-packages")}
    files = {Path(script)}
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if file and name.split(".")[0] == "vllm" and not places.intersection(Path(file).parents):
            files.add(Path(file))
    found = {}
    for path in places | files:
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_mtime_ns
    return found


def _open_files() -> Iterator[str]:
    """Devices, sockets and pipes that are open; ordinary files do no harm to a fork."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = str(link.readlink())
            if path.startswith(("/dev/", "socket:", "pipe:", "anon_inode:")):
                yield path


def _one_line() -> dict[str, Any] | None:
    """The order; None when whoever made us is gone."""
    text = b""
    while not text.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return None
        text += part
    order = json.loads(text)
    return order if isinstance(order, dict) else None


def _take_over(order: dict[str, Any]) -> None:
    """Environment, folder, output and input as a plain start has them."""
    for name in order["unset"]:
        os.environ.pop(name, None)
    before = os.environ.get("PYTHONPATH", "")
    os.environ.update(order["set"])  # through putenv, for NCCL and gloo read it in C
    after = os.environ.get("PYTHONPATH", "").removesuffix(before)
    sys.path[1:1] = [folder for folder in after.split(os.pathsep) if folder]
    tempfile.tempdir = None
    os.chdir(order["folder"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, handle in enumerate((nothing, log, log)):
        os.dup2(handle, number)
    os.close(nothing)
    os.close(log)


def _step_back() -> str:
    """Take what others leave, in a way that can be undone: back from a niceness only root may."""
    _set_io_priority(_IO_IDLE)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 19)
            os.setpriority(os.PRIO_PROCESS, 0, 0)
            code = 0
        os._exit(code)
    if os.waitpid(child, 0)[1] == 0:
        os.setpriority(os.PRIO_PROCESS, 0, 19)
        return "nice"
    with contextlib.suppress(OSError):  # the session as a whole may come back to where it was
        _write("/proc/self/autogroup", "19")
        return "session"
    return "io"


def _step_forward(way: str) -> None:
    if not way:
        return
    for thread in Path("/proc/self/task").iterdir():  # a library's began while we were back
        with contextlib.suppress(OSError):
            _set_io_priority(_IO_USUAL, int(thread.name))
            if way == "nice":
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
    for _ in range(_AUTOGROUP_TRIES if way == "session" else 0):
        try:
            _write("/proc/self/autogroup", "0")
        except BlockingIOError:  # the kernel takes one such write of ordinary users each 0.1 s
            time.sleep(0.1)
        except OSError:
            return
        else:
            return


def _set_io_priority(value: int, thread: int = 0) -> None:
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, thread, value)


def _call_ourselves(name: str) -> None:
    with contextlib.suppress(OSError):
        _write("/proc/self/comm", name)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _tell(channel: int, **message: Any) -> None:
    os.write(channel, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
