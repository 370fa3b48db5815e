"Verdicts on targets whose change is planted, and maps brought to a changed target by little text."

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_transfer.cli import main
from concept_transfer.concepts import activations
from concept_transfer.data import Corpus, load_corpus
from concept_transfer.drift import Drift, adopt, check, refit
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, model_info, tiny_model, twin, wrap
from concept_transfer.pairing import paired_states
from concept_transfer.steering import Transplant

GENERAL = load_corpus("general").texts
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:32])


def changed(model, change):
    "A copy of a model after a change of its module."
    module = copy.deepcopy(model._module)
    change(module)
    return wrap(module, model.tokenizer, "changed")


@torch.no_grad()
def shake(module, share):
    "Noise on all weights, with this share of their norm."
    torch.manual_seed(0)
    for w in module.parameters():
        w += share * w.norm() / w.numel() ** 0.5 * torch.randn_like(w)


@torch.no_grad()
def enlarge(module, by=2.0):
    "All that is written to the residual stream, times a number; norms take it back before it is read."
    for name, w in module.named_parameters():
        if any(k in name for k in ("embed_tokens", "o_proj", "down_proj")):
            w *= by


def train(module, model, steps):
    "Some steps of language modelling on general sentences."
    module.requires_grad_(True)
    optimiser = torch.optim.AdamW(module.parameters(), 1e-3)
    for text in GENERAL[400 : 400 + steps]:
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        optimiser.zero_grad()
        module(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    module.requires_grad_(False)


@pytest.fixture(scope="module")
def given():
    "Source, target, map and a transplant of a direction that the map carried, dosed on `NEUTRAL`."
    source = tiny_model("llama")
    target, _ = twin(source)
    map = fit_maps(source, target, Corpus("some", GENERAL[:100]), [2], [2])[2, 2]
    v = activations(source, GENERAL[100:102], [2])[:, 0].diff(dim=0)[0]
    bench = Bench(target, 2, neutral=NEUTRAL)
    t = bench.at_damage(replace(bench.place(v @ map.W), source=map.source, source_layer=2))
    return source, target, map, t


@pytest.fixture(scope="module")
def descendants(given):
    target = given[1]
    return {
        "shaken": changed(target, lambda m: shake(m, 0.005)),
        "larger": changed(target, enlarge),
        "trained": changed(target, lambda m: train(m, target, 200)),
        "turned": twin(target, seed=1)[0],
        "random": tiny_model("llama", 1),
    }


@pytest.fixture(scope="module")
def kept(given, tmp_path_factory):
    "The file of a transplant."
    file = tmp_path_factory.mktemp("drift") / "kept.safetensors"
    given[3].save(file)
    return file


VERDICTS = dict(shaken="valid", larger="re-dose", trained="re-fit", turned="re-fit", random="refuse")


@pytest.mark.slow
@pytest.mark.parametrize("name", VERDICTS)
def test_a_planted_change_is_found_and_a_file_will_do(given, descendants, kept, name):
    source, target, map, _ = given
    found = check(kept, descendants[name], target, map, source, NEUTRAL)
    assert found.verdict == VERDICTS[name], found
    assert found.numbers.keys() == {"weights", "answers", "norm", "kl", "r2", "effect"}
    for k in ("r2", "effect", "answers"):
        kept, low, high = found.numbers[k]
        assert low <= kept + 1e-6 and kept - 1e-6 <= high


def test_an_unchanged_target_is_valid_and_nothing_is_read(given, monkeypatch):
    _, target, _, t = given
    monkeypatch.setattr("concept_transfer.measure.encode", None)
    found = check(t, target)
    assert (found.verdict, found.numbers) == ("valid", {})


@pytest.mark.slow
def test_without_the_old_target_the_map_and_the_notes_stand_in(given, descendants):
    source, _, map, t = given
    for name, want in VERDICTS.items():
        if name != "turned":  # without the old answers nothing tells it from a random model
            assert check(t, descendants[name], map=map, source=source, neutral=NEUTRAL).verdict == want
    assert check(t, descendants["turned"], map=map, source=source, neutral=NEUTRAL).verdict == "refuse"


def test_what_was_not_seen_is_said_and_not_adopted(given, descendants):
    *_, t = given
    found = check(t, descendants["shaken"], neutral=NEUTRAL)
    assert found.verdict == "valid" and "not seen" in found.reasons[-1]  # and no advice that adopt refuses
    with pytest.raises(ValueError, match="not adopted.*not seen"):
        adopt(t, descendants["shaken"], neutral=NEUTRAL)


def test_a_transplant_without_a_noted_damage_is_judged_by_the_norm(given, descendants):
    *_, t = given
    bare = replace(t, notes={})
    found = check(bare, descendants["larger"], neutral=NEUTRAL)
    assert found.verdict == "re-dose" and "kl" not in found.numbers
    assert check(bare, descendants["shaken"], neutral=NEUTRAL).verdict == "valid"


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(family="gpt2"), "family llama became gpt2"),
        (dict(hidden_size=96), "width 48 became 96"),
        (dict(num_hidden_layers=2), "layers 4 became 2"),
        (dict(family="qwen2"), "family llama became qwen2"),
    ],
    ids=str,
)
def test_another_model_is_refused_before_anything_is_read(given, monkeypatch, other, said):
    *_, t = given
    new = tiny_model(**other)
    monkeypatch.setattr("concept_transfer.measure.encode", None)
    found = check(t, new)
    assert found.verdict == "refuse" and said in found.reasons
    with pytest.raises(ValueError, match="not adopted.*refuse"):
        adopt(t, new)


