"""Compile caches: in whose folder an engine starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import render
from launcher.agent import caches, handover
from launcher.layout import ModelFacts, choose_layout
from launcher.spec import FleetSpec
from tests.launcher.fleets import FleetUnderTest, engine_processes, fake_spec

FOUND = {"vllm": "0.32.0+cu129", "torch": "2.13.0+cu129", "triton": "3.9.0"}
# What a node without a GPU shows: a screen on the mainboard.
BOARD = {"vendor": "0x1a03", "class": "0x030000", "device": "0x2000"}


@pytest.mark.parametrize(
    "model",
    [
        "meta-llama/Llama-3.3-70B-Instruct",
        "/shared/models/a b'c\"d$(e)",
        "../../..",
        "a\nb",
        "/",
        ".hidden",
        "模型/x",
        "m" * 5000,
    ],
)
def test_any_models_name_is_one_readable_part_of_a_path(model):
    name = caches.model_name(model)
    assert name == caches.folder_name(name), "nothing is left to be replaced"
    assert len(name) < 60
    assert name not in (".", "..")
    assert caches.model_name(model + "x") != name
    assert caches.folder_name(model + model).isascii()


def test_models_that_look_alike_have_different_folders():
    assert len({caches.model_name(model) for model in ("a/b", "a-b", "a b", "/a/b", "a/b/")}) == 5


def test_the_name_of_a_long_list_is_cut_and_stays_its_own():
    names = {caches.folder_name("GPU " * 50 + end) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) <= 80 for name in names)


@pytest.mark.parametrize(
    "change",
    [{"vllm": "0.33.0"}, {"torch": "2.14.0+cu129"}, {"triton": "3.9.1"}, {"tilelang": "0.2"}],
)
def test_another_version_of_anything_that_compiles_is_another_folder(change):
    name = caches.engine_name(FOUND)
    assert name.startswith("vllm-0.32.0+cu129-torch-2.13.0+cu129-")
    assert caches.engine_name({**FOUND, **change}) != name
    assert caches.engine_name(dict(reversed(FOUND.items()))) == name


def test_an_engine_without_a_version_is_told_from_others_by_its_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    torch = {"torch": FOUND["torch"]}
    first = caches.engine_name(torch)
    assert first.startswith("vllm-unknown-torch-2.13.0+cu129-")
    (package / "__pycache__").mkdir()
    os.utime(package / "__pycache__", (1, 2**31))
    assert caches.engine_name(torch) == first, "a first import is no new version"
    (package / "_version.py").write_text("")
    os.utime(package / "_version.py", (1, 2**31))
    assert caches.engine_name(torch) != first


def node(folder: Path, models=(), devices=()) -> dict[str, Path]:
    """The files of a node with these GPUs: what the driver names, what the PCI bus shows."""
    for number, model in enumerate(models):
        gpu = folder / f"gpus/0000:{number:02d}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 16\nGPU UUID: x\n")
    for number, device in enumerate(devices):
        place = folder / f"pci/0000:{number:02d}:00.0"
        place.mkdir(parents=True)
        for name, value in device.items():
            (place / name).write_text(f"{value}\n")
    return {"nvidia": folder / "gpus", "pci": folder / "pci"}


@pytest.mark.parametrize(
    ("models", "devices", "name"),
    [
        (["NVIDIA H100 80GB HBM3"] * 8, [BOARD], "NVIDIA H100 80GB HBM3"),
        (["NVIDIA L40S", "NVIDIA A100"], [], "NVIDIA A100+NVIDIA L40S"),
        (
            [],
            [BOARD, *[{"vendor": "0x1002", "class": "0x120000", "device": "0x74a1"}] * 8],
            "pci-1002-74a1",
        ),
        ([], [{"vendor": "0x10de", "class": "0x030200", "device": "0x2330"}], "pci-10de-2330"),
        ([], [{"vendor": "0x10de", "class": "0x020700", "device": "0x1021"}], "cpu"),
        ([], [BOARD], "cpu"),
        ([], [], "cpu"),
    ],
)
def test_a_node_has_one_gpu_type(tmp_path, models, devices, name):
    assert caches.gpu_type(**node(tmp_path, models, devices)) == name


def test_hub_downloads_and_what_is_no_cache_are_not_moved(tmp_path):
    moved = caches.variables(tmp_path, ["TRITON_CACHE_DIR"])
    assert "TRITON_CACHE_DIR" not in moved
    assert {"VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"} <= set(moved)
    assert not {"HF_HOME", "XDG_CACHE_HOME", "VLLM_ASSETS_CACHE", "FLASHINFER_CUBIN_DIR"} & set(
        moved
    )
    assert len(set(moved.values())) == len(moved)


class Ground:
    """An engine's environment whose versions can be changed, and its rendered start script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / "venv"
        self.model = "/models/it's $(touch x)"
        self.env: dict[str, str] = {}
        self.runtime: dict = {"venv": str(self.venv)}
        self.make_venv(self.venv)
        self.install(self.venv, vllm="0.32.0", torch="2.13.0")

    def make_venv(self, venv: Path) -> None:
        (venv / "bin").mkdir(parents=True)
        self.program(
            venv / "bin/python3", f'PYTHONPATH="{venv}/lib" exec {sys.executable} -S "$@"'
        )
        self.program(venv / "bin/vllm", 'printf \'%s\\0\' "$@" >"$LAUNCHER_TMP/words"\nenv -0')

    def program(self, file: Path, text: str) -> None:
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def install(self, venv: Path, **versions: str) -> None:
        for name, version in versions.items():
            for old in (venv / "lib").glob(f"{name}-*.dist-info"):
                shutil.rmtree(old)
            folder = venv / f"lib/{name}-{version}.dist-info"
            folder.mkdir(parents=True)
            told = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
            (folder / "METADATA").write_text(told)

    def start(self, name="serve-mp", **outside: str) -> tuple[dict[str, str], str]:
        """What the engine would have been started in, and what was said beside it."""
        spec = FleetSpec.model_validate(
            {
                "name": "chat",
                "model": self.model,
                "executor": "mp",
                "env": self.env,
                "runtime": self.runtime,
            }
        )
        script = self.folder / f"{name}.sh"
        script.write_text(
            render.engine_scripts(spec, choose_layout(spec, 1, ModelFacts()))[f"{name}.sh"]
        )
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        ours = {
            "CACHE": self.folder / "cache",
            "TMP": scratch,
            "BASE": scratch,
            "NODE": "n1",
            "NODE_ADDRESS": "127.0.0.2",
            "NODE_RANK": 0,
            "NODES": 1,
            "PORT_API": 1,
            "PORT_VLLM_FIRST": 2,
        }
        result = subprocess.run(
            ["bash", str(script)],
            capture_output=True,
            cwd=scratch,
            env={
                "PATH": f"{self.folder}/tools:/usr/bin:/bin",
                "HOME": str(self.folder / "home"),
                **{f"LAUNCHER_{name}": str(value) for name, value in ours.items()},
                **outside,
            },
        )
        said = result.stderr.decode()
        rows = (row.partition("=") for row in result.stdout.decode().split("\0"))
        return {name: value for name, found, value in rows if found}, said

    def place(self, **outside: str) -> Path:
        """The folder that this start's caches are in."""
        environment, said = self.start(**outside)
        assert said == ""
        folders = {Path(environment[name]).parent for name in caches.FOLDERS}
        assert len(folders) == 1
        assert all(Path(environment[name]).is_dir() for name in caches.FOLDERS)
        return folders.pop()


