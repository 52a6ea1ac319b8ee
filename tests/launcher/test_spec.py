from pathlib import Path

import pytest
import yaml

from launcher.errors import SpecError
from launcher.spec import FleetSpec, differences, duration_s
from launcher.specfile import check_model_folder, load

HOSTILE = [
    "a b",
    "it's",
    '"q"',
    "$(touch /tmp/launcher-pwned)",
    "`id`",
    "a\tb",
    "ünï",
    "-x",
    ";ls",
]


def write(tmp_path, text):
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    return file


BASE = "name: chat\nmodel: org/model\n"


@pytest.fixture(autouse=True)
def _no_user_config(state_dir):
    return state_dir


def test_what_is_not_written_has_a_default_that_works(tmp_path):
    spec = load(write(tmp_path, BASE), {}).spec
    assert (spec.nodes, spec.replicas, spec.backend.kind, spec.parallelism) == (
        1,
        1,
        "local",
        "auto",
    )


def test_flags_override_the_file(tmp_path):
    spec = load(write(tmp_path, BASE + "nodes: 2\n"), {"nodes": 4, "executor": "mp"}).spec
    assert (spec.nodes, spec.executor) == (4, "mp")


def test_a_name_is_made_from_the_model_when_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(None, {"model": "meta-llama/Llama-3.3-70B_X"}).spec.name == "llama-3-3-70b-x"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (BASE + "replicsa: 2\n", 3, "Did you mean replicas?"),
        (BASE + "limits:\n  que: 3h\n", 4, "Did you mean queue?"),
        (BASE + "backend:\n  slurm: {partitoin: gpu}\n", 4, "Did you mean partition?"),
        (BASE + "nodes: two\n", 3, "nodes"),
        (BASE + "nodes: 0\n", 3, "nodes"),
        (BASE + "parallelism: {tensor: 8, pipelin: 2}\n", 3, "Did you mean pipeline?"),
        (BASE + "engine: {args: {tensor-parallel-size: 8}}\n", 3, "set by launcher"),
        (BASE + "engine: {args: {api_key: x}}\n", 3, "set by launcher"),
        (BASE + "env: {HF_TOKEN: hf_abc}\n", 3, "secrets:"),
        (BASE + "env: {VLLM_HOST_IP: 1.2.3.4}\n", 3, "set by launcher"),
        (BASE + "backend: {local: {}, slurm: {}}\n", 3, "exactly one"),
        (BASE + "backend: sulrm\n", 3, "sulrm"),
        (BASE + "runtime: {venv: /v, apptainer: {image: i}}\n", 3, "not both"),
        (BASE + "limits: {queue: soon}\n", 3, "not a duration"),
        (BASE + 'backend: {slurm: {partition: "gpu; rm -rf /"}}\n', 3, "partition"),
        (BASE + "controller: {slurm: {}}\n", 3, "needs `backend: ssh` or `slurm`"),
        (BASE + "controller: {slurm: {partitoin: cpu}}\n", 3, "Did you mean partition?"),
        (BASE + "controller: {slurm: {gres: x}}\n", 3, "unknown key controller.slurm.gres"),
        (BASE + "controller: {slurm: {walltime: 5m}}\n", 3, "write 10m or more"),
        (BASE + "controller: {slrm: {}}\n", 3, "Did you mean slurm?"),
        ("name: Chat\nmodel: m\n", 1, "lower-case"),
        ("name: 'a\\nb'\nmodel: m\n", 1, "name"),
        ("model: x\nname: [\n", 3, "not YAML"),
        ("- a\n", None, "no keys"),
        ("name: chat\n", None, "no model is named"),
    ],
)
def test_a_wrong_spec_is_refused_with_file_line_and_reason(tmp_path, text, line, told):
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, text), {})
    assert told in str(caught.value)
    assert "fleet.yaml" in caught.value.where
    if line is not None:
        assert caught.value.where.endswith(f":{line}")
    assert caught.value.exit_code == 2


def test_paths_in_a_file_are_relative_to_the_file(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    spec = load(write(folder, "name: a\nmodel: ./m\nruntime: {venv: ../v}\n"), {}).spec
    assert spec.model == str(folder / "m")
    assert spec.runtime.venv == str(tmp_path / "v")


def test_a_model_folder_without_config_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    spec = load(write(tmp_path, "name: a\nmodel: ./m\n"), {}).spec
    with pytest.raises(SpecError, match=r"config\.json"):
        check_model_folder(spec)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("1.5h", 5400),
        ("2d", 172800),
        ("1-12:00:00", 129600),
        ("12:00:00", 43200),
        (7, 7),
    ],
)
def test_durations_are_written_as_people_write_them(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize("written", ["controller: slurm", "controller: {slurm: }"])
def test_a_controller_in_slurm_needs_no_more_than_that_word(tmp_path, written):
    spec = load(write(tmp_path, BASE + "backend: slurm\n" + written + "\n"), {}).spec
    assert spec.controller_job is not None
    assert FleetSpec.model_validate_json(spec.model_dump_json()) == spec
    plain = load(write(tmp_path, BASE + "backend: slurm\n"), {}).spec
    assert FleetSpec.model_validate_json(plain.model_dump_json()).controller_job is None


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_survive_a_round_trip_through_the_spec_on_disk(value):
    spec = FleetSpec(name="a", model=f"/m/{value}".replace("\t", " "), env={"X": value})
    again = FleetSpec.model_validate_json(spec.model_dump_json())
    assert again == spec


def test_a_line_break_in_a_model_path_is_refused():
    with pytest.raises(ValueError, match="control character"):
        FleetSpec(name="a", model="/m/\nx")


def test_only_limits_may_change_in_place():
    old = FleetSpec(name="a", model="m/n")
    assert differences(old, old.model_copy(update={"nodes": 2})) == ["nodes: 1 → 2"]
    longer = FleetSpec.model_validate({"name": "a", "model": "m/n", "limits": {"start": "2h"}})
    assert differences(old, longer) == []


def test_site_defaults_stand_below_the_spec(tmp_path, monkeypatch):
    config = tmp_path / "config/launcher"
    config.mkdir(parents=True)
    (config / "config.yaml").write_text("interface: ib0\nslurm: {partition: p, account: acc}\n")
    spec = load(write(tmp_path, BASE + "backend: {slurm: {partition: gpu}}\n"), {}).spec
    assert (spec.interface, spec.backend.slurm.partition, spec.backend.slurm.account) == (
        "ib0",
        "gpu",
        "acc",
    )
    assert load(write(tmp_path, BASE), {}).spec.backend.kind == "local"


def test_every_example_is_a_spec_that_loads():
    examples = Path(__file__).resolve().parents[2] / "examples"
    specs = [file for file in examples.glob("*.yaml") if "inventory" not in file.name]
    assert len(specs) >= 3
    for file in specs:
        assert load(file, {}).spec.name
        assert yaml.safe_load(file.read_text())["nodes"] == 2
