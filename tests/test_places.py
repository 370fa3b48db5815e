"Several directions at several layers under one dose, from the search to every way out."

import copy
import json
from contextlib import ExitStack
from dataclasses import replace

import fuzz
import numpy as np
import pytest
import torch

from concept_transfer.arms import ARMS, Settings
from concept_transfer.artefacts import fingerprint, load_artefact
from concept_transfer.cli import main
from concept_transfer.concepts import extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.drift import adopt, check
from concept_transfer.engine import encode, engine, pad
from concept_transfer.evidence import evaluate
from concept_transfer.export import export, import_vector
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, tiny_model, twin, wrap
from concept_transfer.selection import choose, transplant
from concept_transfer.steering import Transplant, generate, joined, place
from concept_transfer.tasks import load_task
from concept_transfer.toys import planted_module
from concept_transfer.uselog import used
from concept_transfer.views import layer_scores, together
from concept_transfer.vllm_plugin import SERVED, deltas, served, wanted

PAIRS = load_pairs("emotions/happiness")
SCENES = Corpus("scenes", [x for e in ("sadness", "fear") for x in load_pairs(f"emotions/{e}").texts])
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:16])
TASK = load_task("emotions/happiness", "tune").take(8)
PROMPTS = ["The cat sat on the mat and", "Rain"]


@pytest.fixture(scope="module")
def given():
    "A concept, maps, and their target, a twin."
    source = load_model(*planted_module())
    target, _ = twin(source)
    maps = fit_maps(source, target, SCENES, [1, 2], [0, 1, 2], template=PAIRS.template)
    return extract_concept(source, PAIRS, [0, 1, 2]), maps, target


def three(m, **how):
    "A transplant at three layers, and each of its places alone."
    g = torch.Generator().manual_seed(0)
    some = [place(torch.randn(48, generator=g), m, k, dose=0.5, name="joy", **how) for k in (1, 2, 3)]
    return joined(some[::-1]), some


@pytest.fixture(scope="module")
def llama():
    return three(tiny_model("llama"))


def logits(m, texts=PROMPTS):
    return engine(m).logits(*pad(m, encode(m, texts), left=True), 3)


@pytest.mark.parametrize("positions", ["all", "last", lambda h, mask: mask.cumsum(1)[:, -h.shape[1] :] > 1])
def test_several_places_are_nested_contexts(positions):
    t, some = three(tiny_model("llama"), positions=positions)
    with ExitStack() as opened:
        for p in some:
            opened.enter_context(p([0.5, -1.0]))
        want = logits(t.model), generate(t.model, PROMPTS, 5)
    with t([0.5, -1.0]):
        assert torch.equal(logits(t.model), want[0]) and generate(t.model, PROMPTS, 5) == want[1]
    with ExitStack() as opened:
        for p in some:
            opened.enter_context(p(alpha=2.0))
        want = logits(t.model)
    with t(alpha=2.0):
        assert torch.equal(logits(t.model), want)