@pytest.fixture
def ground(tmp_path):
    return Ground(tmp_path)


def test_a_start_gets_a_folder_for_its_versions_its_gpus_and_its_model(ground):
    place = ground.place()
    engines, versions, _gpu, model = place.relative_to(ground.folder / "cache").parts
    assert engines == "engines"
    assert versions.startswith("vllm-0.32.0-torch-2.13.0-")
    assert model.startswith("models-it-s-touch-x-")
    assert ground.place() == place
    assert (place / caches.STAMP).read_text() == f"compile caches of {ground.model}\n"
    words = (ground.folder / "scratch/words").read_bytes().split(b"\0")
    assert words[:2] == [b"serve", ground.model.encode()]


def test_an_upgrade_in_the_same_venv_is_a_new_folder_and_going_back_the_old_one(ground):
    first = ground.place()
    ground.install(ground.venv, vllm="0.33.0")
    second = ground.place()
    ground.install(ground.venv, torch="2.14.0")
    third = ground.place()
    assert len({first, second, third}) == 3
    ground.install(ground.venv, vllm="0.32.0", torch="2.13.0")
    assert ground.place() == first
    ground.model = "other/model"
    assert ground.place() != first


def test_what_the_spec_says_of_a_cache_stands_and_what_the_shell_says_does_not(ground):
    ground.env = {"TRITON_CACHE_DIR": "/mine/it's $(touch x)", "HF_HOME": "/hub"}
    environment, said = ground.start(TRITON_CACHE_DIR="/shell", VLLM_CACHE_ROOT="/shell")
    assert said == ""
    assert environment["TRITON_CACHE_DIR"] == "/mine/it's $(touch x)"
    assert environment["HF_HOME"] == "/hub"
    assert Path(environment["VLLM_CACHE_ROOT"]).is_relative_to(ground.folder / "cache")
    assert "LAUNCHER_CACHES" not in environment, "the program does not stay in the environment"