# adopting


def test_a_descendant_that_holds_is_adopted_with_its_dose(given, descendants, kept, tmp_path):
    source, _, map, t = given
    new = descendants["shaken"]
    a = adopt(kept, new, map=map, source=source, neutral=NEUTRAL)
    assert (a.dose, a.norm, a.layer) == (t.dose, t.norm, t.layer) and a.target == model_info(new)
    (said,) = a.notes["descends"]
    assert said["verdict"] == "valid" and str(t.target) == said["from"] and "r2" in said["numbers"]
    a.save(tmp_path / "a.safetensors")
    back = Transplant.load(tmp_path / "a.safetensors", new)
    assert back.notes == a.notes
    with back(1.0):
        pass
    with pytest.raises(ValueError, match="belongs to"):
        Transplant.load(tmp_path / "a.safetensors", given[1])


@pytest.mark.slow
def test_descent_is_told_generation_by_generation(given, descendants, kept):
    _, target, _, _ = given
    a = adopt(kept, descendants["shaken"], target, neutral=NEUTRAL)
    next_one = changed(target, lambda m: shake(m, 0.006))
    b = adopt(a, next_one, descendants["shaken"], neutral=NEUTRAL)
    assert [x["from"] for x in b.notes["descends"]] == [str(given[3].target), str(a.target)]
    with pytest.raises(ValueError, match="belongs to"):
        adopt(a, next_one, target, neutral=NEUTRAL)


def test_a_larger_stream_gets_its_damage_back(given, descendants):
    _, target, _, t = given
    a = adopt(t, descendants["larger"], target, neutral=NEUTRAL)
    assert a.norm == pytest.approx(2 * t.norm, rel=0.01)
    assert a.dose == pytest.approx(t.dose, rel=0.1)
    assert a.notes["kl"] == pytest.approx(t.notes["kl"], rel=0.5)
    assert a.notes["descends"][0]["verdict"] == "re-dose"


# refitting


@pytest.mark.slow
def test_little_text_goes_further_from_the_old_map():
    "In states as wide as the rows are many, the old map is worth much."
    source = tiny_model("llama", hidden_size=192)
    target, _ = twin(source)
    map = fit_maps(source, target, Corpus("some", GENERAL[:200]), [2], [2])[2, 2]
    new = changed(target, lambda m: train(m, target, 30))
    X, Y, _ = (A[:, 0] if A.ndim > 1 else A for A in paired_states(source, new, GENERAL[1000:1060], [2], [2]))

    def r2(map):
        sd = Y.std(0)
        return 1 - float(((Y - map(X)) / sd).square().sum() / ((Y - Y.mean(0)) / sd).square().sum())

    found = {}
    for n in (10, 25):
        texts = Corpus("few", GENERAL[300 : 300 + n])
        few, fresh = refit(map, source, new, texts), fit_maps(source, new, texts, [2], [2])[2, 2]
        found[n] = r2(few), r2(fresh)
    assert found[10][0] > max(found[10][1], r2(map)) + 0.05
    assert found[25][0] > found[25][1]
    assert few.r2 == pytest.approx(r2(few), abs=0.1)
    assert few.target == model_info(new) and few.notes["texts"] == 25 and few.notes["method"] == "refit"
    assert few.notes["refitted_from"] == map.notes


def test_a_map_of_an_unchanged_target_stays_what_it_is(given, tmp_path):
    source, target, map, _ = given
    again = refit(map, source, target, Corpus("few", GENERAL[300:312]))
    assert torch.allclose(again.W, map.W, atol=1e-3) and again.r2 > 0.999
    again.save(tmp_path / "map.safetensors")
    assert type(map).load(tmp_path / "map.safetensors").notes == again.notes


# wrong inputs


def test_what_does_not_belong_together_is_refused(given, descendants):
    source, target, map, t = given
    new = descendants["shaken"]
    for wrong, said in [
        (dict(map=map), "both, map and source"),
        (dict(source=source), "both, map and source"),
        (dict(map=map, source=target), "source side"),
        (dict(map=replace(map, layers=(2, 1)), source=source), "ends at layer 1"),
        (dict(map=replace(map, layers=(1, 2)), source=source), "starts at layer 1, the transplant at 2"),
        (dict(old_target=new), "belongs to"),
        (dict(old_target="target"), "'old_target'"),
        (dict(neutral=["a"]), "'neutral'"),
    ]:
        with pytest.raises(ValueError, match=said):
            check(t, new, **wrong)