def test_places_come_apart_and_together(llama):
    t, some = llama
    assert t.layers == [None, [1, 2, 3]] and "[1, 2, 3], dose 0.5" in repr(t)
    assert "layer 1, 2, 3" in t._repr_html_() and some[0].places == [some[0]]
    for p, q in zip(t.places, some, strict=True):
        assert p.layers == q.layers and torch.equal(p.vector(-2), q.vector(-2)) and p.deeper is None
    assert joined(some[:1]).layers == [None, 1] and joined([joined(some[1:]), some[0]]).layers == t.layers
    for wrong, said in (
        ([], "'transplants'"),
        ([some[0], some[0]], "give each once"),
        ([some[0], replace(some[1], positions="last")], "different positions"),
        ([some[0], replace(some[1], dose=0.1)], "different dose, 0.5 and 0.1"),
        ([some[0], replace(some[1], source=some[1].target)], "different source"),
        ([some[0], place(torch.ones(48), tiny_model("gpt2"), 2)], "belongs to"),
    ):
        with pytest.raises(ValueError, match=said):
            joined(wrong)
    for wrong in (
        dict(deeper=(3, 2)),
        dict(deeper=(2, 9)),
        dict(deeper=(2,)),
        dict(deeper_norms=None),
        dict(deeper_norms=(1.0, 0.0)),
        dict(deeper_directions=torch.zeros(2, 48)),
        dict(deeper_directions=torch.ones(2, 47)),
        dict(deeper_sources=(1,)),
    ):
        with pytest.raises(ValueError, match="deeper|layers"):
            replace(t, **wrong)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_bench_asks_several_places_as_contexts_do(positions):
    "Answers and damage are those of texts read from the start, also where something is open, and remotely."
    t, some = three(tiny_model("llama"), positions=positions)
    m, bench = t.model, Bench(t.model, 1, TASK.take(3), NEUTRAL)
    hurt, found = bench.hurt([None, t]), bench.ask(t)
    assert hurt[0].mean == 0 < hurt[1].mean
    far = Bench(load_model(m, remote="local"), 1, bench.task, NEUTRAL)
    np.testing.assert_allclose(far.hurt(t).kl, hurt[1].kl, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(far.ask(t).margin, found.margin, atol=1e-3)
    assert replace(t, model=far.model).generate(PROMPTS, 1.0, 4) == t.generate(PROMPTS, 1.0, 4)
    if positions == "all":
        base = [logits(m, [x])[0].log_softmax(-1) for x in bench.hurt.texts]
        with t():
            moved = [logits(m, [x])[0].log_softmax(-1) for x in bench.hurt.texts]
        want = [(p.exp() * (p - q)).sum(-1) for p, q in zip(base, moved, strict=True)]
        np.testing.assert_allclose(hurt[1].kl[:, 2:], torch.stack(want)[:, :2], rtol=1e-3, atol=1e-5)
    with some[2]():
        read = bench.hurt.run.read
        _, both = bench.hurt([None, joined(some[:2])])
        assert bench.hurt.run.read - read == 3 * len(bench.hurt.texts)  # the base too, and once
    assert not np.allclose(both.kl, hurt[1].kl)
    with pytest.raises(ValueError, match="stands at layer 1, this bench at layer 2"):
        Bench(m, 2, None, NEUTRAL).hurt(t)


@pytest.mark.slow
def test_the_twin_gets_all_of_the_native_effect_at_several_layers(given):
    joy, maps, target = given
    t = transplant(joy, maps, target, layers=(2, [2, 1]), damage=0.3, neutral=NEUTRAL)
    assert t.layers == [2, [1, 2]] and t.deeper_shuffled.shape == (1, 48)
    assert 0.2 < t.notes["kl"] < 0.45 and t.notes["damage_budget"] == 0.3
    arms = {k: ARMS[k] for k in ("base", "transplanted", "shuffled_map", "random", "covariance", "permuted")}
    arms |= {k: ARMS[k] for k in ("unembedding", "gradient", "unembedding_mapped", "nearest_concept")}
    source, other = load_model(*planted_module()), load_pairs("emotions/fear")
    own = joined([place(joy, source, k, dose=t.dose) for k in (1, 2)])
    there = joined([place(joy, target, map=maps[k, k], dose=t.dose) for k in (1, 2)])
    a, b = (Bench(x.model, 1, TASK, NEUTRAL) for x in (own, there))
    np.testing.assert_allclose(b.ask(there).margin, a.ask(own).margin, atol=2e-2)
    shift = [(x.ask(y).margin - x.ask().margin).mean() for x, y in ((a, own), (b, there))]
    assert abs(shift[1] / shift[0] - 1) < 0.02 and abs(shift[0]) > 0.1
    given_arms = dict(pairs=PAIRS, map=[maps[2, 2], maps[2, 1]], source=source, other=other)
    how = dict(settings=Settings(random=2, bootstrap=50), experiments=["equal_damage"])
    e = evaluate(t, TASK, NEUTRAL, arms, **how, **given_arms)
    assert not e.missing and e.provenance.layers == [2, [1, 2]] and "2:[1, 2]" in repr(e)
    for name, a in e.arms.items():
        assert name == "base" or 0.15 < a.kl < 0.6, name
    with pytest.raises(ValueError, match="ends at layer 2, the transplant stands at layer 1, 2"):
        evaluate(t, TASK, NEUTRAL, arms, map=maps[2, 2], source=source)


def test_a_search_may_try_several_layers(given, tmp_path):
    joy, maps, target = given
    t = choose(joy, maps, target, TASK, NEUTRAL, 0.5, [(2, 2), (2, [1, 2]), (1, (0, 1))])
    tried = [s["layers"] for s in t.notes["search"] if s["round"] == 0]
    assert sorted(map(str, tried)) == ["[1, [0, 1]]", "[2, 2]", "[2, [1, 2]]"]
    t.save(tmp_path / "t")
    assert Transplant.load(tmp_path / "t", target).notes["search"] == t.notes["search"]
    view = layer_scores(maps, joy, replace(t, model=target), causal={(1, 0): 0.5})
    with pytest.raises(ValueError, match="no pairs of layers of these maps"):
        layer_scores(maps, joy, causal={(9, 9): 1.0})
    assert view.scores["gain"].keys() == view.rounds.keys() == {(2, 2)}
    assert view.taken == ((2, 2) if not t.deeper else None)
    table = view.table.set_index(["source", "target"])
    assert table.R2.is_monotonic_decreasing and table.causal.dropna().to_dict() == {(1, 0): 0.5}
    for (s, u), found in table.R2.items():
        assert found == pytest.approx(maps[s, u].r2, abs=1e-6)
    assert transplant(joy, maps, target, layers=(2, range(1, 3)), neutral=NEUTRAL).layers == [2, [1, 2]]
    for wrong in (
        (2, []),
        (2, [9]),
        (2, [1, 1]),
        (2, "1"),
        (1.5, 2),
        ([1, 2], 1),
        ([1, 2], [1, 2]),
        (2, {1}),
    ):
        with pytest.raises(ValueError, match="at least one|no map for"):
            transplant(joy, maps, target, layers=wrong, neutral=NEUTRAL)


def test_files_know_all_places_and_one_place_writes_what_it_did(llama, tmp_path):
    t, some = llama
    t.save(tmp_path / "t")
    back = Transplant.load(tmp_path / "t", t.model)
    assert back.layers == t.layers and back.generate(PROMPTS) == t.generate(PROMPTS)
    some[0].save(tmp_path / "one")
    tensors, head = load_artefact(tmp_path / "one")
    assert tensors.keys() == {"direction"}
    assert head.keys() - {"notes"} == set(
        "kind format package site name layer dose norm target source source_layer positions shuffled".split()
    )
    assert fingerprint(t) != fingerprint(some[0]) and used(t)["layers"] == [None, [1, 2, 3]]


def test_the_damage_of_one_place_is_not_that_of_all(llama):
    _, some = llama
    alone = [
        replace(t, notes={"kl": kl, "method": "ridge"}) for t, kl in zip(some, (0.1, 0.2, 0.1), strict=True)
    ]
    assert joined(alone).notes == {"method": "ridge"}
    assert joined(joined(alone[::2]).places).notes == {"kl": 0.1, "method": "ridge"}


def test_readers_of_before_cannot_miss_a_place(llama, tmp_path, monkeypatch):
    "Format 3 is newer to them. The plugin, which reads for itself, refuses what it cannot vouch for."
    t, some = llama
    t.save(tmp_path / "several")
    some[0].save(tmp_path / "one")
    formats = [load_artefact(tmp_path / k)[1]["format"] for k in ("one", "several")]
    assert formats == [2, 3]

    def serve(raw):
        (tmp_path / "served").write_bytes(raw)
        monkeypatch.setenv(SERVED, str(tmp_path / "served"))
        served.cache_clear()
        return served()

    raw = (tmp_path / "several").read_bytes()
    assert serve(raw)["joy"].keys() == {1, 2, 3}
    head, tensors = fuzz.head_of(raw), fuzz.load(raw)
    wrong = {
        "damaged": [raw[:-9], raw[:-1] + bytes([raw[-1] ^ 1]), b"{}", b""],
        "no transplant, or newer": [
            fuzz.sealed(tensors, head | more) for more in ({"format": 4}, {"kind": "concept"})
        ],
    }
    for said, files in wrong.items():
        for file in files:
            with pytest.raises(ValueError, match=f"served is {said}"):
                serve(file)
    served.cache_clear()


@pytest.mark.parametrize("strength", [10**400, float("inf"), "1", None, [1]])
@pytest.mark.parametrize("name", ["joy", ["joy"], {}, 1])
def test_a_request_of_any_form_is_answered_in_words(name, strength, monkeypatch):
    monkeypatch.setattr("concept_transfer.vllm_plugin.served", lambda: {"joy": {}})
    with pytest.raises(ValueError, match="is served here|a finite number"):
        wanted(type("Params", (), {"extra_args": {"steer": name, "strength": strength}}))


RULES = {
    "of all tokens so far": lambda h, mask: mask,
    "of another size": lambda h, mask: torch.ones(3),
    "a word": lambda h, mask: "x",
    "numbers": lambda h, mask: [1, 0],
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_gives_no_mask_is_told_what_one_is(name):
    t, _ = three(tiny_model("llama"), positions=RULES[name])
    with pytest.raises(ValueError, match="where a mask .* of this pass is needed"):
        t.generate(PROMPTS, 1.0, 4)


def test_a_rule_may_give_an_array():
    given: dict = {
        "of numpy": lambda h, mask: np.ones(h.shape[:2]),
        "of torch": lambda h, mask: h.new_ones(h.shape[:2]),
    }
    one, two = (
        three(tiny_model("llama"), positions=rule)[0].generate(PROMPTS, 1.0, 4) for rule in given.values()
    )
    assert one == two


@pytest.mark.slow
def test_a_changed_target_is_checked_at_every_place(given):
    joy, maps, target = given
    t = transplant(joy, maps, target, layers=(2, [1, 2]), damage=0.3, neutral=NEUTRAL)
    louder = load_model(target._module, target.tokenizer)
    source, own = load_model(*planted_module()), [maps[2, k] for k in (1, 2)]
    assert check(t, louder, map=own, source=source, neutral=NEUTRAL).verdict == "valid"
    module = copy.deepcopy(target._module)
    module.model.layers[2].mlp.down_proj.weight.mul_(30)  # reaches the deeper place alone
    found = check(t, wrap(module, target.tokenizer, "changed"), target, own, source, NEUTRAL)
    assert found.verdict == "re-fit" and 0 < found.numbers["r2"][0] < 0.9
    with pytest.raises(ValueError, match="ends at layer 2"):
        check(t, louder, map=own[1], source=source)
    assert adopt(t, louder, target).layers == t.layers


@pytest.mark.slow
@pytest.mark.parametrize("to", ["baked", "hub", "lm-eval", "gguf", "vllm"])
@pytest.mark.filterwarnings("ignore:the export to")
def test_every_way_out_holds_all_places(llama, tmp_path, to, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_ENGINES", str(tmp_path / "engines"))
    t, some = llama
    out = tmp_path / ("joy.gguf" if to == "gguf" else "joy")
    receipt = export(t, out, to)
    if receipt.strengths:
        assert receipt.difference < 1e-4 < receipt.strengths[1.0]["moved"]
    if to == "gguf":
        back = import_vector(out, t.model)
        assert back.layers == t.layers
        for p, q in zip(back.places, some, strict=True):
            torch.testing.assert_close(p.vector(-2), q.vector(-2))
    if to == "hub":
        assert "after layer 1, 2, 3 (counted" in (out / "README.md").read_text()
    if to == "vllm":
        monkeypatch.setenv(SERVED, str(out))
        served.cache_clear()
        ask = type("Params", (), {"extra_args": {"steer": "joy", "strength": -2.0}})
        found = deltas([(2, None), (3, ask)])
        served.cache_clear()
        assert found.keys() == {1, 2, 3}
        for p in some:
            torch.testing.assert_close(found[p.layer][2:], p.vector(-2).expand(3, -1))
            assert not found[p.layer][:2].any()
    with pytest.raises(ValueError, match="cannot express"):
        export(joined([*some, place(torch.ones(48), t.model, 0, dose=0.5)]), tmp_path / "no.gguf")


def test_what_two_do_at_once_at_several_layers(llama):
    t, some = llama
    v = together(t, t, [TASK.take(2)])
    assert v.kl[2] > v.kl[0] == v.kl[1]
    with pytest.raises(ValueError, match="stands at layer"):
        together(t, joined(some[:2]), [TASK.take(2)])


def test_the_command_line_takes_several_layers(given, tmp_path, monkeypatch, capsys):
    joy, maps, target = given
    monkeypatch.chdir(tmp_path)
    joy.save("joy")
    maps.save("maps")
    monkeypatch.setattr("concept_transfer.models.load_model", lambda *_: target)
    begin = "transplant --concept joy --map maps --model it --out t --layers".split()
    assert main([*begin, "2:1,2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [2, [1, 2]]
    assert main(["info", "t", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deeper"] == [2]
    for wrong in ("2:1,", "2:1,9"):
        assert main([*begin, wrong]) != 0

    def load(*_):
        raise AssertionError("a layer that stands twice is refused before the model is loaded")

    monkeypatch.setattr("concept_transfer.models.load_model", load)
    assert main([*begin, "2:1,1"]) == 2