def test_in_a_container_its_own_versions_count_and_it_is_started_once(ground):
    image = ground.folder / "image"
    ground.make_venv(image)
    ground.install(image, vllm="0.40.0", torch="2.20.0")
    (ground.folder / "tools").mkdir()
    ground.program(
        ground.folder / "tools/apptainer",
        f'echo start >>"{ground.folder}/starts"\n'
        f'until [ "$1" = vllm.sif ]; do shift; done; shift\nPATH="{image}/bin:$PATH" exec "$@"',
    )
    ground.runtime = {"apptainer": {"image": "vllm.sif"}}
    assert ground.place().parts[-3].startswith("vllm-0.40.0-torch-2.20.0-")
    assert (ground.folder / "starts").read_text() == "start\n"


def test_kernels_that_were_downloaded_stay_where_they_are(ground):
    ground.install(ground.venv, flashinfer_python="0.7.0")
    usual = ground.folder / "home/.cache/flashinfer/cubins"
    place = ground.place()
    (usual / "kernel.cubin").write_text("")
    seen = place / "flashinfer/.cache/flashinfer/cubins"
    assert seen.resolve() == usual
    assert ground.place() == place
    assert (seen / "kernel.cubin").exists()
    shutil.rmtree(ground.folder / "home")
    ground.place(HOME=str(ground.folder / "another"))
    assert seen.is_dir(), "a link to nothing would end FlashInfer"


def test_where_no_folder_can_be_made_the_engine_still_starts_and_shares_nothing(ground):
    (ground.folder / "cache").mkdir()
    (ground.folder / "cache/engines").write_text("")
    environment, said = ground.start()
    assert said.startswith("launcher: compile caches: ")
    assert "/cache/engines/vllm-0.32.0-" in environment["VLLM_CACHE_ROOT"]


def test_an_engine_that_is_not_there_is_named(ground):
    (ground.venv / "bin/vllm").unlink()
    assert ground.start()[1] == "launcher: cannot start vllm: No such file or directory\n"


@pytest.mark.parametrize("name", ["LAUNCHER_MODEL", "LAUNCHER_CACHE", "LAUNCHER_CACHES_KEPT"])
def test_a_process_that_was_parked_for_another_folder_is_not_used(name):
    found = handover.change({name: "a", "LAUNCHER_TMP": "a"}, {name: "b", "LAUNCHER_TMP": "b"})
    assert found.put == {"LAUNCHER_TMP": "b"}
    assert handover.refusal(found) == f"{name} changed since it was parked"


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_every_engine_process_of_a_fleet_has_the_folder(
    tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir, executor
):
    spec = {**fake_spec("local", model_folder, fake_engine), "executor": executor}
    fleet = FleetUnderTest(tmp_path, cli, fleet_name, spec)
    try:
        code, document = fleet.up()
        assert code == 0, document["error"]
        found: dict[str, set[str]] = {}
        for pid, node in engine_processes(fleet_name).items():
            rows = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            environment = dict(row.split("=", 1) for row in rows if "=" in row)
            found.setdefault(node, set()).add(environment["VLLM_CACHE_ROOT"])
    finally:
        assert fleet.down() == 0
    assert set(found) == {"n1", "n2"}
    (place,) = set.union(*found.values())
    assert Path(place).is_dir(), "the caches outlive the fleet"
    engines, versions, _gpu, model, _ = Path(place).relative_to(state_dir / "cache").parts
    assert (engines, versions.rpartition("-")[0]) == ("engines", "vllm-0.32.0-torch-2.13.0+cpu")
    assert model == caches.model_name(str(model_folder))
