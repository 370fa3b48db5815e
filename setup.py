"The package as settings.ini describes it; nbdev reads the same file."

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(interpolation=None)
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_name"]

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    license=cfg["license"],
    author=cfg["author"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    python_requires=">=" + cfg["min_python"],
    packages=[lib],
    package_data={lib: cfg["package_data"].split()},
    install_requires=cfg["requirements"].split(),
    extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "tasks", "rollout")},
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": [f"{lib}={lib}._modidx:d"],  # lets nbdev link names in backticks to their pages
        "vllm.general_plugins": [f"{lib}={lib}.vllm_plugin:register"],
    },
)
