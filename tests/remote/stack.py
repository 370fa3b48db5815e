"""A real NDIF server on loopback, on a CPU: Redis, an S3 stand-in, Ray, NDIF's controller and API.

All of it ends with the block:

    with ndif_stack({"/path/of/a/saved/model": 4_000_000}, workdir) as stack:
        nnsight.CONFIG.API.HOST = stack.url

`python tests/remote/stack.py install [folder]` makes the server's environment;
`... run folder=bytes ...` keeps a server up until Ctrl-C.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
VENV = Path(os.environ.get("CT_NDIF_VENV") or HERE.parents[1] / ".venv-server")
MARK = "CT_NDIF_STACK"  # in the environment of every process of a stack: so that none is overlooked
READY = {
    "redis": 15,
    "store": 60,
    "ray": 120,
    "controller": 60,
    "api": 90,
    "models": 120,
}  # seconds each part may take


class StackError(RuntimeError):
    "The server did not start; the message has the end of the log."


def install(venv: Path = VENV) -> Path:
    "Make the server's environment, or bring it up to requirements.txt; nothing is done when it is."
    venv, want = Path(venv), (HERE / "requirements.txt").read_text()
    done = venv / ".installed"
    if done.is_file() and done.read_text() == want:
        return venv
    python = venv / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(x for x in want.splitlines() if x.startswith("torch=="))
    ndif = next(x for x in want.splitlines() if x.startswith("ndif=="))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as rest:
        rest.write("\n".join(x for x in want.splitlines() if x != ndif))
        rest.flush()
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "-r", rest.name], check=True)
        subprocess.run(
            [*pip, "--no-deps", "--ignore-requires-python", ndif], check=True
        )  # declares Python 3.12; runs on 3.11
    done.write_text(want)
    return venv


def missing(venv: Path = VENV) -> str:
    "What is not there to start a stack, in a few words; empty when all is."
    if not shutil.which("redis-server"):
        return "redis-server is not installed (apt-get install redis-server)"
    if not (Path(venv) / ".installed").is_file():
        return f"no server environment in {venv} (python tests/remote/stack.py install)"
    return ""


def free_ports(n: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return ports


def get(url: str, timeout: float = 5) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as r:
        return r.read()


def model_key(folder) -> str:
    "What client and server call a saved model."
    return "nnsight.modeling.transformers.TransformersModel:" + json.dumps(
        {"repo_id": str(folder), "revision": None, "task": "text-generation"}
    )


def marked(mark: str) -> list[psutil.Process]:
    "Every living process of the stack with this mark, however deep."
    out = []
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if p.environ().get(MARK) == mark and p.status() != psutil.STATUS_ZOMBIE:
                out.append(p)
    return out


def sweep(mark: str):
    """Kill what is left of a stack, by process group: Ray puts its workers in groups of their own.
    Returns what would not go."""
    for _ in range(50):
        if not (left := marked(mark)):
            break
        groups = set()
        for p in left:
            with contextlib.suppress(ProcessLookupError):
                groups.add(os.getpgid(p.pid))
        for g in groups - {os.getpgid(0)}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(g, signal.SIGKILL)
        time.sleep(0.1)
    return marked(mark)


@dataclass
class Stack:
    workdir: Path
    venv: Path
    models: dict
    keys: tuple = ()
    env: dict = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    parts: dict = field(default_factory=dict)  # name -> Popen
    seconds: dict = field(default_factory=dict)  # name -> how long until ready

    def __post_init__(self):
        self.workdir = Path(self.workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.models = {str(Path(k).resolve()): n for k, n in self.models.items()}
        self.ray_dir = tempfile.mkdtemp(prefix="ctray", dir="/tmp")  # short: it holds sockets
        self.redis, self.store, self.gcs, self.client, self.dash, self.agent, self.api = free_ports(7)
        self.url = f"http://127.0.0.1:{self.api}"
        extra = {k: v for k, v in self.env.items()}
        self.env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("NDIF_", "RAY_", "AWS_"))
            and k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        } | {
            MARK: self.mark,
            "PATH": f"{self.venv}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_num_prestart_python_workers": "0",
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs}",
            "NDIF_HOME": str(self.workdir / "ndif"),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.redis}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{self.store}",
            "NDIF_OBJECT_STORE_ACCESS_KEY": "test",
            "NDIF_OBJECT_STORE_SECRET_KEY": "test",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{self.client}",
            "NDIF_API_PORT": str(self.api),
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_actor.CPUModelActor",
            "NDIF_CONTROLLER_IMPORT_PATH": "cpu_controller.Controller",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_STATUS_TTL_S": "1",
            "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
            "NDIF_TEST_KEYS": ",".join(self.keys),
            "NO_PROXY": "127.0.0.1",
            **extra,
        }

    # -- parts
    def log(self, name: str) -> Path:
        return self.workdir / f"{name}.log"

    def tail(self, name: str, n: int = 15) -> str:
        return (
            "\n".join(self.log(name).read_text(errors="replace").splitlines()[-n:])
            if self.log(name).exists()
            else ""
        )

    def start(self, name: str, *command):
        with open(self.log(name), "ab") as out:
            self.parts[name] = subprocess.Popen(
                [str(c) for c in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.workdir,
                start_new_session=True,
            )

    def wait(self, name: str, ready):
        "Until `ready()` is true; raises StackError when the part ends first or takes too long."
        begin, why = time.monotonic(), None
        while True:
            try:
                if ready():
                    break
            except Exception as e:
                why = e
            for part, p in self.parts.items():
                if p.poll() is not None:
                    raise StackError(
                        f"{part} ended with code {p.returncode} while waiting for {name}:\n{self.tail(part)}"
                    )
            if time.monotonic() - begin > READY[name]:
                raise StackError(
                    f"{name} was not ready after {READY[name]} s "
                    f"({type(why).__name__ if why else 'no answer'}: {why}):\n{self.tail(name)}"
                )
            time.sleep(0.2)
        self.seconds[name] = round(time.monotonic() - self.begin, 1)

    def run(self, name: str, *args, stdin: str = "", timeout: float = 60):
        "A short script in the server's environment."
        try:
            r = subprocess.run(
                [self.venv / "bin" / "python", *args],
                input=stdin,
                capture_output=True,
                text=True,
                env=self.env,
                cwd=self.workdir,
                timeout=timeout,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise StackError(f"{name} took longer than {timeout} s:\n{self.tail('ray')}") from None
        if r.returncode:
            raise StackError(f"{name} failed:\n{(r.stdout + r.stderr)[-2000:]}")

    def start_api(self):
        self.start(
            "api",
            self.venv / "bin" / "gunicorn",
            "--config",
            "python:ndif.services.api.gunicorn_conf",
            "--bind",
            f"127.0.0.1:{self.api}",
            "--graceful-timeout",
            "2",
            "keyed_api:app",
        )

    def up(self):
        self.begin = time.monotonic()
        self.guard = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "guard", self.mark, self.ray_dir],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )  # even if this process is killed
        bin = self.venv / "bin"
        self.start(
            "redis",
            "redis-server",
            "--port",
            self.redis,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            self.workdir,
            "--set-proc-title",
            "no",
        )
        self.start("store", bin / "moto_server", "-H", "127.0.0.1", "-p", self.store)
        self.start(
            "ray",
            bin / "ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={self.gcs}",
            "--num-cpus=4",
            "--num-gpus=1",
            "--object-store-memory=100000000",
            '--resources={"head":10,"cuda_memory_bytes":4000000000,"cpu_memory_bytes":4000000000}',
            f"--ray-client-server-port={self.client}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dash}",
            f"--dashboard-agent-listen-port={self.agent}",
            f"--temp-dir={self.ray_dir}",
            "--disable-usage-stats",
        )
        self.wait("redis", lambda: socket.create_connection(("127.0.0.1", self.redis), 1).close() or True)
        self.start_api()
        self.wait(
            "ray",
            lambda: (
                all(
                    socket.create_connection(("127.0.0.1", p), 1).close() or True
                    for p in (self.gcs, self.client)
                )
                and get(f"http://127.0.0.1:{self.dash}/api/version")
            ),
        )
        self.run(
            "controller",
            "-m",
            "ndif.services.ray.deployments.controller.controller",
            timeout=READY["controller"],
        )
        self.seconds["controller"] = round(time.monotonic() - self.begin, 1)
        self.wait("store", lambda: get(f"http://127.0.0.1:{self.store}/moto-api/"))
        self.wait("api", lambda: get(f"{self.url}/connected"))
        if self.models:
            self.deploy(self.models)
            self.wait(
                "models",
                lambda: (
                    set(map(model_key, self.models))
                    <= {
                        d.get("model_key")
                        for d in self.status().values()
                        if d.get("application_state") == "RUNNING"
                    }
                ),
            )

    def deploy(self, models: dict):
        self.run(
            "deploy",
            HERE / "deploy.py",
            f"ray://127.0.0.1:{self.client}",
            stdin=json.dumps({model_key(k): n for k, n in models.items()}),
            timeout=READY["models"],
        )

    def status(self) -> dict:
        return json.loads(get(f"{self.url}/status", 60))["deployments"]

    # -- end
    def processes(self) -> list[psutil.Process]:
        return marked(self.mark)

    def memory(self) -> dict[str, int]:
        "Proportional memory of every process, in MB."
        out = {}
        for p in self.processes():
            with contextlib.suppress(psutil.Error):
                out[f"{p.pid} {' '.join(p.cmdline())[:70]}"] = p.memory_full_info().pss >> 20
        return out

    def stop(self, *names, sig=signal.SIGTERM, grace: float = 5):
        "End parts by process group, all of them by default."
        parts = {n: self.parts.pop(n) for n in names or list(self.parts)[::-1] if n in self.parts}
        for s, limit in ((sig, grace), (signal.SIGKILL, 5)):
            for p in parts.values():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(p.pid, s)
            for p in parts.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    p.wait(limit)

    def down(self):
        "End everything and make sure of it; an interrupt meanwhile does not get in the way."
        hold = {}
        with contextlib.suppress(ValueError):  # only the main thread may
            for s in (signal.SIGINT, signal.SIGTERM):
                hold[s] = signal.signal(s, signal.SIG_IGN)
        try:
            self.stop()
            left = sweep(self.mark)
            shutil.rmtree(self.ray_dir, ignore_errors=True)
            self.guard.stdin.close()
            self.guard.wait(10)
            if left:
                raise StackError(f"processes left: {left}")
        finally:
            for s, h in hold.items():
                signal.signal(s, h)


@contextlib.contextmanager
def ndif_stack(models: dict, workdir, venv: Path = VENV, keys=(), env: dict | None = None):
    """A server that hosts `models` ({folder: bytes}), as a Stack; nothing of it is left afterwards.
    With `keys` only those are let in."""
    if why := missing(venv):
        raise StackError(why)
    stack = Stack(workdir, Path(venv), models, tuple(keys), dict(env or {}))
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        print(install(Path(sys.argv[2]) if len(sys.argv) > 2 else VENV))
    elif sys.argv[1:2] == ["guard"]:
        sys.stdin.read()
        sweep(sys.argv[2])
        shutil.rmtree(sys.argv[3], ignore_errors=True)  # the pipe ends with the process that holds it
    else:
        signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))
        with (
            tempfile.TemporaryDirectory() as tmp,
            ndif_stack({a.rpartition("=")[0]: int(a.rpartition("=")[2]) for a in sys.argv[2:]}, tmp) as s,
        ):
            print(s.url, s.seconds, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
