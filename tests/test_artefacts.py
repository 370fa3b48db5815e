"What is kept on disk: nothing damaged, foreign or of another run is taken for what it is not."

import json
import os
import resource
import stat
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from concept_transfer.artefacts import Journal, fingerprint, keeping, load_artefact, whole_file
from concept_transfer.concepts import POSITIONS, Concept, Position, activations, extract_concept
from concept_transfer.data import ContrastPairs, load_pairs
from concept_transfer.maps import AffineMap, LayerGrid
from concept_transfer.models import tiny_model
from concept_transfer.moments import Moments
from concept_transfer.steering import Transplant, place

PAIRS = ContrastPairs("honesty", *(getattr(load_pairs("honesty"), k)[:8] for k in ("positive", "negative")))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def joy(model):
    return extract_concept(model, PAIRS)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return {s.name: s for s in fuzz.subjects(tmp_path_factory.mktemp("made"))}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


ARTEFACTS = "concept map affine moments transplant places".split()


@pytest.mark.parametrize("kind", [*ARTEFACTS, "states", "journal"])
@pytest.mark.slow
def test_1_2_every_flipped_bit_is_found(kinds, kind, tmp_path):
    s, rng = kinds[kind], fuzz.random.Random(kind)
    for _ in range(12):
        k = rng.randrange(len(s.raw))
        raw = s.raw[:k] + bytes([s.raw[k] ^ 1 << rng.randrange(8)]) + s.raw[k + 1 :]
        (tmp_path / "flipped").write_bytes(raw)
        with pytest.raises(ValueError, match="flipped"):
            s.load(tmp_path / "flipped")


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("kind", ARTEFACTS)
def test_7_every_key_of_the_header_is_checked(kinds, kind, digest, file):
    s = kinds[kind]
    head, tensors = fuzz.head_of(s.raw), fuzz.load(s.raw)
    for key in head.keys() - {
        "digest",
        "scores",
        "target" if kind == "moments" else "",
        *fuzz.FREE,
        *(() if digest else ("settings", "format")),
    }:
        for new in (..., None, [], {}, 10**400, True):
            if new == {} and key in ("settings", "notes"):
                continue
            changed = {k: v for k, v in head.items() if k != key} | ({} if new is ... else {key: new})
            file.write_bytes(fuzz.sealed(tensors, changed, digest))
            with pytest.raises(ValueError, match="x.safetensors"), fuzz.warnings.catch_warnings():
                fuzz.warnings.simplefilter("ignore")
                s.load(file)


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_7_unknown_fields_are_named(kinds, kind, file):
    s = kinds[kind]
    file.write_bytes(fuzz.sealed(fuzz.load(s.raw), fuzz.head_of(s.raw) | {"author": "me"}))
    with pytest.raises(ValueError, match="x.safetensors: author"):
        s.load(file)


def test_9_11_no_transplant_that_cannot_steer(model):
    t = place(torch.ones(48), model, 2)
    numbers = [dict(dose=float(x)) for x in ("nan", "inf")] + [dict(norm=float("nan")), dict(norm="2")]
    places = [dict(positions=x) for x in (None, [], {}, 5, "mean", "frist")]
    layers = [dict(layer=x) for x in (99, -1, 1.5, "2", None)]
    some = (
        torch.zeros(48),
        torch.full((48,), torch.nan),
        torch.ones(47),
        torch.ones(48, 48),
        None,
        [1.0] * 48,
    )
    for wrong in numbers + places + layers + [dict(direction=v) for v in (*some, torch.ones(48).char())]:
        with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("s")):
            replace(t, **wrong)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("key", ["dose", "direction"])
def test_9_not_from_a_file_either(kinds, key, value, file):
    s = kinds["transplant"]
    head, tensors = fuzz.head_of(s.raw), fuzz.load(s.raw)
    if key == "dose":
        head[key] = float(value)
    else:
        tensors[key][3] = float(value)
    file.write_bytes(fuzz.sealed(tensors, head))
    with pytest.raises(ValueError, match=f"x.safetensors: '{key}'"):
        s.load(file)


@pytest.mark.parametrize("key", ["xx", "xy", "n", "held_y"])
def test_14_moments_that_are_not_finite(kinds, key, file):
    s = kinds["moments"]
    tensors = fuzz.load(s.raw)
    tensors[key].view(-1)[1] = torch.nan
    file.write_bytes(fuzz.sealed(tensors, fuzz.head_of(s.raw)))
    with pytest.raises(ValueError, match=f"x.safetensors: '{key}'"):
        Moments.load(file)


