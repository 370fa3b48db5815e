"""The command line as another process sees it: files, JSON, exit codes, one-line errors."""
import contextlib, csv, json, os, re, subprocess, sys
from functools import partial
from pathlib import Path
import pytest
from concept_transfer import cli, moments
from concept_transfer.alignment import LayerGrid, fit_maps
from concept_transfer.data import EMOTIONS, Corpus, choice_task, load_corpus, load_pairs, load_task
from concept_transfer.extraction import Concept
from concept_transfer.injection import Transplant
from concept_transfer.models import EMBEDDED, _download, model_info, tiny_model
from concept_transfer.tasks import load_behaviour, load_truthfulness

EVIDENCE = {"transplant", "task", "n", "damage_budget", "layers", "arms", "recovery", "p_value", "versions", "seed"}
ARM = {"dose", "target_rate", "choice_rate", "logit_shift", "ci", "kl", "perplexity_ratio"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with two tiny models, pairs, a corpus and a task."
    d = tmp_path_factory.mktemp("cli")
    for name, family, context in (("small", "llama", "max_position_embeddings"), ("large", "gpt2", "n_positions")):
        m = tiny_model(family, **{context: 512}); m._module.save_pretrained(d / name); m.tokenizer.save_pretrained(d / name)
    joy, sad = (load_pairs(f"emotions/{e}") for e in EMOTIONS[:2])
    (d / "joy.json").write_text(json.dumps({"pos": joy.positive, "neg": joy.negative}))
    (d / "sad.jsonl").write_text("".join(json.dumps({"positive": p, "negative": n}) + "\n" for p, n in zip(sad.positive, sad.negative)))
    (d / "corpus.txt").write_text("\n".join(t for e in EMOTIONS[2:5] for t in load_pairs(f"emotions/{e}").texts))
    (d / "short.txt").write_text("\n".join(load_pairs("emotions/fear").texts[:60]))
    items = [dict(prompt=i.prompt, choices=i.choices, target=i.target, group=i.group) for i in load_task("emotions/happiness").items[:12]]
    (d / "task.json").write_text(json.dumps({"name": "joy", "instruction": "Everybody is happy. ", "items": items}))
    return d

def run(place, *argv):
    done = subprocess.run([os.path.join(os.path.dirname(sys.executable), "concept-transfer"), *map(str, argv)],
                          cwd=place, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def test_the_whole_flow(place):
    for argv in (["extract", "--model", "./small", "--pairs", "joy.json", "--out", "joy.safetensors"],
                 ["align", "--source", "./small", "--target", "./large", "--corpus", "corpus.txt", "--out", "map.safetensors"],
                 ["transplant", "--concept", "joy.safetensors", "--map", "map.safetensors", "--out", "graft.safetensors", "--task", "task.json", "--damage", ".3"],
                 ["generate", "--transplant", "graft.safetensors", "--prompt", "It rained and", "--max-new-tokens", "5", "--compare"],
                 ["evaluate", "--transplant", "graft.safetensors", "--task", "task.json", "--neutral", "short.txt", "--out", "evidence", "--pairs", "joy.json", "--other", "sad.jsonl", "--random", "3"],
                 ["info", "map.safetensors"]):
        code, out, err = run(place, *argv, "--json")
        assert code == 0, err
        facts = json.loads(out); assert isinstance(facts, dict) and out.count("\n") == 1
        if argv[0] == "generate": assert {"prompt", "text", "base", "strength"} <= facts.keys()
    evidence = json.loads((place / "evidence" / "evidence.json").read_text())
    assert EVIDENCE <= evidence.keys() and set(evidence["arms"]) == {"base", "transplanted", "native", "random", "shuffled_map", "other_concept", "prompt"}
    assert all(ARM <= a.keys() and a["choice_rate"] is not None for a in evidence["arms"].values()) and evidence["n"] == 12
    page = (place / "evidence" / "report.html").read_text()
    assert "data:image/png" in page and "http" not in page and "not run" not in page

def test_strength_zero_is_the_base_model(place):
    if not (place / "graft.safetensors").exists(): test_the_whole_flow(place)
    code, out, _ = run(place, "generate", "--transplant", "graft.safetensors", "--prompt", "It rained and", "--strength", "0", "--compare", "--json", "--max-new-tokens", "8")
    facts = json.loads(out); assert code == 0 and facts["text"] == facts["base"]

def test_arms_without_input_are_null_with_a_reason(place):
    if not (place / "graft.safetensors").exists(): test_the_whole_flow(place)
    code, out, err = run(place, "evaluate", "--transplant", "graft.safetensors", "--task", "task.json", "--neutral", "short.txt", "--out", "bare", "--random", "0", "--json")
    arms = json.loads(out)["arms"]; assert code == 0, err
    for name in ("native", "random", "other_concept"): assert arms[name]["choice_rate"] is None and arms[name]["reason"]

@pytest.fixture
def here(place, monkeypatch):
    "The folder as the working directory of this very process."
    monkeypatch.chdir(place); return place

def main(*argv): return cli.main(list(map(str, argv)))

@pytest.fixture(scope="module")
def made(place):
    "A concept of the small model and maps into the large one."
    with contextlib.chdir(place):
        assert main("extract", "--model", "./small", "--pairs", "joy.json", "--out", "made.safetensors") == 0
        assert main("align", "--source", "./small", "--target", "./large", "--corpus", "short.txt", "--out", "grid.safetensors") == 0
    return ["transplant", "--concept", "made.safetensors", "--map", "grid.safetensors"]

def test_an_interrupted_align_goes_on_and_another_corpus_starts_anew(here, monkeypatch):
    texts = load_corpus("general").texts; reads, real = [], moments.paired_states
    for name, part in (("one.txt", texts[:400]), ("two.txt", texts[300:700])): (here / name).write_text("\n".join(part))
    def counted(source, target, texts, *rest):
        if reads and reads[-1] == "stop": raise KeyboardInterrupt
        reads.append(len(texts)); return real(source, target, texts, *rest)
    monkeypatch.setattr(moments, "paired_states", counted)
    def align(corpus, out): reads.clear(); return main("align", "--source", "./small", "--target", "./large", "--corpus", corpus, "--out", out)
    assert align("one.txt", "clean.safetensors") == 0; whole = sum(reads); assert whole == 400 and len(reads) > 2
    def interrupted(*a): out = counted(*a); reads.append("stop"); return out
    monkeypatch.setattr(moments, "paired_states", interrupted); assert align("one.txt", "again.safetensors") == 1 and not (here / "again.safetensors").exists()
    monkeypatch.setattr(moments, "paired_states", counted)
    assert len(list(here.glob("again.*.part"))) == 1                       # and a run over other texts leaves it alone
    assert align("two.txt", "again.safetensors") == 0 and sum(reads) == 400
    assert LayerGrid.load("again.safetensors").data == moments.texts_hash(texts[300:700])
    assert align("one.txt", "again.safetensors") == 0 and 0 < sum(reads) < whole
    clean, again = map(LayerGrid.load, ("clean.safetensors", "again.safetensors"))
    assert (again.data, again.texts, again.rows) == (clean.data, clean.texts, clean.rows) and (again.W - clean.W).abs().max() < 1e-4 * clean.W.abs().max()
    assert not list(here.glob("*.part*"))

def test_a_corpus_may_be_jsonl(here):
    lines = (here / "short.txt").read_text().split("\n")
    (here / "short.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in lines))
    for suffix in ("txt", "jsonl"): assert main("align", "--source", "./small", "--target", "./large", "--corpus", f"short.{suffix}", "--out", f"{suffix}.safetensors") == 0
    assert LayerGrid.load("jsonl.safetensors").data == LayerGrid.load("txt.safetensors").data

def test_a_built_in_task_by_name(here, made, capsys):
    assert main(*made, "--out", "named.safetensors", "--task", "behaviours/brevity") == 0
    assert Transplant.load("named.safetensors").notes["tuning"] == load_behaviour("brevity", "tune").hash
    assert main("evaluate", "--transplant", "named.safetensors", "--task", "truthfulness", "--neutral", "short.txt", "--out", "named", "--random", "0", "--json") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1]); assert facts["task_hash"] == load_truthfulness().hash and {"mc1", "mc2"} <= facts["arms"]["base"]["score_means"].keys()

def test_every_task_that_the_error_names_is_one(here, made, capsys):
    assert main(*made, "--out", "t.safetensors", "--task", "gravity") == 1
    names = capsys.readouterr().err.split("Built in: ")[1].rstrip(".\n").split(", ")
    assert {"behaviours/honesty", "truthfulness", "emotions/fear"} <= set(names) and not {"general", "honesty"} & set(names)
    for name in names: assert len(cli._TASKS[name]("tune"))

@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_pairs_with_choices_are_a_task(here, made, kind):
    joy = load_pairs("emotions/happiness"); negative = joy.negative[:10]; file = here / f"scenes.{kind}"
    if kind == "json": file.write_text(json.dumps(dict(pos=joy.positive[:10], neg=negative)))
    if kind == "jsonl": file.write_text("".join(json.dumps(dict(text=t, label=l)) + "\n" for l, side in (("pos", joy.positive[:10]), ("neg", negative)) for t in side))
    if kind == "csv":
        with open(file, "w", newline="") as f: csv.writer(f).writerows([("positive", "negative"), *zip(joy.positive[:10], negative)])
    assert main(*made, "--out", f"{kind}.safetensors", "--task", file, "--choices", "happiness, fear,anger", "--target", "happiness") == 0
    assert Transplant.load(f"{kind}.safetensors").notes["tuning"] == choice_task(negative, ["happiness", "fear", "anger"], "happiness").hash

@pytest.mark.parametrize("task, more, says", [("joy.json", [], "--choices"), ("sad.jsonl", [], "--choices"), ("joy.json", ["--choices", "a,b"], "belong together"),
                                              ("joy.json", ["--choices", "a,b", "--target", "c"], "not among the choices"), ("task.json", ["--choices", "a,b", "--target", "a"], "positive")])
def test_pairs_that_are_no_task_say_so(here, made, task, more, says, capsys):
    assert main(*made, "--out", "t.safetensors", "--task", task, *more) == 1 and says in capsys.readouterr().err and not Path("t.safetensors").exists()

def test_a_task_beside_layers_is_not_used_and_says_so(here, made, capsys):
    assert main(*made, "--out", "fixed.safetensors", "--task", "task.json", "--layers", "1:2") == 0
    assert "warning: --task is not used" in capsys.readouterr().err and Transplant.load("fixed.safetensors").notes.get("tuning") is None

def test_truthfulqa_csv(here, made, capsys):
    file = Path(__file__).parents[2] / "shared" / "data" / "TruthfulQA.csv"
    if not file.is_file(): pytest.skip("TruthfulQA.csv is not beside the project")
    with open(file, encoding="utf-8", newline="") as f: rows = list(csv.reader(f))
    for name, part in (("tune.csv", rows[1:11]), ("test.csv", rows[11:31])):
        with open(here / name, "w", encoding="utf-8", newline="") as f: csv.writer(f).writerows([rows[0], *part])
    assert main(*made, "--out", "truth.safetensors", "--task", "tune.csv") == 0
    assert main("evaluate", "--transplant", "truth.safetensors", "--task", "test.csv", "--neutral", "short.txt", "--out", "truth", "--random", "0", "--json") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1]); assert facts["n"] == 20 and {"mc1", "mc2"} <= facts["arms"]["base"]["score_means"].keys()

