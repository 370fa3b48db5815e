"""NDIF 0.1.2's controller over nnsight 0.8.1: it passes an argument that 0.8.1 no longer takes.
A folder is sized by its files, without a hub."""

import json
from pathlib import Path

import ray
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from nnsight.modeling.mixins.remotable import CheckpointInfo, Remotable
from transformers import AutoConfig


def describe(cls, model_key, dtype, trust_remote_code=False):
    folder = Path(json.loads(model_key.split(":", 1)[1])["repo_id"])
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not hosted here")
    config = AutoConfig.from_pretrained(folder)
    return CheckpointInfo(sum(f.stat().st_size for f in folder.glob("*.safetensors")), None, config, None)


Remotable.describe_checkpoint = classmethod(describe)
Remotable.max_tp_size = classmethod(lambda cls, model_key, trust_remote_code=False: None)


class Base(_ControllerActor):
    "Named, so that Ray imports this module where the controller runs."


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(Base):
    pass