def test_15_16_what_is_loaded_stays(joy, file):
    joy.save(file)
    kept = Concept.load(file)
    with open(file, "r+b") as f:
        f.write(bytes(5000))
    assert torch.equal(kept.directions, joy.directions)
    os.truncate(file, 10)
    assert torch.equal(kept.directions * 1, joy.directions)


@pytest.mark.slow
def test_loading_takes_no_more_memory_than_what_is_loaded(file):
    "The peak of resident memory in a process of its own: once, not twice, the size of the file."
    Journal(file, "states", tensors=True).keep({f"t{k}": torch.ones(10_000_000) for k in range(4)})
    (made,) = file.iterdir()
    code = """if True:
        import resource, sys
        from concept_transfer.artefacts import load_artefact
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before, kept = peak(), load_artefact(sys.argv[1])
        print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
    """
    said = subprocess.run([sys.executable, "-c", code, made], capture_output=True, text=True, check=True)
    assert int(said.stdout) < 1.3 * made.stat().st_size


def test_tensors_that_share_memory_are_kept(file):
    m = Moments.zeros(1, 1, 3, 1, 3)
    m.y = m.x
    m.save(file)
    assert torch.equal(Moments.load(file).y, m.x)


def test_19_leftovers_of_killed_runs_go(joy, file):
    pid = os.fork()
    if not pid:
        with whole_file(file) as tmp:
            tmp.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    mine = file.with_name(f".{file.name}-{os.getppid()}-0a1b2c3d.part")  # another run writes it just now
    mine.mkdir()
    assert len([*file.parent.iterdir()]) == 2
    joy.save(file)
    assert {*file.parent.iterdir()} == {file, mine}


