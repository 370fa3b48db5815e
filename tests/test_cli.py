"""The command line as another process sees it: files, JSON, exit codes, one-line errors."""

import ast
import contextlib
import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from io import BytesIO, TextIOWrapper
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm
from typer.main import get_command

from concept_transfer import (
    __version__,
    arms,
    artefacts,
    cli,
    concepts,
    data,
    evidence,
    maps,
    models,
    moments,
    plots,
    selection,
    tasks,
)
from concept_transfer.artefacts import KEPT, load_fields
from concept_transfer.concepts import Concept
from concept_transfer.data import EMOTIONS, PAIRS, Corpus, load_corpus, load_pairs, text_key, texts_hash
from concept_transfer.evidence import Evidence
from concept_transfer.maps import MAP_METHODS, LayerGrid, fit_maps
from concept_transfer.measure import prose_damage
from concept_transfer.models import tiny_model
from concept_transfer.steering import Transplant
from concept_transfer.tasks import TASKS, choice_task, load_task
from concept_transfer.toys import tiny_module
from concept_transfer.zoo import EMBEDDED

EVIDENCE = set("transplant task n damage_budget layers arms recovery p_value versions seed".split())
ARM = {"dose", "target_rate", "choice_rate", "logit_shift", "ci", "kl", "perplexity_ratio"}
ARMS = {"base", "transplanted", "native", "random", "shuffled_map", "other_concept", "prompt"}
TO_LARGE = ["align", "--source", "./small", "--target", "./large"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with two tiny models, pairs, a corpus and a task."
    folder = tmp_path_factory.mktemp("cli")
    models = {"small": ("llama", "max_position_embeddings"), "large": ("gpt2", "n_positions")}
    for name, (family, context) in models.items():
        for part in tiny_module(family, **{context: 512}):
            part.save_pretrained(folder / name)
    joy, sad = (load_pairs(f"emotions/{e}") for e in EMOTIONS[:2])
    (folder / "joy.json").write_text(json.dumps({"pos": joy.positive, "neg": joy.negative}))
    rows = [{"positive": p, "negative": n} for p, n in zip(sad.positive, sad.negative, strict=True)]
    (folder / "sad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    corpus = [t for e in EMOTIONS[2:5] for t in load_pairs(f"emotions/{e}").texts]
    (folder / "corpus.txt").write_text("\n".join(corpus))
    (folder / "short.txt").write_text("\n".join(load_pairs("emotions/fear").texts[:60]))
    scenes = load_task("emotions/happiness").items[:12]
    items = [dict(prompt=i.prompt, choices=i.choices, target=i.target, group=i.group) for i in scenes]
    task = {"name": "joy", "instruction": "Everybody is happy. ", "items": items}
    (folder / "task.json").write_text(json.dumps(task))
    return folder


def run(place, *argv):
    "Exit code, standard output and standard error of the command in a process of its own."
    command = [os.path.join(os.path.dirname(sys.executable), "concept-transfer"), *map(str, argv)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def main(*argv):
    "The exit code of the command in this very process."
    return cli.main(list(map(str, argv)))


@pytest.fixture
def here(place, monkeypatch):
    "The folder as the working directory of this very process."
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def made(place):
    "A concept of the small model and maps into the large one."
    with contextlib.chdir(place):
        pairs = ["--pairs", "joy.json", "--out", "made.safetensors"]
        assert main("extract", "--model", "./small", *pairs) == 0
        assert main(*TO_LARGE, "--corpus", "short.txt", "--out", "grid.safetensors") == 0
    return ["transplant", "--concept", "made.safetensors", "--map", "grid.safetensors"]


@pytest.fixture(scope="module")
def graft(place, made):
    "A transplant, chosen on the task."
    with contextlib.chdir(place):
        assert main(*made, "--out", "graft.safetensors", "--task", "task.json", "--damage", ".3") == 0
    return ["--transplant", "graft.safetensors"]


@pytest.fixture
def little(monkeypatch):
    "Evidence asks little beside its task."
    monkeypatch.setattr(arms, "load_task", lambda *a: load_task(*a).take(8))
    monkeypatch.setattr(arms, "prose_damage", partial(prose_damage, passages=1))


@pytest.mark.slow
def test_the_whole_flow(here, capsys):
    graft = ["--transplant", "flow.safetensors"]
    judged = ["--task", "task.json", "--neutral", "short.txt", "--out", "evidence"]
    place = ["--concept", "joy.safetensors", "--map", "map.safetensors", "--out", "flow.safetensors"]
    for argv, keys in (
        (
            ["extract", "--model", "./small", "--pairs", "joy.json", "--out", "joy.safetensors"],
            "auc layers out",
        ),
        (
            [*TO_LARGE, "--corpus", "corpus.txt", "--out", "map.safetensors"],
            "r2 r2_shuffled cosine rows texts",
        ),
        (["transplant", *place, "--task", "task.json", "--damage", ".3"], "layers dose kl damage_budget"),
        (
            ["generate", *graft, "--prompt", "It rained", "--max-new-tokens", "5", "--compare"],
            "prompt text base",
        ),
        (
            ["evaluate", *graft, *judged, "--pairs", "joy.json", "--other", "sad.jsonl", "--random", "3"],
            "report",
        ),
        (["info", "map.safetensors"], "kind format"),
    ):
        outside = argv[0] == "extract"
        code, out, err = (
            run(here, *argv, "--json") if outside else (main(*argv, "--json"), *capsys.readouterr())
        )
        assert code == 0, err
        assert out.count("\n") == 1 and set(keys.split()) <= json.loads(out).keys()
    evidence = json.loads((here / "evidence" / "evidence.json").read_text())
    assert evidence.keys() >= EVIDENCE and set(evidence["arms"]) >= ARMS and evidence["n"] == 12
    arms = [evidence["arms"][name] for name in ARMS]
    assert all(a.keys() >= ARM and a["choice_rate"] is not None for a in arms)
    page = (here / "evidence" / "report.html").read_text()
    assert "data:image/png" in page and "http" not in page and "not run" not in page
    assert "Texts that lie farthest along it" in page


@pytest.mark.slow
def test_strength_zero_is_the_base_model(here, graft, capsys):
    more = ["--prompt", "It rained and", "--strength", "0", "--compare", "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main("generate", *graft, *more, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"] == facts["base"]


@pytest.mark.slow
def test_ladders_of_a_file_of_prompts(here, graft, capsys):
    (here / "starts.txt").write_text("It rained and\nShe said\n")
    climb = ["generate", *graft, "--prompts", "starts.txt", "--strengths", "0,2", "--max-new-tokens", "4"]
    capsys.readouterr()
    assert main(*climb, "--top-p", ".9", "--seed", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [x["prompt"] for x in facts["ladders"]] == ["It rained and", "She said"]
    assert [r["strength"] for r in facts["ladders"][0]["rows"]] == [0, 2]
    assert facts["decoding"]["top_p"] == 0.9 and facts["decoding"]["seed"] == 2
    assert main(*climb) == 0
    assert capsys.readouterr().out.count("It shows at ") == 2


@pytest.mark.slow
def test_words_of_files(here, graft, made, capsys):
    for file, kind in ((graft[1], "mapped"), ("made.safetensors", "layer")):
        capsys.readouterr()
        assert main("info", file, "--words") == 0
        out = capsys.readouterr().out
        assert "nearest: " in out and kind in out and out.startswith(("Transplant(", "Concept("))
        assert ("strength" in out) == ("texts along" in out) == (kind == "mapped")
    assert main("info", "grid.safetensors", "--words") == 2


@pytest.mark.slow
def test_arms_without_input_are_null_with_a_reason(here, graft, little, capsys):
    judged = ["--task", "task.json", "--neutral", "short.txt", "--out", "bare", "--random", "0"]
    capsys.readouterr()
    assert main("evaluate", *graft, *judged, "--json") == 0
    out, err = capsys.readouterr()
    steps = re.findall(r"^evidence (\d+) of (\d+), (\w+)$", err, re.M)
    assert [int(k) for k, *_ in steps] == [*range(1, int(steps[0][1]) + 1)]
    able = [k for k, arm in arms.ARMS.items() if not arm.input]
    assert [x for *_, x in steps] == [*able, *arms.FOLLOWED, "readouts"]
    found = json.loads(out)["arms"]
    for name in ("native", "random", "other_concept"):
        assert found[name]["choice_rate"] is None and found[name]["reason"]
    assert main("info", "bare/evidence.json") == 0
    out = capsys.readouterr().out
    assert out.startswith("Evidence(") and "other_concept not run: " in out and "No effect" in out
    assert main("info", "bare/evidence.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["arms"].keys() == found.keys()


def test_what_a_file_is_can_be_read(here, made, graft, monkeypatch, capsys):
    several = [*made, "--layers", "1:1,2", "--out", "several.safetensors"]
    assert main(*several) == 0
    LayerGrid.load("grid.safetensors")[1, 1].save("single.safetensors")
    (here / "receipt.json").write_text(json.dumps(dict(to="gguf", tolerance=0.01, versions={"torch": "2"})))
    for file, says in (
        ("made.safetensors", "held-out AUC +[0-9., ]+|layers +0, 1, 2, 3|directions +4 x 48|pairs +"),
        ("grid.safetensors", r"held-out R2 +\S+, |rows +\d+|W +2 x 2 x 48 x 48|source +small [(]llama"),
        ("single.safetensors", r"layers +1, 1|held-out R2 +\S+\n"),
        (graft[1], "damage allowed, nats a token +0.3|dose, of the norm +0|steps of the search +[0-9]+\n"),
        ("several.safetensors", r"layer +1\n|further layers +2\n|median norms there +\S+\n"),
        ("receipt.json", r"to +gguf|torch +2\n"),
    ):
        capsys.readouterr()
        assert main("info", file) == 0
        out = capsys.readouterr().out
        for line in says.split("|"):
            assert re.search(f"^  {line}", out, re.M), (line, out)
        assert "{" not in out and "[" not in out.split("\n", 1)[1] and max(map(len, out.splitlines())) < 330
        assert ("Add --words" in out) == (file in ("made.safetensors", graft[1], "several.safetensors"))
        assert main("info", file, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert file == "receipt.json" or {"kind", "format", "package"} <= facts.keys()


@pytest.mark.parametrize("how", [["--dtype", "bfloat16"], ["--device", "cpu"]])
def test_precision_beside_a_file_that_is_only_read_is_refused(here, made, how, capsys):
    capsys.readouterr()
    assert main("info", "made.safetensors", *how) == 2
    assert "go with --words or --model" in capsys.readouterr().err
    assert main("info", "made.safetensors", "--words", *how) == 0


def test_which_tokens_are_read_is_chosen(here, capsys):
    argv = ["extract", "--model", "./small", "--pairs", "joy.json", "--out", "mean.safetensors", "--position"]
    assert main(*argv, "mean") == 0 and Concept.load("mean.safetensors").position == "mean"
    for name in ("all", "first"):
        assert main(*argv, name) == 2
        assert f"--position '{name}' is not one of last, mean." in capsys.readouterr().err


@pytest.mark.slow
def test_precision_and_device_are_options_of_what_reads_a_model(here, capsys):
    how = ["--dtype", "bfloat16", "--device", "cpu"]
    assert main(*EXTRACT, "honesty", *how) == 0
    assert Concept.load("c.safetensors").model.precision == "bfloat16"
    assert main(*EXTRACT, "honesty", "--dtype", "int8") == 1
    assert "use float32, bfloat16 or float16" in capsys.readouterr().err
    assert main("list", *how) == 2


@pytest.mark.slow
def test_an_interrupted_align_goes_on_and_another_corpus_starts_anew(here, monkeypatch):
    texts, reads, real = load_corpus("general").texts, [], moments.paired_tokens
    for name, part in (("one.txt", texts[:400]), ("two.txt", texts[300:700])):
        (here / name).write_text("\n".join(part))

    def counted(source, target, texts, *rest):
        if reads and reads[-1] == "stop":
            raise KeyboardInterrupt
        reads.append(len(texts))
        return real(source, target, texts, *rest)

    def interrupted(*args):
        out = counted(*args)
        reads.append("stop")
        return out

    def align(corpus, out):
        reads.clear()
        return main(*TO_LARGE, "--corpus", corpus, "--out", out)

    monkeypatch.setattr(moments, "paired_tokens", counted)
    assert align("one.txt", "clean.safetensors") == 0
    whole = sum(reads)
    assert whole == 400 and len(reads) > 2
    monkeypatch.setattr(moments, "paired_tokens", interrupted)
    assert align("one.txt", "again.safetensors") == 1 and not (here / "again.safetensors").exists()
    monkeypatch.setattr(moments, "paired_tokens", counted)
    assert len(list(here.glob("again.*.part"))) == 1  # and a run over other texts leaves it alone
    assert align("two.txt", "again.safetensors") == 0 and sum(reads) == 400
    assert LayerGrid.load("again.safetensors").texts_hash == texts_hash(map(text_key, texts[300:700]))
    assert align("one.txt", "again.safetensors") == 0 and 0 < sum(reads) < whole
    clean, again = map(LayerGrid.load, ("clean.safetensors", "again.safetensors"))
    assert (again.texts_hash, again.texts, again.rows) == (clean.texts_hash, clean.texts, clean.rows)
    assert (again.W - clean.W).abs().max() < 1e-4 * clean.W.abs().max()
    assert not list(here.glob("*.part*"))


def test_maps_are_fitted_inside_the_words_of_a_concept(here, capsys):
    argv = [*TO_LARGE, "--corpus", "short.txt", "--out", "inside.safetensors", "--template"]
    assert main(*argv, "{} It was") == 0
    assert LayerGrid.load("inside.safetensors").template == "{} It was"
    assert main(*argv, "It was") == 1 and "template 'It was' has no {}" in capsys.readouterr().err


def test_layers_and_number_of_texts_of_the_maps_are_chosen(here, capsys):
    argv = [*TO_LARGE, "--corpus", "short.txt", "--out", "some.safetensors", "--texts", "50", "--layers"]
    assert main(*argv, "1,2:0") == 0
    grid = LayerGrid.load("some.safetensors")
    assert (grid.source_layers, grid.target_layers, grid.texts) == ((1, 2), (0,), 50)
    assert main(*argv, "1:99") == 1 and "99" in capsys.readouterr().err


@pytest.mark.slow
def test_a_long_step_says_how_long(here, made, monkeypatch, capsys):
    able: dict = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    clock = count(0, 40)  # at least 40 seconds for eight of the 60 texts, twice
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main(*TO_LARGE, "--corpus", "short.txt", "--out", "long.safetensors") == 0
    said = re.search(r"reading the corpus: about (\d+) min, 0.0 GB of memory", capsys.readouterr().err)
    assert said and int(said[1]) >= 10  # a bar looks at the clock too
    assert main(*made, "--out", "long.safetensors", "--task", "task.json") == 0
    said = re.search(r"choosing layers: at least (\d+) min\n", capsys.readouterr().err)
    assert said and int(said[1]) >= 6  # nine times 40 seconds
    able["avx512_bf16"] = True
    assert main(*made, "--out", "long.safetensors", "--task", "task.json") == 0
    assert re.search(r"at least \d+ min \(\d+ with --dtype bfloat16\)\n", capsys.readouterr().err)
    assert main(*made, "--out", "long.safetensors", "--task", "task.json", "--dtype", "float32") == 0
    assert "bfloat16" not in capsys.readouterr().err


def test_a_corpus_may_be_jsonl(here):
    lines = (here / "short.txt").read_text().split("\n")
    (here / "short.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in lines))
    for suffix in ("txt", "jsonl"):
        assert main(*TO_LARGE, "--corpus", f"short.{suffix}", "--out", f"{suffix}.safetensors") == 0
    assert LayerGrid.load("jsonl.safetensors").texts_hash == LayerGrid.load("txt.safetensors").texts_hash


@pytest.mark.parametrize("method", MAP_METHODS)
@pytest.mark.slow
def test_every_map_method_is_a_choice(here, method):
    assert main(*TO_LARGE, "--corpus", "short.txt", "--out", "any.safetensors", "--method", method) == 0
    assert LayerGrid.load("any.safetensors").method == method and not list(here.glob("any.*.part"))


@pytest.mark.slow
def test_a_built_in_task_by_name(here, made, little, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "load_task", lambda *a, **given: load_task(*a, **given).take(12))
    assert main(*made, "--out", "named.safetensors", "--task", "behaviours/brevity") == 0
    tuning = load_task("behaviours/brevity", "tune").take(12).hash
    assert Transplant.load("named.safetensors").notes["tuning"] == tuning
    judged = ["--task", "truthfulness", "--neutral", "short.txt", "--out", "named", "--random", "0"]
    assert main("evaluate", "--transplant", "named.safetensors", *judged, "--json") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["task_hash"] == load_task("truthfulness").take(12).hash
    assert {"mc1", "mc2"} <= facts["arms"]["base"]["score_means"].keys()


def test_every_task_that_the_error_names_is_one(here, made, capsys):
    assert main(*made, "--out", "t.safetensors", "--task", "gravity") == 1
    names = capsys.readouterr().err.split("Built in: ")[1].rstrip(".\n").split(", ")
    assert {"behaviours/honesty", "truthfulness", "emotions/fear"} <= set(names) == set(TASKS)
    assert not {"general", "honesty"} & set(names)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.slow
def test_pairs_with_choices_are_a_task(here, made, kind):
    joy, file = load_pairs("emotions/happiness"), here / f"scenes.{kind}"
    positive, negative = joy.positive[:10], joy.negative[:10]
    if kind == "json":
        file.write_text(json.dumps(dict(pos=positive, neg=negative)))
    if kind == "jsonl":
        rows = [dict(text=t, label=s) for s, side in (("pos", positive), ("neg", negative)) for t in side]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "csv":
        with open(file, "w", newline="") as f:
            csv.writer(f).writerows([("positive", "negative"), *zip(positive, negative, strict=True)])
    choose = ["--task", file, "--choices", "happiness, fear,anger", "--target", "happiness"]
    assert main(*made, "--out", f"{kind}.safetensors", *choose) == 0
    same = choice_task(negative, ["happiness", "fear", "anger"], "happiness")
    assert Transplant.load(f"{kind}.safetensors").notes["tuning"] == same.hash


@pytest.mark.parametrize(
    "task, more, says",
    [
        ("joy.json", [], "--choices"),
        ("sad.jsonl", [], "--choices"),
        ("joy.json", ["--choices", "a,b"], "belong together"),
        ("joy.json", ["--choices", "a,b", "--target", "c"], "not among the choices"),
        ("task.json", ["--choices", "a,b", "--target", "a"], "task.json: "),
    ],
)
def test_pairs_that_are_no_task_say_so(here, made, task, more, says, capsys):
    assert main(*made, "--out", "t.safetensors", "--task", task, *more) == 1
    assert says in capsys.readouterr().err and not Path("t.safetensors").exists()


def test_a_task_beside_layers_is_not_used_and_says_so(here, made, capsys):
    assert main(*made, "--out", "fixed.safetensors", "--task", "task.json", "--layers", "1:2") == 0
    assert "warning: task and pairs are not used" in capsys.readouterr().err
    assert Transplant.load("fixed.safetensors").notes.get("tuning") is None


@pytest.mark.slow
def test_truthfulqa_csv(here, made, little, capsys):
    file = Path(__file__).parents[2] / "shared" / "data" / "TruthfulQA.csv"
    if not file.is_file():
        pytest.skip("TruthfulQA.csv is not beside the project")
    with open(file, encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f))
    for name, part in (("tune.csv", rows[1:7]), ("test.csv", rows[7:17])):
        with open(here / name, "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([rows[0], *part])
    assert main(*made, "--out", "truth.safetensors", "--task", "tune.csv") == 0
    judged = ["--task", "test.csv", "--neutral", "short.txt", "--out", "truth", "--random", "0"]
    assert main("evaluate", "--transplant", "truth.safetensors", *judged, "--json") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["n"] == 10 and {"mc1", "mc2"} <= facts["arms"]["base"]["score_means"].keys()


@pytest.mark.parametrize(
    "out, says",
    [("/proc/nowhere/x", "cannot write"), ("corpus.txt", "File exists"), ("corpus.txt/x", "Not a directory")],
)
def test_an_unwritable_folder_is_found_before_the_work(here, out, says, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "evaluate", lambda *a, **k: pytest.fail("worked first"))
    judged = ["--task", "task.json", "--neutral", "short.txt", "--out", out]
    assert main("evaluate", "--transplant", "none.safetensors", *judged) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_full_disk_is_one_line(here, full_disk, capsys):
    before = set(here.rglob("*"))
    with full_disk(500):
        code = main("extract", "--model", "./small", "--pairs", "joy.json", "--out", "full.safetensors")
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert (code, out) == (1, "") and "File too large" in line
    assert set(here.rglob("*")) == before


@pytest.fixture
def broken(here):
    "Files that nothing can be made of."
    (here / "empty.json").write_text('{"positive": ["a b"], "negative": []}')
    (here / "broken.json").write_text("{")
    (here / "two.txt").write_text("One line.\nTwo lines.\n")
    return here


EXTRACT = ["extract", "--out", "c.safetensors", "--model", "./small", "--pairs"]
ERRORS = [
    (
        ["extract", "--model", "./nowhere", "--pairs", "honesty", "--out", "c.safetensors"],
        "no folder './nowhere'",
    ),
    ([*EXTRACT, "missing.json"], "neither a file nor built in"),
    (
        ["extract", "--model", "./small", "--pairs", "honesty", "--out", "no/such/c.safetensors"],
        "Create it first",
    ),
    ([*EXTRACT, "empty.json"], "negative side is empty"),
    ([*EXTRACT, "broken.json"], "not valid JSON"),
    (["info", "corpus.txt"], "damaged or of another kind"),
    (["info", "nothing.safetensors"], "No such file"),
    (
        ["transplant", "--concept", "corpus.txt", "--map", "corpus.txt", "--out", "t.safetensors"],
        "damaged or of",
    ),
    ([*TO_LARGE, "--corpus", "two.txt", "--out", "m.safetensors"], "too few"),
]


@pytest.mark.parametrize("argv, says", ERRORS)
def test_errors_are_one_line_and_leave_nothing(broken, argv, says, capsys):
    before = set(broken.rglob("*"))
    assert main(*argv, "--json") == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("warning:")]
    error = json.loads(out)
    assert says in line and line == f"concept-transfer {argv[0]}: {error['error']}"
    assert error.keys() == {"error", "kind"} and error["kind"].endswith("Error") and out.count("\n") == 1
    assert set(broken.rglob("*")) == before
    with pytest.raises((ValueError, OSError)):
        main(*argv, "--debug")


@pytest.mark.slow
def test_an_error_as_another_process_sees_it(broken, capsys):
    code, out, err = run(broken, "info", "nothing.safetensors", "--json")
    assert (code, err.count("\n")) == (1, 1) and "Traceback" not in err
    assert json.loads(out)["kind"] == "FileNotFoundError"
    assert main("info", "nothing.safetensors") == 1 and capsys.readouterr().out == ""


ALL = ["align", "--source", "a", "--target", "b", "--corpus", "c", "--out", "d"]
USAGE = [
    ([], "Missing command"),
    (["extrct"], "Did you mean 'extract'"),
    (["generate", "--transplnt", "x", "--prompt", "y"], "--transplant"),
    (["--json", "info", "map.safetensors"], "--json"),
    (["align", "--source", "a"], "--target"),
    ([*ALL, "--method", "magic"], "ridge"),
    ([*ALL, "--layers", "1:x"], "LS,LS:LT,LT"),
    (["list", "colours"], "methods"),
    (["transplant", "--concept", "a", "--map", "b", "--out", "c", "--layers", "deep"], "LS:LT"),
    (["generate", "--transplant", "a"], "--prompt"),
    (["generate", "--transplant", "a", "--prompt", "b", "--prompts", "c"], "--prompts"),
    (["generate", "--transplant", "a", "--prompts", "b", "--compare"], "--compare"),
    (
        ["generate", "--transplant", "a", "--prompt", "b", "--strength", "2", "--strengths", "0,1"],
        "--strength",
    ),
    (["generate", "--transplant", "a", "--prompt", "b", "--strengths", ""], "--strengths"),
    (["transplant", "--concept", "a", "--map", "b", "--out", "c", "--items", "0"], "--items"),
    (["lint", "honesty", "--choices", "a"], "--choices"),
]


@pytest.mark.parametrize("argv, says", USAGE)
def test_usage_errors_exit_with_2(argv, says, capsys):
    assert main(*argv) == 2
    out, err = capsys.readouterr()
    assert says in err and ("--json" in argv or out == "")
    assert main(*argv, *["--json"] * bool(argv)) == 2
    out = capsys.readouterr().out
    assert not argv or says.strip("-") in json.loads(out)["error"]


JUDGE = ["evaluate", "--transplant", "a", "--task", "b", "--neutral", "c", "--out", "d"]
SAY = ["generate", "--transplant", "a", "--prompt", "b"]
PLACE = ["transplant", "--concept", "a", "--map", "b", "--out", "c"]
NUMBERS = [
    (JUDGE, "--seed", "-1"),
    (JUDGE, "--seed", 2**70),
    (JUDGE, "--random", "-1"),
    (["demo", "--out", "d"], "--seed", "-1"),
    (SAY, "--strength", "nan"),
    (SAY, "--strength", "inf"),
    (SAY, "--strength", "1e999"),
    (SAY, "--max-new-tokens", "-3"),
    (SAY, "--strengths", "0,nan"),
    (SAY, "--strengths", "1;2"),
    (SAY, "--temperature", "inf"),
    (PLACE, "--damage", "nan"),
    (PLACE, "--damage", "0"),
    (PLACE, "--damage", "-.1"),
]


@pytest.mark.parametrize(
    "argv",
    [
        [*JUDGE[:3], "--task", "instructions", "--out", "d"],
        ["run", "--pairs", "honesty", "--task", "instructions", "--out", "d"],
        ["lint", "honesty", "--task", "instructions"],
    ],
)
def test_a_task_without_choices_is_refused_before_a_model_is_loaded(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("concept_transfer.models.load_model", lambda *_: pytest.fail("it was loaded"))
    assert main(*argv) == 1
    assert "has no choices" in capsys.readouterr().err


def test_choices_beside_a_built_in_task_are_refused_in_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("lint", "honesty", "--task", "knowledge", "--choices", "a,b", "--target", "a") == 1
    assert "beside a file of pairs" in capsys.readouterr().err


def test_a_template_without_a_place_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("concept_transfer.models.load_model", lambda *_: pytest.fail("it was loaded"))
    argv = ["align", "--source", "a", "--target", "b", "--corpus", "general", "--out", "c"]
    assert main(*argv, "--template", "none") == 1
    assert "template 'none' has no {} for the text" in capsys.readouterr().err


@pytest.mark.parametrize("argv, option, value", NUMBERS)
def test_106_103_numbers_are_refused_at_once(argv, option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(*argv, option, value) == 2
    assert option in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("pair", ["9:9", "0:0"])
def test_layers_without_a_map_are_refused_before_the_model_is_loaded(here, made, pair, monkeypatch, capsys):
    monkeypatch.setattr(LayerGrid.load("grid.safetensors").target.__class__, "load", lambda _: pytest.fail())
    assert main(*made, "--out", "t.safetensors", "--layers", pair) == 1
    assert pair.split(":")[0] in capsys.readouterr().err


INPUTS = [
    (["extract", "--model", "./small", "--pairs", "own.json"], "own.json"),
    (["extract", "--model", "./small", "--pairs", "./own.json"], "../{here}/own.json"),
    (["extract", "--model", "./small", "--pairs", "own.json"], "link.json"),
    (["extract", "--model", "link.json", "--pairs", "honesty"], "own.json"),
    (["extract", "--model", "./small", "--pairs", "honesty"], "small/model.safetensors"),
    ([*TO_LARGE, "--corpus", "own.json"], "own.json"),
    ([*TO_LARGE, "--corpus", "short.txt"], "large/config.json"),
    (["transplant", "--concept", "own.json", "--map", "grid.safetensors"], "own.json"),
    (["transplant", "--concept", "made.safetensors", "--map", "own.json"], "own.json"),
    (["transplant", "--concept", "a", "--map", "b", "--task", "own.json"], "own.json"),
    (["transplant", "--concept", "a", "--map", "b", "--pairs", "own.json"], "own.json"),
    (["play", "--transplant", "its-target-is-small", "--prompts", "short.txt"], "small/config.json"),
]


@pytest.mark.parametrize("argv, out", INPUTS)
def test_46_an_input_is_not_written_over(here, argv, out, capsys):
    (here / "own.json").write_bytes((here / "joy.json").read_bytes())
    (here / "link.json").unlink(missing_ok=True)
    (here / "link.json").symlink_to("own.json")
    out = out.format(here=here.name)
    before = Path(out).read_bytes()
    assert main(*argv, "--out", out) == 1
    assert "--out would write over" in capsys.readouterr().err and Path(out).read_bytes() == before


@pytest.mark.parametrize("name", ["evidence.json", "suite.json"])
def test_46_an_input_in_the_folder_of_a_report_is_not_written_over(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    option = "--pairs" if name == "evidence.json" else "--suite"
    ask = ["evaluate", "--transplant", "t", "--task", "cloze", option, str(tmp_path / name)]
    assert main(*ask, "--out", str(tmp_path)) == 1
    assert f"--out would write over '{tmp_path / name}', which {option} reads" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


@pytest.mark.slow
def test_46_a_folder_named_like_a_set_or_a_model_is_no_input(here):
    (here / "honesty").mkdir()
    for _ in range(2):
        assert main(*EXTRACT, "honesty", "--out", "honesty/c.safetensors") == 0


NAMES = [
    ([*EXTRACT, "honestly"], "honesty"),
    ([*EXTRACT, "emotions/hapiness"], "emotions/happiness"),
    ([*TO_LARGE, "--out", "m.safetensors", "--corpus", "generl"], "general"),
    (
        ["extract", "--out", "c.safetensors", "--pairs", "honesty", "--model", "smolm2-135m-instruct"],
        "smollm2-135m-instruct",
    ),
    (["extract", "--out", "c.safetensors", "--pairs", "honesty", "--model", "gemma3-270m"], "gemma-3-270m"),
]


@pytest.mark.parametrize("argv, meant", NAMES)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(here, argv, meant, capsys):
    assert main(*argv) == 1
    assert f"Did you mean {meant!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task, meant", [("behaviours/honest", "behaviours/honesty"), ("truthfulnes", "truthfulness")]
)
def test_so_is_the_name_of_a_task(here, made, task, meant, capsys):
    assert main(*made, "--out", "t.safetensors", "--task", task) == 1
    assert f"Did you mean {meant!r}" in capsys.readouterr().err


def test_who_interrupts_is_told_what_is_kept(here, graft, made, monkeypatch, capsys):
    def stopped(*args, path=None, **given):
        path = path or KEPT.get()
        if path:
            Path(path).write_text("half")
        raise KeyboardInterrupt

    align = [*TO_LARGE, "--corpus", "short.txt", "--out", "stopped.safetensors"]
    judge = ["evaluate", *graft, "--task", "task.json", "--neutral", "short.txt", "--out", "stopped"]
    for room, name, argv, kept in (
        (maps, "fit_maps", align, "stopped.safetensors."),
        (evidence, "evaluate", judge, "stopped/arms.jsonl"),
        (
            concepts,
            "extract_concept",
            [*EXTRACT, "honesty", "--out", "stopped.joy"],
            "stopped.joy.states.part",
        ),
        (selection, "transplant", [*made, "--out", "stopped.put"], "stopped.put.search.part"),
    ):
        monkeypatch.setattr(room, name, stopped)
        capsys.readouterr()
        assert main(*argv, "--json") == 1
        out, err = capsys.readouterr()
        error = json.loads(out)
        assert error["kind"] == "KeyboardInterrupt" and kept in error["error"] and "goes on" in error["error"]
        assert error["error"] in err and "Traceback" not in err
    for file in here.glob("stopped*.part"):
        file.unlink()


def test_texts_and_errors_cannot_move_the_cursor(here, graft, monkeypatch, capsys):
    hostile = "\x1b[2J\x1b]0;title\x07 \r\b\x9b1m\u202etxet\ud83d plain, é, 語, 😀\tend\n"
    monkeypatch.setattr(Transplant, "generate", lambda *a, **k: hostile)
    assert main("generate", *graft, "--prompt", "It rained") == 0
    out = capsys.readouterr().out
    assert not set(out) & set(hostile[:15] + "\r\b\x9b\u202e\ud83d") - set("[2J]0;title 1m")
    assert r"\x1b[2J" in out and "plain, é, 語, 😀\tend\n" in out

    def failing(*a, **k):
        raise ValueError(hostile)

    monkeypatch.setattr(Transplant, "generate", failing)
    assert main("generate", *graft, "--prompt", "It rained") == 1
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\u202e" not in err and err.count("\n") == 1


def test_a_terminal_that_lacks_letters_gets_their_codes(tmp_path, monkeypatch):
    (tmp_path / "p.json").write_text('{"positive": ["日本"], "negative": ["日本"]}', encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(raw := BytesIO(), "ascii"))
    assert main("lint", str(tmp_path / "p.json")) == 0
    assert rb"e.g. '\u65e5\u672c'" in raw.getvalue()


def test_home_is_a_place_to_write(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert main(*EXTRACT, "honesty", "--out", "~/at_home.safetensors") == 0
    assert Concept.load(here / "at_home.safetensors").name == "honesty"


@pytest.mark.parametrize("name", [*get_command(cli.app).commands])
def test_help_is_plain_and_names_every_option(name, capsys):
    assert main(name, "--help") == 0
    text = capsys.readouterr().out
    assert {"--json", "--debug"} <= set(re.findall(r"--[a-z-]+", text))
    assert text.isascii() and "--no-" not in text and "None" not in text
    assert f"Example:\n    concept-transfer {name}" in text


def test_what_is_built_in_is_listed(capsys):
    assert main("list", "--json") == 0
    there = json.loads(capsys.readouterr().out)
    assert {*there["models"]} == {*EMBEDDED} and {*there["tasks"]} == {*TASKS}
    assert there["methods"].keys() == MAP_METHODS.keys() and there["arms"].keys() == arms.ARMS.keys()
    for name in there["sets"]:
        assert len((load_pairs if name in PAIRS else load_corpus)(name))
    assert main("list", "methods") == 0
    out = capsys.readouterr().out
    assert out.startswith("methods\n  ridge ") and "honesty" not in out


def test_pairs_are_linted(here, capsys):
    rows = [("Good.", "A much, much longer way to say that it is bad.")] * 3
    (here / "uneven.json").write_text(
        json.dumps(dict(zip(("pos", "neg"), zip(*rows, strict=True), strict=True)))
    )
    assert main("lint", "uneven.json", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 3 and any("only 3 pairs" in x for x in found["problems"])
    asked = ["--task", "joy.json", "--choices", "happiness,fear", "--target", "happiness", "--items", "4"]
    assert main("lint", "joy.json", *asked) == 0
    assert "leakage" in capsys.readouterr().out


@pytest.mark.parametrize("file, says", [("made", None), ("grid", None), ("graft", "is a transplant")])
def test_files_are_drawn(here, graft, file, says, capsys):
    code = main("plot", f"{file}.safetensors", "--out", f"{file}.png")
    assert code == bool(says) and (says or "") in capsys.readouterr().err
    assert Path(f"{file}.png").exists() != bool(says)


def test_a_picture_of_an_unknown_kind_is_refused(here, made, capsys):
    assert main("plot", "grid.safetensors", "--out", "grid.doc") == 1
    assert "supported formats" in capsys.readouterr().err and not Path("grid.doc").exists()


HEAVY = "torch transformers nnsight numpy pandas scipy sklearn statsmodels matplotlib seaborn jinja2".split()


def test_help_and_version_wait_for_nothing(place):
    look = "import sys, concept_transfer.cli as c; c.main(sys.argv[1:]); print(sorted(sys.modules))"
    for argv in (["--version"], ["--help"], ["evaluate", "--help"]):
        done = subprocess.run([sys.executable, "-c", look, *argv], capture_output=True, text=True, cwd=place)
        *_, known = done.stdout.splitlines()
        assert not {*HEAVY} & {*ast.literal_eval(known)} and done.stderr == ""
    assert "Commands:" not in done.stdout and "--neutral" in done.stdout


def test_the_version_is_said(capsys):
    assert main("--version") == 0
    assert capsys.readouterr().out == f"concept-transfer {__version__}\n"


@pytest.mark.slow
def test_only_some_items_of_a_task_choose(here, made):
    argv = ["--out", "some.safetensors", "--task", "task.json", "--items", "8", "--damage", ".3"]
    assert main(*made, *argv) == 0
    assert len(Transplant.load("some.safetensors").notes["tuning_items"]) == 8


@pytest.fixture
def demo(tmp_path, monkeypatch, little):
    "The demo on tiny models and less text; what each step worked on."
    tiny = {"smollm2-135m-instruct": tiny_model("qwen2", 0), "gemma-3-270m": tiny_model("gemma3_text", 1)}
    rooms = {"extract_concept": concepts, "fit_maps": maps, "choose": selection, "evaluate": evidence}
    small, steps = arms.Settings, []
    made = {name: getattr(room, name) for name, room in rooms.items()}
    monkeypatch.setattr(models, "load_model", tiny.__getitem__)
    monkeypatch.setattr(cli, "NEIGHBOURS", ("emotions/sadness",))
    monkeypatch.setattr(data, "load_corpus", lambda name: load_corpus(name).take(60))
    monkeypatch.setattr(tasks, "load_task", lambda *a: load_task(*a).take(8))
    quick = dict(random=1, off=(), readouts=(), bootstrap=50, strengths=(0.0, 1.0))
    monkeypatch.setattr(arms, "Settings", lambda **given: small(**given | quick))

    def counted(name):
        def step(*args, **given):
            if name != "extract_concept" or len(args) == 2:  # at some layers: one that stands beside it
                steps.append(name)
            return made[name](*args, **given)

        return step

    for name, room in rooms.items():
        monkeypatch.setattr(room, name, counted(name))

    def go(*argv, command="demo"):
        steps.clear()
        assert main(command, "--out", tmp_path / "demo", *argv) == 0
        return list(steps)

    def settle():
        "From now on the evidence stands for all that would be measured, and is not drawn."
        found = Evidence.load(go.out / "evidence.json")
        made["evaluate"] = lambda *args, **given: found
        monkeypatch.setattr(plots, "figures", lambda e: {})

    go.out, go.patch, go.made, go.settle = tmp_path / "demo", monkeypatch, made, settle
    return go


@pytest.mark.slow
def test_the_demo_is_whole_and_reuses_what_fits(demo):
    assert demo() == ["extract_concept", "fit_maps", "choose", "evaluate"]
    page = (demo.out / "report.html").read_text()
    assert "data:image/png" in page and "at strength 1" in page
    assert not re.search(r"https?://|src=.?[^'\"d ]", page)
    demo.settle()
    first = (demo.out / "report.html").stat()
    assert demo() == [] and (demo.out / "report.html").stat().st_ino == first.st_ino  # written once
    assert demo("--seed", "3") == ["evaluate"]
    assert (demo.out / "report.html").stat().st_ino != first.st_ino
    (demo.out / "transplant.safetensors").write_bytes(b"damaged")
    assert demo("--seed", "3")[:1] == ["choose"]


def test_a_report_that_no_run_wrote_is_left_alone_from_the_start(demo, capsys):
    demo.out.mkdir()
    (demo.out / "report.html").write_text("mine")
    assert main("demo", "--out", demo.out) == 1
    said = capsys.readouterr().err
    assert "report.html was there before" in said and "2/6" not in said


@pytest.mark.slow
def test_the_demo_makes_anew_what_other_maps_texts_or_versions_made(demo):
    demo.made["fit_maps"] = lambda *a, template: fit_maps(*a, template="{} So")
    demo()
    demo.settle()
    demo.made["fit_maps"] = fit_maps
    (demo.out / "map.safetensors").unlink()
    assert demo() == ["fit_maps", "choose", "evaluate"]  # the same texts, inside other words
    neutral = Corpus("neutral", load_corpus("neutral").texts[60:120])
    other = {"neutral": neutral, "general": load_corpus("general").take(60)}
    demo.patch.setattr(data, "load_corpus", other.__getitem__)
    assert demo() == ["choose", "evaluate"]
    demo.patch.setattr(artefacts, "versions", lambda: {"concept_transfer": "0.0.0"})
    assert demo() == ["extract_concept", "fit_maps", "choose", "evaluate"]


def test_a_target_that_the_file_may_not_fetch_is_named_by_hand(here, made, graft, monkeypatch, capsys):
    (here / "away").mkdir(exist_ok=True)
    monkeypatch.chdir(here / "away")
    ask = ["generate", "--transplant", "../graft.safetensors", "--prompt", "Rain", "--max-new-tokens", "3"]
    put = [
        "transplant",
        "--concept",
        "../made.safetensors",
        "--map",
        "../grid.safetensors",
        "--layers",
        "1:1",
    ]
    for argv in (ask, [*put, "--out", "t.safetensors"]):
        assert main(*argv) == 1
        assert "--model" in capsys.readouterr().err
        assert main(*argv, "--model", "../large") == 0


@pytest.mark.slow
def test_one_command_goes_from_pairs_to_a_report(demo, here, capsys):
    asked = ["--pairs", here / "joy.json", "--task", here / "task.json", "--quick", "--random", "1", "--json"]
    demo.patch.setattr(tasks, "load_task", load_task)
    assert demo(*asked, command="run") == ["extract_concept", "fit_maps", "choose", "evaluate"]
    out, err = capsys.readouterr()
    found = json.loads(out)
    tuned = load_fields(Transplant, demo.out / "transplant.safetensors").notes["tuning_items"]
    asked_of = {data.data_hash([i.prompt]) for i in load_task(here / "task.json").items}
    assert found["n"] == 8 and len(tuned) == 4 and {*tuned} < asked_of
    assert "chose layers and dose" not in err and Path(found["report"]).exists()
    assert demo(*asked, command="run") == []
    again = demo(*asked, "--position", "mean", command="run")
    assert again[0] == "extract_concept" and Concept.load(demo.out / "concept.safetensors").position == "mean"


def test_items_of_one_scenario_cannot_choose_and_judge(here, capsys):
    items = json.loads((here / "task.json").read_text())["items"]
    (here / "one.json").write_text(json.dumps(dict(items=[i | dict(group="the same") for i in items])))
    assert main("run", "--pairs", "joy.json", "--task", "one.json", "--out", "one") == 1
    assert "scenarios of their own" in capsys.readouterr().err and not Path("one").exists()


def test_in_a_log_a_bar_is_a_line_now_and_then(here, made, monkeypatch, capsys):
    clock = count(0, 20)
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    show = dict(disable=None, leave=False, mininterval=0, bar_format="{desc} {n}")

    def slow(*args, path):
        path.mkdir()
        for k in tqdm(range(3), desc="outer", **show):
            for _ in tqdm(range(4), desc="inner", **show):
                print(f"line {k}")
        return concept

    concept = Concept.load("made.safetensors")
    monkeypatch.setattr(concepts, "extract_concept", slow)
    capsys.readouterr()
    assert main(*EXTRACT, "honesty", "--out", "slow.safetensors") == 0
    lines = capsys.readouterr().err.splitlines()
    bars = [line for line in lines if re.fullmatch(r"(outer|inner) \d", line)]
    assert [line for line in lines if line.startswith("line")] == [
        f"line {k}" for k in range(3) for _ in range(4)
    ]
    assert len(bars) > 2 and all(line.strip() and "\x1b" not in line for line in lines)


@pytest.mark.parametrize("command", ["generate", "play"])
def test_a_seed_is_of_sampling(here, graft, command, capsys):
    (here / "starts.txt").write_text("It rained and\n")
    argv = [command, *graft, "--prompts", "starts.txt", "--max-new-tokens", "2", "--seed", "3"]
    argv += ["--out", "page.html"] if command == "play" else []
    assert main(*argv) == 2 and "goes with --temperature or --top-p" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_makes_anew_what_other_scenarios_of_its_pairs_made(demo, tmp_path):
    pairs, file = load_pairs("emotions/happiness"), tmp_path / "joy.json"
    rows = [dict(positive=p, negative=n) for p, n in zip(pairs.positive, pairs.negative, strict=True)][:30]

    def go(size):
        file.write_text(json.dumps([r | {"group": f"scene {i // size}"} for i, r in enumerate(rows)]))
        return demo("--pairs", file, "--task", "emotions/happiness", "--quick", command="run")

    assert go(1)[0] == "extract_concept"
    demo.settle()
    assert go(1) == [] and go(3)[0] == "extract_concept"