def test_a_refit_says_what_it_needs(given, descendants):
    source, target, map, _ = given
    few = Corpus("few", GENERAL[:12])
    for nine in (GENERAL[:9], GENERAL[:9] * 2):  # a text that stands twice would judge itself
        with pytest.raises(ValueError, match="9 texts are too few"):
            refit(map, source, target, Corpus("nine", nine))
    with pytest.raises(ValueError, match="'corpus'"):
        refit(map, source, target, GENERAL[:12])
    with pytest.raises(ValueError, match="source side"):
        refit(map, target, target, few)
    with pytest.raises(ValueError, match="width 48 became 96.*fit_maps"):
        refit(map, source, tiny_model("llama", hidden_size=96), few)


@pytest.mark.slow
def test_damage_on_other_text_is_not_compared(given, descendants):
    "A transplant says which text set its dose; with another one the norm stands in."
    source, target, map, t = given
    noted = replace(t, notes=t.notes | {"neutral": NEUTRAL.hash})
    other, new = Corpus("other", GENERAL[:16]), descendants["larger"]
    assert "kl" in check(noted, new, neutral=NEUTRAL).numbers
    found = check(noted, new, neutral=other)
    assert "kl" not in found.numbers and found.verdict == "re-dose"
    assert "kl" in check(noted, new, target, neutral=other).numbers  # measured both times
    assert adopt(noted, new, target, neutral=other).notes["neutral"] == other.hash


def test_a_missing_file_is_named(descendants):
    with pytest.raises(FileNotFoundError):
        check("nothing.safetensors", descendants["shaken"])


def test_what_a_drift_shows(given, descendants):
    source, target, map, t = given
    found = check(t, descendants["trained"], target, map, source, NEUTRAL)
    assert repr(found).startswith("Drift(re-fit: its weights agree by ")
    page = found._repr_html_()
    assert "Drift: re-fit" in page and all(x in page for x in found.reasons)
    assert "Drift: refuse" in Drift("refuse", ("width",), {})._repr_html_()
    assert np.isfinite(sum(found.numbers.values(), ())).all()


# from a shell


@pytest.fixture(scope="module")
def shell(given, descendants, tmp_path_factory):
    "A folder with models, map and transplants."
    source, target, map, t = given
    folder = tmp_path_factory.mktemp("shell")
    for name, model in dict(source=source, old=target, new=descendants["trained"]).items():
        model._module.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    descendants["larger"]._module.save_pretrained(folder / "larger")
    target.tokenizer.save_pretrained(folder / "larger")
    map.save(folder / "map")
    t.save(folder / "t")
    (folder / "neutral.txt").write_text("\n".join(NEUTRAL.texts))
    return folder


@pytest.mark.parametrize(
    "argv, verdict, seen",
    [
        ("--transplant t --target old", "valid", set()),
        ("--transplant t --target new --old old", "re-fit", {"weights", "norm", "kl", "effect", "answers"}),
        ("--transplant t --target new --map map --source source", "re-fit", {"weights", "norm", "kl", "r2"}),
        ("--transplant t --target source", "refuse", {"weights", "norm", "kl"}),
        ("--transplant t --target new --neutral neutral.txt", "re-dose", {"weights", "norm", "kl"}),
    ],
)
def test_check_says_its_verdict_and_fails_only_where_there_is_none(
    shell, monkeypatch, capsys, argv, verdict, seen
):
    monkeypatch.chdir(shell)
    assert main(["check", *argv.split(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {"verdict", "reasons", "numbers"}
    assert said["verdict"] == verdict and said["numbers"].keys() == seen


@pytest.mark.parametrize(
    "argv, code, said",
    [
        ("--transplant map --target new", 1, "map"),
        ("--transplant t --target new --map t --source source", 1, "t"),
        ("--transplant t --target new --source source", 1, "both, map and source"),
        ("--transplant t", 2, "--target"),
    ],
)
def test_a_check_that_cannot_be_made_says_why(shell, monkeypatch, capsys, argv, code, said):
    monkeypatch.chdir(shell)
    assert main(["check", *argv.split()]) == code
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_descendant_is_adopted_from_a_shell(shell, monkeypatch, capsys):
    monkeypatch.chdir(shell)
    argv = "adopt --transplant t --target larger --old old --neutral neutral.txt --out adopted --json".split()
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["target"] == "larger" and said["descends"][0]["verdict"] == "re-dose"
    adopted = Transplant.load("adopted", load_model("./larger"))
    assert adopted.dose == said["dose"] and adopted.notes["neutral"] == NEUTRAL.hash
    with adopted(1.0):
        pass


def test_what_does_not_hold_is_not_adopted_from_a_shell(shell, monkeypatch, capsys):
    monkeypatch.chdir(shell)
    known = "--map map --source source".split()
    assert main(["adopt", "--transplant", "t", "--target", "new", *known, "--out", "none", "--json"]) == 1
    assert "is not adopted: Drift(re-fit" in json.loads(capsys.readouterr().out)["error"]
    assert main("adopt --transplant t --target new --out t".split()) == 1
    assert "would write over" in capsys.readouterr().err and not (shell / "none").exists()
