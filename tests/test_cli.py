"""The command line as another process sees it: files, JSON, exit codes, one-line errors."""
import json, os, subprocess, sys
import pytest
from concept_transfer.data import EMOTIONS, load_pairs, load_task
from concept_transfer.models import tiny_model

EVIDENCE = {"transplant", "task", "n", "damage_budget", "layers", "arms", "recovery", "p_value", "versions", "seed"}
ARM = {"dose", "target_rate", "choice_rate", "logit_shift", "ci", "kl", "perplexity_ratio"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with two tiny models, pairs, a corpus and a task."
    d = tmp_path_factory.mktemp("cli")
    for name, family in (("small", "llama"), ("large", "gpt2")):
        m = tiny_model(family); m._module.save_pretrained(d / name); m.tokenizer.save_pretrained(d / name)
    joy, sad = (load_pairs(f"emotions/{e}") for e in EMOTIONS[:2])
    (d / "joy.json").write_text(json.dumps({"pos": joy.positive, "neg": joy.negative}))
    (d / "sad.jsonl").write_text("".join(json.dumps({"positive": p, "negative": n}) + "\n" for p, n in zip(sad.positive, sad.negative)))
    (d / "corpus.txt").write_text("\n".join(t for e in EMOTIONS[2:5] for t in load_pairs(f"emotions/{e}").texts))
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
                 ["evaluate", "--transplant", "graft.safetensors", "--task", "task.json", "--neutral", "corpus.txt", "--out", "evidence", "--pairs", "joy.json", "--other", "sad.jsonl", "--random", "3"],
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
    code, out, err = run(place, "evaluate", "--transplant", "graft.safetensors", "--task", "task.json", "--neutral", "corpus.txt", "--out", "bare", "--random", "0", "--json")
    arms = json.loads(out)["arms"]; assert code == 0, err
    for name in ("native", "random", "other_concept"): assert arms[name]["choice_rate"] is None and arms[name]["reason"]

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