def limited(size, work):
    "What is said where files may grow to so many bytes, in a process of its own."
    out, into = os.pipe()
    if not (pid := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work()
        except BaseException as e:
            os.write(into, f"{type(e).__name__}: {e}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(into)
    with open(out, "rb") as f:
        return f.read().decode()


def test_25_26_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "arms"
    Journal(path, "evaluation").keep({"base": [0.25] * 500})
    before = path.read_bytes()
    said = limited(len(before) + 40, lambda: Journal(path, "evaluation").keep({"native": [0.5] * 500}))
    assert said.startswith("OSError") and "arms" in said and "Free some space" in said
    assert path.read_bytes() == before and [*Journal(path, "evaluation").done] == ["base"]
    assert "Free some space" in limited(3, lambda: Journal(tmp_path / "new", "evaluation"))


@pytest.mark.parametrize(
    "text", ["dear notes\n", "dear notes", "{}\n", "[1, 2]\n", '{"key": "x"}\n', "\0\xff\n", "5\n"]
)
def test_28_44_a_file_that_is_no_journal_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="notes.txt holds something else than a journal"):
        Journal(path, "jobs")
    assert path.read_bytes() == text.encode("latin1")


def test_44_an_empty_file_may_become_one(tmp_path):
    (tmp_path / "jobs").touch()
    Journal(tmp_path / "jobs", "jobs").keep({"chunk 0": "id-7f"})
    assert Journal(tmp_path / "jobs", "jobs").done == {"chunk 0": "id-7f"}


def test_28_another_runs_journal_says_what_differs(tmp_path):
    run = {"task": "happiness", "model": "llama", "weight": lambda x: x}
    Journal(tmp_path / "j", "evaluation", run).keep({"base": 1})
    for k, v in {"task": "fear", "weight": lambda x: x + 1, "model": None}.items():
        with pytest.raises(ValueError, match=f"/j belongs to another run: {k} was"):
            Journal(tmp_path / "j", "evaluation", run | {k: v})
    with pytest.raises(ValueError, match="belongs to another run: draws was None"):
        Journal(tmp_path / "j", "evaluation", run | {"draws": 3})
    assert Journal(tmp_path / "j", "evaluation", run | {"weight": lambda x: x}).done == {"base": 1}


@pytest.mark.parametrize("line", [0, 1, 2])
def test_lines_that_are_gone_doubled_or_moved(tmp_path, line):
    path = tmp_path / "j"
    Journal(path, "evaluation").keep({"a": 1, "b": 2, "c": 3})
    lines = path.read_text().splitlines(keepends=True)
    for new in (
        lines[:line] + lines[line + 1 :],
        lines[: line + 1] + lines[line:],
        lines[:line] + lines[:line:-1],
    ):
        path.write_text("".join(new))
        if new != lines:
            with pytest.raises(ValueError, match="/j (is damaged|holds something else)"):
                Journal(path, "evaluation")


def test_half_a_line_is_forgiven(tmp_path):
    path = tmp_path / "j"
    Journal(path, "evaluation").keep({"a": 1, "b": {"kl": [0.1]}})
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        journal = Journal(path, "evaluation")
        assert {"a": 1, "b": {"kl": [0.1]}}.items() >= journal.done.items()
        journal("a", lambda: 1)
        journal("b", lambda: {"kl": [0.1]})
        assert path.read_bytes() == whole


def test_two_runs_at_one_journal(tmp_path):
    one, two = (Journal(tmp_path / "j", "evaluation") for _ in "ab")
    one.keep({"a": 1})
    with pytest.raises(ValueError, match="changed by another run"):
        two.keep({"b": 2})
    assert Journal(tmp_path / "j", "evaluation").done == {"a": 1}


def test_111_threads_keep_what_they_have_in_one_journal(tmp_path):
    shared = Journal(tmp_path / "j", "evaluation")
    with ThreadPoolExecutor(30) as pool:
        list(pool.map(lambda k: shared.keep({k: [k] * 99}), map(str, range(300))))
    assert Journal(tmp_path / "j", "evaluation").done == {str(k): [str(k)] * 99 for k in range(300)}


def test_42_43_kept_states(model, tmp_path):
    few = load_pairs("honesty").texts[:4]
    want = activations(model, few, [1], path=tmp_path)
    (f,) = tmp_path.iterdir()
    raw = f.read_bytes()
    kept = fuzz.load(raw)
    assert torch.equal(activations(model, few, [1], path=tmp_path), want)
    nan = {k: v * torch.nan for k, v in kept.items()}
    for bad in (raw[:-9], raw[:-2] + b"\0\0", fuzz.sealed(nan, fuzz.head_of(raw)), raw[:40], b""):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match=f.name):
            activations(model, few, [1], path=tmp_path)
    f.write_bytes(fuzz.sealed({k: v[:, :5] for k, v in kept.items()}, fuzz.head_of(raw)))
    with pytest.raises(ValueError, match="5"):
        activations(model, few, [1], path=tmp_path)
    f.write_bytes(raw)
    save_file(kept, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign.safetensors"):
        activations(model, few, [1], path=tmp_path)


def test_42_a_file_in_the_place_of_a_folder_is_refused_first(model, file, monkeypatch):
    file.write_text("notes")
    monkeypatch.setattr("concept_transfer.concepts.stream", None)  # reading would fail
    with pytest.raises(ValueError, match="is a file, where a folder is needed"):
        activations(model, ["Rain."], [1], path=file)
    assert file.read_text() == "notes"


def test_42_states_of_another_rule_of_the_same_name(model, tmp_path, monkeypatch):
    for k in (0, 1):
        monkeypatch.setitem(POSITIONS, "mine", Position("mine", read=lambda h, k=k: h[k]))
        a, b = (activations(model, ["It rained all day."], position="mine", path=p) for p in (tmp_path, None))
        assert torch.equal(a, b)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_48_a_device_stays_one(joy):
    with pytest.raises(OSError, match="/dev/full .*Free some space"):
        joy.save("/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_48_a_pipe_is_written_to(joy, file, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    if not (pid := os.fork()):
        joy.save(tmp_path / "pipe")
        os._exit(0)
    file.write_bytes((tmp_path / "pipe").read_bytes())
    again = Concept.load(file)
    os.waitpid(pid, 0)
    assert torch.equal(again.directions, joy.directions) and (tmp_path / "pipe").is_fifo()
    with pytest.raises(ValueError, match="pipe cannot be read as an artefact.*is a pipe"):
        Concept.load(tmp_path / "pipe")


def test_50_errors_name_the_users_path(joy, tmp_path):
    (tmp_path / "a file").touch()
    for path in (tmp_path, tmp_path / "none" / "c", tmp_path / "a file" / "c"):
        with pytest.raises(OSError, match=f"'{path}'"):
            joy.save(path)


def test_51_rights_and_links_stay(joy, file):
    file.touch(0o600)
    os.chmod(file, 0o600)
    (link := file.with_name("link")).symlink_to(file.name)
    joy.save(link)
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert torch.equal(Concept.load(link).directions, joy.directions)


def test_F1_numbers_of_numpy(model, joy, file):
    place(joy, model, np.argmax(joy.auc)).save(file)
    extract_concept(model, PAIRS, layers=np.arange(2)).save(file)
    again = Concept.load(file)
    assert again.layers == (0, 1) and type(again.layers[0]) is int
    assert type(replace(joy, n_pairs=np.int64(3)).n_pairs) is int


def test_I1_home(joy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    joy.save("~/x")
    assert torch.equal(Concept.load("~/x").directions, joy.directions) and (tmp_path / "x").is_file()
    Journal("~/j", "evaluation").keep({"a": 1})
    assert Journal(tmp_path / "j", "evaluation").done == {"a": 1}


@pytest.mark.parametrize(
    "text", ['{"a":' * 5000, "[" * 100_000, "1" * 5000, "5", "[]", '"a"', "{}", "", "\ud800"]
)
def test_94_headers_that_are_none(text, file):
    save_file({"W": torch.eye(2)}, file, {"concept_transfer": text.encode("utf8", "replace").decode()})
    with pytest.raises(ValueError, match="x.safetensors"):
        load_artefact(file)


def test_format_2_needs_its_digest_and_format_1_says_that_it_is_old(kinds, file):
    s = kinds["concept"]
    head = {k: v for k, v in fuzz.head_of(s.raw).items() if k != "digest"}
    save_file(fuzz.load(s.raw), file, {"concept_transfer": json.dumps(head)})
    with pytest.raises(ValueError, match="digest"):
        Concept.load(file)
    file.write_bytes(fuzz.sealed(fuzz.load(s.raw), head, digest=False))
    with pytest.warns(UserWarning, match="older format 1"):
        assert fuzz.same(fuzz.content(Concept.load(file)), fuzz.content(s.load(file)))


@pytest.mark.parametrize(
    "wrong",
    [dict(layers=(0, 1)), dict(auc=(2,)), dict(auc=[float("inf")] * 4), dict(template="none"), dict(name=3)],
)
def test_a_concept_made_in_memory_is_checked_too(joy, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(joy, **wrong)


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_artefacts_are_equal_by_what_they_hold(kinds, kind, file):
    s = kinds[kind]
    file.write_bytes(s.raw)
    one, other = s.load(file), s.load(file)
    assert one == other and one != "it"
    for k, v in fuzz.content(one).items():
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            assert one != replace(other, **{k: 2 * v}), k
    more = {"seed": 9} if kind == "concept" else {"source_layers": (0,)} if kind == "moments" else None
    assert one != replace(other, **(more or {"source": replace(one.target, name="it")}))


def test_what_was_not_measured_is_equal_to_itself_and_a_control_to_none(joy, model):
    unmeasured = [replace(joy, auc=(float("nan"), *joy.auc[1:])) for _ in range(2)]
    assert unmeasured[0] == unmeasured[1] != joy
    t = place(joy, model, 1)
    assert t != replace(t, shuffled=t.direction) and t == replace(t, model=None)
    assert hash(joy) == hash(joy) and len({joy, joy}) == 1


@pytest.mark.parametrize("cls", [Concept, AffineMap, LayerGrid, Transplant, Moments])
def test_shapes_name_fields(cls):
    assert cls.shapes.keys() | {*cls.apart, *cls.endless, *cls.missing} - {"scores"} <= {
        *cls.__dataclass_fields__
    }


def test_functions_count_by_what_they_do():
    made = [lambda x: x, lambda x: x + 1]
    assert fingerprint(made[0]) != fingerprint(made[1]) == fingerprint(lambda x: x + 1)
    assert fingerprint(fuzz.same) == fingerprint(fuzz.same) != fingerprint(fuzz.content)
    assert fingerprint(torch.exp) != fingerprint(torch.sin) and fingerprint(np.exp) != fingerprint(np.sin)
    with pytest.raises(ValueError, match="cannot be told"):
        fingerprint(open(os.devnull))  # noqa: SIM115


OF_CLASSES = [
    "class Mine:\n k = {}\n def of(self): return self.k",
    "class Other:\n def of(self): return {}\nclass Mine(Other): pass",
    "class Mine:\n @staticmethod\n def of(): return {}",
    "class Mine:\n @property\n def of(self): return {}",
    "import functools\n@functools.cache\ndef Mine(): return {}",
    "import functools\nclass Mine:\n @functools.cached_property\n def of(self): return {}",
    "class Kept:\n def __init__(self, k): self.k, self.__wrapped__ = k, lambda: 0\nMine = Kept({})",
    "import re\nwhat = re.compile('{}')\ndef Mine(): return what",
    "import numpy\nwhat = numpy.array([{}])\ndef Mine(): return what",
    "import torch\nwhat = torch.tensor([{}])\ndef Mine(): return what",
    "import functools\nwhat = functools.partial(max, {})\ndef Mine(): return what",
    "import collections\nwhat = collections.Counter(a={})\ndef Mine(): return what",
    "import torch\nwhat = torch.nn.Linear(1, 1, False)\nwhat.weight.data[:] = {}\ndef Mine(): return what",
    "import pandas\nwhat = pandas.DataFrame(dict(a=[{}]))\ndef Mine(): return what",
    "import decimal\nwhat = decimal.Decimal({})\ndef Mine(): return what",
    "import torch\nwhat = [torch.tanh, torch.relu][{} - 1]\ndef Mine(): return what",
    "import torch.nn.functional as F\nwhat = [F.gelu, F.silu][{} - 1]\ndef Mine(): return what",
    "import torch, numpy\nwhat = [torch, numpy][{} - 1]\ndef Mine(): return what.exp",
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n k: int = 1\n def of(self): return {}\nMine = A()",
    "class Mine:\n k = [{}]",
    "class Mine:\n class Inner:\n  def of(self): return {}",
    "import enum\nclass Mine(enum.Enum):\n a = {}",
    "class A(list):\n def of(self): return {}\nMine = A([1])",
    "Mine = [lambda *x: x, lambda x: x][{} - 1]",
    "Mine = [lambda x: x, lambda *, x: x][{} - 1]",
    "import numpy\nMine = numpy.ones(3, ['f4', 'f8'][{} - 1])",
    "def Mine(): return 1\nMine.k = {}",
    "import operator\nwhat = operator.itemgetter({})\ndef Mine(): return what",
]


@pytest.mark.parametrize("text", OF_CLASSES)
def test_37_what_stands_around_a_function_counts(text):
    def made(k):
        exec(text.format(k), names := {"__name__": "mine"})
        return fingerprint(names["Mine"])

    assert made(1) == made(1) != made(2)


USES = [
    "from helpful import help\ndef mine(x): return help(x)",
    "import helpful as h\ndef mine(x): return h.help(x)",
    "from helpful import help\ndef mine(x): return [(lambda z: help(z))(y) for y in x]",
    "from helpful import Helper\nclass mine(Helper): pass",
    "from helpful import k\ndef mine(x): return k.of()",
]
HELPER = """
class Helper:
    def of(self): return {0}
def other(x): return {0}
def help(x): return other(x)
k, never_asked = Helper(), open(__file__)
"""


@pytest.mark.parametrize("text", USES)
def test_helpers_in_modules_of_ones_own_count(text, tmp_path, monkeypatch):
    def made(k):
        helpful = types.ModuleType("helpful")
        helpful.__file__ = str(tmp_path / "helpful.py")
        Path(helpful.__file__).touch()
        exec(HELPER.format(k), vars(helpful))
        monkeypatch.setitem(sys.modules, "helpful", helpful)
        exec(text, names := {"__name__": "mine"})
        helpful.never_asked.close()
        return fingerprint(names["mine"])

    assert made(1) == made(1) != made(2)


def test_what_leads_back_to_itself_or_is_not_there_yet_is_told(tmp_path, monkeypatch):
    for name, text in {"__init__": "", "b": "def h(x): return x", "a": "import pkgq.b"}.items():
        (tmp_path / "pkgq").mkdir(exist_ok=True)
        (tmp_path / "pkgq" / f"{name}.py").write_text(text + "\ndef g(x): return pkgq.b.h(x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    exec("import pkgq.a\ndef mine(x): return pkgq.a.g(x)", names := {"__name__": "mine"})

    def later():
        return undone

    assert fingerprint(names["mine"]) == fingerprint(names["mine"]) != fingerprint(later)
    undone = 1
    assert later() == undone


CAUGHT: dict = dict(capture_output=True, text=True)
CIRCLE = """
from concept_transfer.artefacts import fingerprint
def a(x): return b(x) + c(x)
def b(x): return c(x - 1) if x else 0
def c(x): return b(x - 1) if x else 1
print(fingerprint(a))
"""


@pytest.mark.slow
def test_fingerprints_are_those_of_another_process():
    told = [
        subprocess.run([sys.executable, "-c", CIRCLE], env=os.environ | {"PYTHONHASHSEED": k}, **CAUGHT)
        for k in "12"
    ]
    assert told[0].stdout == told[1].stdout != ""


def test_a_journal_makes_its_folder(tmp_path):
    Journal(tmp_path / "a" / "b" / "kept", "values")("one", lambda: 1)
    assert Journal(tmp_path / "a" / "b" / "kept", "values").done == {"one": 1}


@pytest.mark.parametrize("work", [fuzz.fuzz, fuzz.flips])
def test_fuzz(tmp_path, kinds, work):
    said: list = []
    assert work(200, tmp_path, said.append, [*kinds.values()]) == 0, "\n".join(said)


def test_killed_runs_come_to_the_same(tmp_path):
    said: list = []
    assert fuzz.kills(4, tmp_path, said.append) == 0, "\n".join(said)


def test_a_journal_in_the_place_of_a_folder_or_a_device(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match=f"^{path} is a folder or a device"):
            Journal(path, "values")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match=f"^{path} is a file, where a folder is needed"):
            activations(model, ["Rain."], path=path)


@pytest.mark.parametrize("kind", ["map", "moments", "concept", "transplant"])
@pytest.mark.parametrize("key", ["layers", "width"])
@pytest.mark.parametrize("value", [10**400, -1, 2.0, "4"])
def test_the_shape_of_a_model_is_numbers(kinds, kind, key, value, file):
    s = kinds[kind]
    head = fuzz.head_of(s.raw)
    side = "model" if kind == "concept" else "target"
    file.write_bytes(fuzz.sealed(fuzz.load(s.raw), head | {side: head[side] | {key: value}}))
    with pytest.raises(ValueError, match="x.safetensors"):
        s.load(file)


def test_28_a_file_of_ones_own_stays_beside_a_search(tmp_path):
    letter = tmp_path / "letter"
    letter.write_text("dear you\n")
    with keeping(letter):
        pass
    assert letter.read_text() == "dear you\n"
    with keeping(tmp_path / "search") as file:
        Journal(file, "search").keep({"a": 1})
    assert not file.exists()


def test_7_a_place_or_a_score_that_cannot_be(kinds, file):
    for kind, key, value in (
        ("concept", "site", "attention"),
        ("concept", "auc", [1e308] * 4),
        ("affine", "r2", 1e308),
        ("map", "p_value", 1.5),
        ("map", "p_value", -1.0),
    ):
        head, tensors = fuzz.head_of(kinds[kind].raw), fuzz.load(kinds[kind].raw)
        file.write_bytes(fuzz.sealed(tensors, head | {key: value}))
        with pytest.raises(ValueError, match=f"x.safetensors.*{key}"):
            kinds[kind].load(file)


def test_a_journal_says_what_it_keeps(tmp_path):
    kept = Journal(tmp_path / "j", "search")
    kept.keep({"a": 1})
    assert repr(kept) == "Journal('search', 1 kept)"


def test_46_what_no_run_in_a_folder_made_is_left_alone(joy, tmp_path):
    mine, files = tmp_path / "joy.safetensors", Journal(tmp_path / "made_of", "demo")
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"{mine} was there before"):
        files.artefact(mine, "8 pairs", lambda: joy, Concept.load)
    assert mine.read_text() == "mine" and not files.done
    mine.unlink()
    with pytest.raises(KeyboardInterrupt):
        files.artefact(mine, "8 pairs", lambda: (_ for _ in ()).throw(KeyboardInterrupt), Concept.load)
    joy.save(mine)  # as of a run that was killed before it could note what it had made
    again = Journal(tmp_path / "made_of", "demo")
    assert again.artefact(mine, "8 pairs", lambda: joy, Concept.load) == joy


def test_what_a_function_holds_may_be_large():
    def holding(weights):
        return lambda x: x @ weights

    a, b = torch.zeros(2, 1000, 1000)
    b[7, 7] = 1
    assert fingerprint(holding(a)) == fingerprint(holding(a.clone())) != fingerprint(holding(b))
    assert fingerprint(a.bfloat16()) != fingerprint(a) != fingerprint(a.view(-1))


def test_true_is_not_one_in_what_a_journal_depends_on(tmp_path):
    Journal(tmp_path / "j.jsonl", "values", {"x": 1})("a", lambda: 1)
    with pytest.raises(ValueError, match="j.jsonl"):
        Journal(tmp_path / "j.jsonl", "values", {"x": True})
