"""What is rendered is linted as what it is: bash."""

import subprocess
import sys
from pathlib import Path, PurePath

import pytest

from launcher import render
from launcher.layout import ModelFacts, choose_layout
from launcher.spec import ControllerJob, FleetSpec

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
GOLDEN = Path(__file__).parents[1] / "golden"
RUNTIMES = {
    "plain": {},
    "venv": {"venv": "/opt/it's a venv"},
    "modules": {"modules": ["cuda/12.4", "vllm"]},
    "apptainer": {"apptainer": {"image": "/img/v $(x).sif", "mounts": ["/data:/data"]}},
    "pyxis": {"pyxis": {"image": "docker://vllm", "mounts": ["/data:/data"]}},
}


def spec_of(runtime: str, executor: str, **more) -> FleetSpec:
    return FleetSpec.model_validate(
        {
            "name": "chat",
            "model": "/models/it's $(touch /tmp/x)",
            "nodes": 2,
            "parallelism": {"tensor": 8, "pipeline": 2},
            "executor": executor,
            "runtime": RUNTIMES[runtime],
            "env": {"ODD": "a 'b' \"c\" $(d)\ne"},
            "engine": {"args": {"max-model-len": 4096}},
            "backend": {"slurm": {"partition": "gpu", "account": "nlp", "walltime": "12h"}},
            **more,
        }
    )


def scripts_of(spec: FleetSpec) -> dict[str, str]:
    layout = choose_layout(spec, 8, ModelFacts())
    batch = render.sbatch_script(
        spec,
        owner="r1",
        number=3,
        size=spec.nodes,
        base="/home/ml/.local/state/launcher/chat/runs/1/r1.a3",
        python="/opt/launcher/bin/python",
        gpus_per_node=8,
        mark="0123456789abcdef",
    )
    scripts = {**render.engine_scripts(spec, layout), "replica.sbatch": batch}
    return {**scripts, "controller.sbatch": controller_script(spec, {"walltime": "7d"})}


def controller_script(spec: FleetSpec, job: dict) -> str:
    fleet = PurePath("/home/ml/.local/state/launcher") / spec.name
    return render.controller_script(
        spec,
        ControllerJob.model_validate(job),
        root=fleet,
        log=fleet / "runs/1/controller.log",
        python="/opt/launcher/bin/python",
        mark="0123456789abcdef",
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("executor", ["ray", "mp"])
def test_every_rendered_script_passes_shellcheck(tmp_path, runtime, executor):
    files = []
    for name, text in scripts_of(spec_of(runtime, executor)).items():
        files.append(tmp_path / name)
        files[-1].write_text(text)
    result = subprocess.run(
        [str(SHELLCHECK), "-s", "bash", "-S", "warning", *map(str, files)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["replica.sbatch", "controller.sbatch", "serve-ray.sh"])
def test_a_rendered_script_is_what_it_was(name):
    """The golden files change only on purpose: `GOLDEN=1 pytest` is not offered, edit them."""
    text = scripts_of(spec_of("venv", "ray"))[name]
    assert text == (GOLDEN / name).read_text()


def test_nothing_from_a_spec_is_executed_when_a_script_is_read(tmp_path):
    marker = tmp_path / "executed"
    hostile = f"$(touch {marker})`touch {marker}`'\"; touch {marker} #"
    spec = FleetSpec.model_validate(
        {
            "name": "chat",
            "model": f"/models/{hostile}",
            "env": {"A": hostile},
            "engine": {"args": {"chat-template": hostile}},
            "runtime": {"venv": f"/v/{hostile}"},
        }
    )
    layout = choose_layout(spec, 1, ModelFacts())
    for name, text in render.engine_scripts(spec, layout).items():
        cut = text.replace('exec "${ENGINE[@]}"', "printf '%s\\n'")
        file = tmp_path / name
        file.write_text(cut)
        subprocess.run(
            ["bash", str(file)],
            capture_output=True,
            env={
                "PATH": "/usr/bin:/bin",
                "LAUNCHER_NODE_ADDRESS": "127.0.0.2",
                "LAUNCHER_PORT_VLLM_FIRST": "1",
                "LAUNCHER_NODE_RANK": "0",
                "LAUNCHER_NODES": "1",
                "LAUNCHER_PORT_API": "2",
            },
        )
        assert not marker.exists(), name


def test_directives_keep_blanks_and_percent_signs():
    spec = spec_of("plain", "mp")
    text = render.sbatch_script(
        spec,
        owner="r1",
        number=1,
        size=spec.nodes,
        base="/a b/100%",
        python="/p",
        gpus_per_node=4,
        mark="m",
    )
    assert "#SBATCH '--output=/a b/100%%/supervisor.log'" in text
    assert "#SBATCH --gres=gpu:4" in text
    assert "#SBATCH --time=0-12:00:00" in text


def test_the_controllers_job_takes_from_the_replicas_what_is_the_sites_and_no_more():
    backend = {"partition": "gpu", "account": "nlp", "qos": "long", "walltime": "1h", "mem": "1T"}
    spec = spec_of("plain", "mp", backend={"slurm": {**backend, "constraint": "h100"}})
    text = controller_script(spec, {"partition": "cpu", "mem": None, "directives": ["--nice=5"]})
    rows = [row.removeprefix("#SBATCH ") for row in text.splitlines() if row.startswith("#S")]
    assert {"--partition=cpu", "--account=nlp", "--qos=long", "--nice=5"} <= set(rows)
    assert not [row for row in rows if row.startswith(("--time", "--mem", "--constr", "--gres"))]
    ssh = spec_of("plain", "mp", backend={"ssh": {"inventory": "/i.yaml"}})
    assert "--partition" not in controller_script(ssh, {})
