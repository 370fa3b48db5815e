"""Environments of the engines that exported transplants are compared with.

`python tests/engines/install.py FOLDER [NAME ...]` makes them, or leaves them as they are; what cannot be
installed here is said, and its tests are skipped.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from concept_transfer.export import ENGINES

ROOT = Path(__file__).resolve().parents[2]
STEPS = {  # what pip is given, one call after the other
    "llama.cpp": [["install", ENGINES["llama.cpp"][0]]],
    "lm-eval": [["install", "lm-eval[hf]==0.4.13"]],
    "inspect-ai": [["install", "inspect-ai==0.3.285"]],
    "vllm": [
        ["install", ENGINES["vllm"][0].split()[-1]],  # `PIP_EXTRA_INDEX_URL` may name PyTorch's own index
        [
            "uninstall",
            "-y",
            "torchvision",
            "torchaudio",
            "torchcodec",
            "triton",
        ],  # the CUDA builds break vllm
        ["install", "--no-deps", str(ROOT)],
    ],
}


def install(home: Path, name: str):
    "Make one environment. Raises CalledProcessError where pip fails."
    done = home / ".installed"
    if done.is_file() and done.read_text() == str(STEPS[name]):
        return
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    if name in ("lm-eval", "inspect-ai"):  # run beside this package, and with what that needs
        (site / "beside.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    for step in STEPS[name]:
        pip = [home / "bin" / "python", "-m", "pip", "--disable-pip-version-check", step[0], "--quiet"]
        subprocess.run([*pip, *step[1:]], check=True)
    done.write_text(str(STEPS[name]))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    for name in sys.argv[2:] or STEPS:
        try:
            install(folder / name, name)
            print(f"{name}: {folder / name}")
        except subprocess.CalledProcessError as e:
            print(f"WARNING: {name} cannot be installed here, its tests are NOT run ({e}).", file=sys.stderr)