@pytest.mark.parametrize("out, says", [("/proc/nowhere/x", "cannot write"), ("corpus.txt", "is a file"), ("corpus.txt/x", "is a file")])
def test_an_unwritable_folder_is_found_before_the_work(here, out, says, capsys, monkeypatch):
    monkeypatch.setattr(cli, "evaluate", lambda *a, **k: pytest.fail("worked first"))
    assert main("evaluate", "--transplant", "none.safetensors", "--task", "task.json", "--neutral", "corpus.txt", "--out", out) == 1
    err = capsys.readouterr().err; assert says in err and err.count("\n") == 1

def test_a_full_disk_is_one_line(place):
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
from concept_transfer.cli import main
sys.exit(main(sys.argv[1:]))
"""
    argv = ["extract", "--model", "./small", "--pairs", "joy.json", "--out", "full.safetensors"]; before = set(place.rglob("*"))
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=place, capture_output=True, text=True)
    lines = [l for l in done.stderr.splitlines() if not l.startswith("warning:")]
    assert done.returncode == 1 and len(lines) == 1 and "File too large" in lines[0] and done.stdout == ""
    assert set(place.rglob("*")) == before

@pytest.mark.parametrize("argv, says", [
    (["extract", "--model", "./nowhere", "--pairs", "honesty", "--out", "c.safetensors"], "no folder './nowhere'"),
    (["extract", "--model", "./small", "--pairs", "missing.json", "--out", "c.safetensors"], "neither a file nor a built-in set"),
    (["extract", "--model", "./small", "--pairs", "honesty", "--out", "no/such/c.safetensors"], "Create it first"),
    (["extract", "--model", "./small", "--pairs", "empty.json", "--out", "c.safetensors"], "negative side is empty"),
    (["extract", "--model", "./small", "--pairs", "broken.json", "--out", "c.safetensors"], "not valid JSON"),
    (["info", "corpus.txt"], "damaged or of another kind"),
    (["info", "nothing.safetensors"], "no file"),
    (["transplant", "--concept", "corpus.txt", "--map", "corpus.txt", "--out", "t.safetensors"], "damaged or of another kind"),
    (["align", "--source", "./small", "--target", "./large", "--corpus", "two.txt", "--out", "m.safetensors"], "too few"),
])
def test_errors_are_one_line_and_leave_nothing(place, argv, says):
    (place / "empty.json").write_text('{"positive": ["a b"], "negative": []}'); (place / "broken.json").write_text("{"); (place / "two.txt").write_text("One line.\nTwo lines.\n")
    before = set(place.rglob("*")); code, out, err = run(place, *argv, "--json")
    lines = [l for l in err.splitlines() if not l.startswith("warning:")]
    assert code == 1 and out == "" and len(lines) == 1 and says in err and "Traceback" not in err
    assert set(place.rglob("*")) == before
    assert "Traceback" in run(place, *argv, "--debug")[2]

@pytest.mark.parametrize("argv", [[], ["fly"], ["align", "--source", "a"], ["align", "--source", "a", "--target", "b", "--corpus", "c", "--out", "d", "--method", "magic"],
                                  ["transplant", "--concept", "a", "--map", "b", "--out", "c", "--layers", "deep"]])
def test_usage_errors_exit_with_2(place, argv): assert run(place, *argv)[0] == 2


@pytest.fixture
def demo(tmp_path, monkeypatch):
    "The demo on tiny models and less text; what each step worked on."
    tiny = {"smollm2-135m-instruct": tiny_model("qwen2", 0), "gemma-3-270m": tiny_model("gemma3_text", 1)}; steps = []
    monkeypatch.setattr(cli, "load_model", tiny.__getitem__); monkeypatch.setattr(cli, "load_corpus", lambda name: load_corpus(name).take(60))
    monkeypatch.setattr(cli, "load_task", lambda *a: load_task(*a).take(8)); monkeypatch.setattr(cli, "evaluate", partial(cli.evaluate, random=1, off=(), draws=50, strengths=(0., 1.)))
    for f in ("extract_concept", "fit_maps", "choose", "evaluate"):
        monkeypatch.setattr(cli, f, (lambda f, real: lambda *a, **k: steps.append(f) or real(*a, **k))(f, getattr(cli, f)))
    def go(*argv): steps.clear(); assert main("demo", "--out", tmp_path / "demo", *argv) == 0; return list(steps)
    go.out, go.tiny, go.patch = tmp_path / "demo", tiny, monkeypatch; return go

def test_the_demo_is_whole_and_reuses_what_fits(demo):
    assert demo() == ["extract_concept", "fit_maps", "choose", "evaluate"]
    page = (demo.out / "report.html").read_text(); assert "data:image/png" in page and not re.search(r"https?://|src=.?[^'\"d ]", page) and "at strength 1" in page
    assert demo() == [] and (demo.out / "report.html").exists()
    assert demo("--seed", "3") == ["evaluate"]
    (demo.out / "transplant.safetensors").write_bytes(b"damaged"); assert demo("--seed", "3")[:1] == ["choose"]

def test_the_demo_makes_anew_what_other_maps_texts_or_versions_made(demo):
    with demo.patch.context() as m:
        m.setattr(cli, "fit_maps", lambda *a, template: fit_maps(*a, template="{} So")); demo()
    (demo.out / "map.safetensors").unlink(); assert demo() == ["fit_maps", "choose", "evaluate"]       # the same texts, inside other words
    neutral = load_corpus("neutral").texts[60:120]
    demo.patch.setattr(cli, "load_corpus", lambda name: Corpus(name, neutral) if name == "neutral" else load_corpus(name).take(60)); assert demo() == ["choose", "evaluate"]
    demo.patch.setattr(cli, "package_version", lambda: "0.0.0"); assert demo() == ["extract_concept", "fit_maps", "choose", "evaluate"]

def test_a_gguf_file_of_the_users_own(tmp_path, smol, monkeypatch):
    file = _download(EMBEDDED["smollm2-135m-instruct"], tmp_path).rename(tmp_path / "mine.gguf")
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache")); monkeypatch.chdir(tmp_path)
    pairs = load_pairs("honesty"); (tmp_path / "few.json").write_text(json.dumps(dict(positive=pairs.positive[:8], negative=pairs.negative[:8])))
    assert main("extract", "--model", file, "--pairs", "few.json", "--out", "c.safetensors") == 0
    assert Concept.load("c.safetensors").model.weights == model_info(smol).weights
