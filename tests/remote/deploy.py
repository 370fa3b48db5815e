"Run with the server's Python: deploy the models named on standard input as {model key: bytes}."

import json
import sys

import ray
from ndif.common.schema.controller import DeploymentConfig

address, models = sys.argv[1], json.load(sys.stdin)
ray.init(address=address, namespace="NDIF", logging_level="error")
controller = ray.get_actor("Controller", namespace="NDIF")
configs = {k: DeploymentConfig(size_bytes=n, dtype="float32", padding_bias=0) for k, n in models.items()}
answer = ray.get(controller.deploy.remote(configs), timeout=120)
bad = {k: r.error for k, r in answer.results.items() if r.error}
if bad:
    sys.exit(f"not deployed: {bad}")
