"Steering, doses, what a bench says, and the search: beside plain decoding, texts alone, and at the edges."

import os
import re
from dataclasses import replace

import nnsight
import numpy as np
import pytest
import torch
from tokenizers import normalizers

from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.engine import encode, engine, pad
from concept_transfer.maps import fit_maps, random_map
from concept_transfer.measure import (
    KEEP,
    METRICS,
    Answers,
    Bench,
    choices,
    dose_curve,
    neutral_text,
    prose_damage,
    steerability,
    word_direction,
    word_tokens,
)
from concept_transfer.models import load_model, tiny_model, twin
from concept_transfer.selection import choose, offline_scores, search_p, transplant
from concept_transfer.stats import wilson
from concept_transfer.steering import Transplant, adding, place
from concept_transfer.tasks import ChoiceItem, ChoiceTask, load_task
from concept_transfer.toys import TINY, planted_module, tiny_tokenizer

PAIRS = load_pairs("emotions/happiness")
SCENES = Corpus(
    "scenes", [x for e in ("sadness", "fear", "anger") for x in load_pairs(f"emotions/{e}").texts]
)
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:48])


def random_direction(width=48, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def next_logits(model, ids, mask):
    with torch.no_grad(), model.trace(input_ids=ids, attention_mask=mask, logits_to_keep=1):
        out = model.output.logits.save()
    return out


@pytest.fixture(scope="module")
def pair():
    "A planted model, its twin, joy, and maps."
    source = load_model(*planted_module())
    target, _ = twin(source)
    maps = fit_maps(source, target, SCENES, [1, 2], [1, 2], template=PAIRS.template)
    return source, target, extract_concept(source, PAIRS), maps


# answers


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text"])
def test_answers_read_in_one_pass_are_those_of_each_alone(family, monkeypatch):
    m, task = tiny_model(family), load_task("knowledge").take(12)
    v = place(torch.ones(48), m, 1, dose=0.4)
    changes = [None, v, replace(v, positions="last")]
    together = Bench(m, 1, task)
    first = together.ask(changes)
    monkeypatch.setattr(engine(m), "branching", lambda tokens: False)
    alone = Bench(m, 1, task)
    second = alone.ask(changes)
    assert (together.read, alone.read) == (3 * len(task), 3 * 4 * len(task))  # rows, for three changes
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.logp, b.logp, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)
        assert (a.first == b.first).all() and (a.chosen == b.chosen).all()


def test_the_last_position_is_every_step_of_decoding():
    "A choice of several tokens gets the probability that decoding step by step gives it."
    m = tiny_model("qwen2")
    v = place(random_direction(), m, 2, dose=0.6, positions="last")
    item = ChoiceItem(
        "The kettle sang and", (" nobody listened to it", " the door opened at last"), 0, "kettle"
    )
    got = Bench(m, 2, ChoiceTask("one", (item,))).ask(v)
    prompt = m.tokenizer(item.prompt).input_ids
    for choice, score in zip(item.choices, got.logp[0], strict=True):
        whole, past, want = m.tokenizer(item.prompt + choice).input_ids, None, 0.0
        assert whole[: len(prompt)] == prompt
        with torch.no_grad(), v():
            for j in range(len(prompt) - 1, len(whole) - 1):
                ids = torch.tensor([whole[: len(prompt)] if past is None else [whole[j]]])
                mask = torch.ones(1, j + 1, dtype=torch.long)
                with m.trace(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True):
                    out = nnsight.save(m.output)
                past = out.past_key_values
                want += out.logits[0, -1].log_softmax(-1)[whole[j + 1]].item()
        assert score == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
def test_metrics_fit_the_task(pair):
    _, target, _, _ = pair
    emotions, truth = (
        Bench(target, 2, load_task(k).take(6)).ask() for k in ("emotions/happiness", "truthfulness")
    )
    assert list(emotions.metrics) == ["chosen", "first", "margin"]
    assert list(truth.metrics) == list(METRICS) and all(v.shape == (6,) for v in truth.metrics.values())
    assert (truth.metrics["mc1"] == truth.chosen).all()


def test_answers_hold_what_a_metric_may_ask_for():
    "The wanted choice wherever it stands, the choices it is compared with, and the words of all."
    sky = ChoiceItem("The sky is", (" red", " blue", " green"), 1, "sky")
    true = ChoiceItem("It is true that", (" ice is cold", " fire is hot", " rain is dry"), 0, "true", 2)
    logp, likeliest = ([-3.0, -1.0, -2.0], [-4.0, -1.0, -3.0]), [False, True, False]
    a = Answers([sky, true], logp, ([2] * 3, [2] * 3), (likeliest, likeliest))
    assert a.target.tolist() == [1, 0] and a.first.tolist() == [True, False]
    assert a.chosen.tolist() == [True, False] and a.margin.tolist() == [1.5, -1.0]
    assert [i.choices[k] for i, k in zip(a.items, a.target, strict=True)] == [" blue", " ice is cold"]


# doses and damage


@pytest.mark.slow
def test_a_random_map_recovers_nothing(pair):
    "At a damage so small that every push acts linearly."
    _, target, joy, maps = pair
    bench = Bench(target, 2, load_task("emotions/happiness").take(40), NEUTRAL, 0.02)
    base, W = bench.ask(), maps[2, 2].W

    def shift(W):
        t = bench.at_damage(bench.place(joy, replace(maps[2, 2], W=W)))
        return float((bench.ask(t).margin - base.margin).mean())

    native = shift(W)
    recovery = np.array([shift(random_map(W, seed)) for seed in range(16)]) / native
    half = 2.13 * recovery.std(ddof=1) / 4  # 95 % interval of the mean of 16
    assert native > 0 and abs(recovery.mean()) <= half < 0.6, (recovery.mean(), half)


def test_several_directions_get_the_doses_that_each_gets_alone(pair):
    _, target, _, _ = pair
    bench = Bench(target, 1, None, NEUTRAL, 0.2)
    some = [bench.place(random_direction(seed=k), dose=d) for k, d in enumerate((0.05, 0.1, 0.5))]
    together = bench.at_damage(some)
    for t, found in zip(some, together, strict=True):
        assert bench.at_damage(t).dose == pytest.approx(found.dose, rel=1e-4)
        assert found.notes["kl"] == pytest.approx(0.2, rel=0.085) and found.notes["damage_budget"] == 0.2
        assert bench.dosing(found).mean == pytest.approx(found.notes["kl"], rel=1e-4)


def test_a_damage_that_cannot_be_reached_is_said(pair):
    _, target, _, _ = pair
    bench = Bench(target, 2, None, NEUTRAL)
    noise = bench.place(random_direction(), name="noise")
    for ts in (noise, [noise]):
        with pytest.warns(UserWarning, match="a damage of 1e-08 was not reached; KL is") as said:
            bench.at_damage(ts, damage=1e-8)
        assert [w.filename for w in said] == [__file__]  # it points at the line that asked
    with pytest.raises(ValueError, match="positive KL"):
        Bench(target, 2, damage=-1.0)
    with pytest.raises(ValueError, match="3 neutral texts are too few"):
        Bench(target, 2, neutral=NEUTRAL.take(3))
    with pytest.raises(ValueError, match="give whole sentences"):
        Bench(target, 2, neutral=Corpus("short", ["Oh.", "Ah.", "Eh.", "Hm."])).hurt()


def test_damage_is_set_and_reported_on_different_texts(pair):
    _, target, _, _ = pair
    bench = Bench(target, 2, None, NEUTRAL)
    assert len(bench.dosing.texts) == len(bench.hurt.texts) == 24
    assert not set(bench.dosing.texts) & set(bench.hurt.texts)
    assert len(Bench(target, 2).dosing.texts) == 32


def test_damage_is_that_of_the_whole_model(pair):
    "KL by hand, from two full passes over each text."
    _, target, _, _ = pair
    bench = Bench(target, 1, None, NEUTRAL.take(8))
    t = bench.place(random_direction(), dose=0.3)
    got = bench.hurt(t)
    for text, kl, lost in zip(bench.hurt.texts, got.kl, got.lost, strict=True):
        (ids,) = encode(target, [text])
        x = pad(target, [ids])
        with torch.no_grad(), target.trace(input_ids=x[0], attention_mask=x[1]):
            p = target.output.logits.log_softmax(-1)[0, -5:-1].save()
        with torch.no_grad(), t(), target.trace(input_ids=x[0], attention_mask=x[1]):
            q = target.output.logits.log_softmax(-1)[0, -5:-1].save()
        np.testing.assert_allclose(kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
        np.testing.assert_allclose(lost, (p - q)[range(4), ids[-4:]], atol=1e-4)


def test_words_move_answers_and_cost_what_they_cost(pair):
    _, target, _, _ = pair
    bench = Bench(target, 2, load_task("emotions/happiness").take(6), NEUTRAL)
    answers, hurt = bench.words("Say that you are glad.\n\n")
    assert (
        hurt.mean > 0 and hurt.kl.shape == (24, 4) and not np.array_equal(answers.margin, bench.ask().margin)
    )


def test_a_curve_goes_through_nothing_and_turns_with_its_sign(pair):
    _, target, joy, maps = pair
    bench = Bench(target, 2, load_task("emotions/happiness").take(20), NEUTRAL, 0.2)
    t = bench.at_damage(bench.place(joy, maps[2, 2]))
    curve = dose_curve(t, bench, (-1.0, 0.0, 1.0))
    shift = [(p.answers.margin - bench.ask().margin).mean() for p in curve]
    assert shift[0] < 0 == shift[1] < shift[2]
    assert curve[1].damage.mean == 0 and curve[1].damage.perplexity_ratio == 1 and curve[2].dose == t.dose
    found = steerability([(p.strength, p.answers.margin) for p in curve])
    assert found["slope"] > 0 and found["wrong_way"] < 0.5
    with pytest.raises(ValueError, match="two different"):
        steerability([(0.0, curve[1].answers.margin)])


def test_another_layer_or_map_is_refused(pair):
    _, target, joy, maps = pair
    bench = Bench(target, 2, None, NEUTRAL)
    with pytest.raises(ValueError, match="stands at layer 1"):
        bench.hurt(place(random_direction(), target, 1))
    with pytest.raises(ValueError, match="ends at layer 1"):
        bench.place(joy, maps[2, 1])
    with pytest.raises(ValueError, match="no task"):
        bench.ask()


# the search


@pytest.mark.slow
def test_the_same_search_finds_the_same(pair):
    _, target, joy, maps = pair
    task = load_task("emotions/happiness", "tune").take(16)
    a, b = (choose(joy, maps, target, task, NEUTRAL, 0.5) for _ in range(2))
    assert a.notes == b.notes and torch.equal(a.direction, b.direction) and a.dose == b.dose
    keys = {"search", "search_p", "texts_read", "tuning", "tuning_items", "map", "method"}
    assert keys < set(a.notes) and 0 < a.notes["search_p"] <= 1 and a.notes["texts_read"] > 0
    assert len(a.notes["tuning_items"]) == 16
    line = {"layers", "positions", "round", "margin", "choice_rate", "dose", "kl"}
    assert all(set(s) == line for s in a.notes["search"])


def test_the_search_takes_the_candidates_it_is_given(pair):
    _, target, joy, maps = pair
    task = load_task("emotions/happiness", "tune").take(8)
    t = choose(joy, maps, target, task, NEUTRAL, 0.5, [(2, 1)], ("all", "last"))
    assert (t.source_layer, t.layer) == (2, 1)
    assert {s["positions"] for s in t.notes["search"]} == {"all", "last"}
    best = offline_scores(joy, maps)[0][1]
    fixed = transplant(joy, maps, target, neutral=NEUTRAL)
    assert (fixed.source_layer, fixed.layer) == best and "search" not in fixed.notes
    with pytest.raises(ValueError, match="positive KL"):
        transplant(joy, maps, target, task, damage=0.0)
    with pytest.warns(UserWarning, match="are not used"):
        there = transplant(joy, maps, target, task, best, neutral=NEUTRAL)
    assert there == fixed and len(fixed.notes["nearest_words"].split(", ")) == 6
    assert fixed.notes["nearest_words"].split(", ")[0] in fixed._repr_html_()
    with pytest.raises(ValueError, match=f"layer {best[1] - 1}, but this map ends at layer {best[1]}"):
        place(joy, target, best[1] - 1, maps[best])


def test_a_search_through_noise_is_rarely_taken_for_an_effect():
    "And an effect of one standard deviation in one of twelve candidates is seen."
    rng = np.random.default_rng(0)
    groups = [str(i) for i in range(24)]
    draws = [rng.normal(0, 1, (12, 24)) for _ in range(100)]
    assert sum(search_p(list(g), groups, 200) <= 0.05 for g in draws) <= 10
    assert np.mean([search_p([*g[:11], g[11] + 1], groups, 200) <= 0.05 for g in draws]) > 0.9


# steering at the edges


def test_tied_layers_are_steered_at_each_place():
    m = tiny_model("llama")
    layers = m._module.model.layers
    for k in (2, 3):
        layers[k].mlp = layers[1].mlp
    tied = load_model(m._module, m.tokenizer)
    x = pad(tied, encode(tied, ["It rained."]), left=True)
    base, seen = next_logits(tied, *x), []
    for k in (1, 2):
        with place(torch.ones(48), tied, k, dose=0.5)():
            seen.append(next_logits(tied, *x))
    assert not torch.equal(*seen) and not torch.equal(seen[0], base)
    assert torch.equal(next_logits(tied, *x), base)


def test_the_wrong_models_and_directions_are_refused():
    a, b, c = tiny_model("llama"), tiny_model("gpt2"), tiny_model("opt")
    maps = fit_maps(a, b, SCENES.take(30), [1], [1], template=PAIRS.template)
    joy = extract_concept(a, PAIRS)
    with pytest.raises(ValueError, match="belongs to tiny-gpt2-0"):
        place(joy, c, map=maps[1, 1])
    with pytest.raises(ValueError, match="used without a map"):
        place(joy, b, 1)
    with pytest.raises(ValueError, match="does not fit a residual stream 48 wide"):
        place(torch.ones(47), b, 1)
    with pytest.raises(ValueError, match="not finite"):
        place(torch.full((48,), torch.nan), b, 1)
    with pytest.raises(ValueError, match="out of range"):
        place(torch.ones(48), b, 7)


def test_files_hold_a_rule_by_its_name(tmp_path):
    m = tiny_model("gpt2")
    t = place(torch.ones(48), m, -1, positions="last")
    t.save(tmp_path / "t.safetensors")
    again = Transplant.load(tmp_path / "t.safetensors", m)
    assert (again.positions, again.layer, again.dose) == ("last", 3, t.dose)
    with pytest.raises(ValueError, match="cannot be kept in a file.* or use last, all"):
        replace(t, positions=lambda h: torch.ones(h.shape[:2])).save(tmp_path / "u.safetensors")
    with pytest.raises(ValueError, match="mean"):
        adding(torch.ones(48), "mean")
    with pytest.raises(ValueError, match="has no model"), replace(t, model=None)():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


# what users give


def test_a_bench_says_what_will_not_do(monkeypatch):
    m, task = tiny_model("gpt2"), load_task("emotions/happiness").take(4)
    monkeypatch.setattr("concept_transfer.measure.encode", None)  # reading would fail otherwise
    for wrong, name in (
        ({"model": "smollm2-135m-instruct"}, "model"),
        ({"model": task}, "model"),
        ({"layer": 1.5}, "layer"),
        ({"layer": "1"}, "layer"),
        ({"layer": 9}, "layer 9"),
        ({"task": "emotions/happiness"}, "task"),
        ({"task": NEUTRAL}, "task"),
        ({"neutral": NEUTRAL.texts}, "neutral"),
        ({"damage": float("nan")}, "damage"),
        ({"damage": float("inf")}, "damage"),
        ({"damage": "0.1"}, "damage"),
        ({"damage": 0.0}, "positive KL"),
        ({"neutral": NEUTRAL.take(3)}, "3 neutral texts are too few"),
    ):
        with pytest.raises(ValueError, match=name):
            Bench(**{"model": m, "layer": 1, "task": task, "neutral": NEUTRAL} | wrong)
    bench = Bench(m, np.int64(1), task, NEUTRAL, np.float32(0.5))
    assert (bench.layer, type(bench.layer), bench.damage) == (1, int, 0.5)


def test_what_is_asked_of_a_bench_is_checked(pair):
    source, target, joy, maps = pair
    bench = Bench(target, 2, load_task("emotions/happiness").take(4), NEUTRAL)
    t = bench.place(joy, maps[2, 2])
    for wrong in ("joy", 5, joy, torch.ones(48)):
        for use in (bench.ask, bench.hurt, bench.dosing, lambda x: bench.ask([None, x])):
            with pytest.raises(ValueError, match="changes"):
                use(wrong)
    home = place(joy, source, 2, norm=1.0)
    for use in (bench.ask, bench.at_damage):
        with pytest.raises(ValueError, match="transplant 'happiness' belongs to"):
            use(home)
    for damage in (0.0, -1, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="damage"):
            bench.at_damage(t, damage=damage)
    for given, name in (((maps, joy), "concept"), ((joy, maps), "map"), ((joy, 2), "map")):
        with pytest.raises(ValueError, match=f"'{name}'"):
            bench.place(*given)
    for dose in (0.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="dose"):
            bench.place(joy, maps[2, 2], dose=dose)
    with pytest.raises(ValueError, match="'text'"):
        bench.words(5)
    with pytest.raises(ValueError, match="'task'"):
        bench.with_task("emotions/fear")
    for strengths in (["1"], 1.0, [float("nan")], [None]):
        with pytest.raises(ValueError, match="strengths"):
            dose_curve(t, bench, strengths)
    with pytest.raises(ValueError, match="'t'"):
        dose_curve(bench, t)


# words made likelier


@pytest.fixture(scope="module")
def worded():
    "A model whose unembedding is known, a task of two words, and their first tokens."
    m = tiny_model("gpt2", seed=3)
    words = [w for w in map(m.tokenizer.decode, range(300, 800)) if re.fullmatch(" [a-z]{3,}", w)]
    single = [w for w in words if len(encode(m, [f"It was{w}"])[0]) == len(encode(m, ["It was"])[0]) + 1]
    items = [ChoiceItem(f"{x} It was", tuple(single[:3]), 1, x) for x in NEUTRAL.texts[:12]]
    task = ChoiceTask("words", items)
    return m, task, word_tokens(m, task)


def test_words_are_their_first_tokens_with_the_target_first(worded):
    m, task, tokens = worded
    first, second, third = task.items[0].choices
    assert tokens == [encode(m, [f"It was{w}"])[0][-1] for w in (second, first, third)]
    other = ChoiceTask("mixed", [*task.items, ChoiceItem("He", (" a", " b"), 0, "x")])
    assert word_tokens(m, other) == [] and word_direction(m, other) is None


def test_the_last_layers_word_direction_is_the_unembedding_with_the_norm(worded):
    m, task, tokens = worded
    norm, U = m._module.transformer.ln_f, m._module.lm_head.weight.detach()
    u = norm.weight.detach() * (U[tokens[0]] - U[tokens[1:]].mean(0))  # what the norm passes on
    states = activations(m, task.prompts, [3])[:, 0]  # (n, d)
    centred = states - states.mean(1, keepdim=True)
    spread = (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    unit = centred / spread / centred.shape[1] ** 0.5  # of length 1 but for eps
    v = u - u.mean()
    want = ((v - unit * (unit @ v)[:, None]) / spread).mean(0)
    got = word_direction(m, task, prompts=12)
    assert torch.cosine_similarity(got, want, 0) > 0.999


def test_a_step_along_the_gradient_gains_what_it_says(worded):
    m, task, _ = worded
    v = word_direction(m, task, 1, prompts=12)
    ask = Bench(m, 1, task).ask
    small = 1e-3 / v.norm()
    base, moved = (a.margin.mean() for a in ask([None, lambda h: h + small * v]))
    assert moved - base == pytest.approx(float(small * v @ v), rel=0.02)


@pytest.mark.parametrize("damage", [0.02, 0.3, 2.0])
def test_a_raised_logit_is_what_a_plain_computation_gives(worded, damage):
    m, task, tokens = worded
    bench = Bench(m, 1, task, NEUTRAL, damage)
    nats, hurt = bench.raise_to_damage(tokens[:1])
    kl, lost = [], []
    for text in bench.hurt.texts:
        (ids,) = encode(m, [text])
        logp = m._module(torch.tensor([ids])).logits[0, -KEEP - 1 : -1].detach().log_softmax(-1)
        raised = logp.clone()
        raised[:, tokens[0]] += nats
        gap = logp - raised.log_softmax(-1)
        kl.append((logp.exp() * gap).sum(-1))
        lost.append(gap[range(KEEP), ids[-KEEP:]])
    np.testing.assert_allclose(hurt.kl, torch.stack(kl), atol=1e-4)
    np.testing.assert_allclose(hurt.lost, torch.stack(lost), atol=1e-4)
    again = neutral_text(m, 1, bench.hurt.texts, tokens=tokens[:1])()
    assert _mean_kl(again, nats) == pytest.approx(damage, rel=1e-3)
    got, base = choices(m, 1, task, raised=(tokens[:1], nats))(), bench.ask()
    gain = np.array([a[1] - a[0] for a in got.logp]) - np.array([b[1] - b[0] for b in base.logp])
    np.testing.assert_allclose(gain, nats, atol=1e-4)  # of single tokens, whatever the rest does


def _mean_kl(mass, nats):
    m = np.exp(mass[0])
    return float((np.log(1 + m * (np.exp(nats) - 1)) - nats * m).mean())


def test_prose_is_read_to_its_end(worded):
    m, task, _ = worded
    joy = place(torch.randn(48), m, 1, dose=0.2)
    (base, moved), passage = prose_damage(m, 1, [None, joy], passages=2)
    assert base.mean == 0 and moved.mean > 0 and moved.kl.size > 100
    assert passage == ["0", "1"] and len(moved.kl) == 2
    roomy = tiny_model("llama", max_position_embeddings=1024)
    joy = place(torch.randn(48), roomy, 1, dose=0.2)
    (moved,), _ = prose_damage(roomy, 1, [joy], passages=2)
    whole = neutral_text(roomy, 1, load_corpus("prose").texts[:2])(joy)
    np.testing.assert_allclose(moved.kl[:, -KEEP:], whole.kl, atol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_a_gradient_is_that_of_the_text_alone(family):
    "In every family, by finite differences, whatever stands beside it in a batch."
    m = tiny_model(family)
    for ids in encode(m, ["It rained.", "The old cat sat on the mat and slept."]):
        found = engine(m).gradient(ids, 1, lambda z: z[7] - z[11])
        x = pad(m, [ids])
        (state,) = engine(m).read(*x, [1])
        small = 1e-2 / found.norm()
        up, down = (engine(m).logits(*x, 1, 1, state + a * found)[0, -1] for a in (small, -small))
        gain = (up[7] - up[11]) - (down[7] - down[11])
        assert float(gain) == pytest.approx(float(2 * small * found.square().sum()), rel=0.02)


@pytest.mark.parametrize("choices_, target", [((" unhappy", " unkind"), 0), ((" rest", " reach", " go"), 1)])
def test_choices_that_begin_alike_have_no_word_to_promote(choices_, target):
    m = tiny_model("gpt2")
    task = ChoiceTask("alike", [ChoiceItem(x, choices_, target, x) for x in NEUTRAL.texts[:10]])
    whole = encode(m, [task.items[0].prompt + c for c in ("", *choices_)])
    k = len(os.path.commonprefix(whole))
    alike = whole[1 + target][k] in [ids[k] for i, ids in enumerate(whole[1:]) if i != target]
    assert (word_tokens(m, task) == []) == alike == (word_direction(m, task) is None)


def test_choices_that_are_the_same_tokens_are_refused():
    tokenizer = tiny_tokenizer("byte")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    m = load_model(tiny_model("gpt2")._module, tokenizer)
    task = ChoiceTask("x", [ChoiceItem("it was", (" Yes", " yes"), 0, "g")])
    with pytest.raises(ValueError, match="item 0: a choice .* the same as another"):
        Bench(m, 1, task).ask(None)


def test_what_cannot_be_asked_is_said_at_once(worded):
    (model, task, _), texts = worded, NEUTRAL.texts[:2]
    for ask, said in (
        (lambda: choices(model, 1, load_task("instructions")), "'task'"),
        (lambda: choices(model, 1, task, raised=([5], float("nan"))), "'raised'"),
        (lambda: choices(model, 99, task), "layer 99 is out of range"),
        (lambda: neutral_text(model, 99, texts), "layer 99 is out of range"),
        (lambda: neutral_text(model, 1, texts[0]), "'texts'"),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


@pytest.mark.parametrize("dose", [0.0, -0.1])
def test_a_search_for_a_dose_starts_above_zero(worded, dose):
    bench = Bench(worded[0], 1)
    with pytest.raises(ValueError, match="dose of 'direction'"):
        bench.at_damage(replace(bench.place(torch.ones(48)), dose=dose))


def test_counts_that_cannot_be_are_refused():
    for successes, n in ((5, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="is no proportion"):
            wilson(successes, n)
    with pytest.raises(ValueError, match="passages: .*greater than 0"):
        prose_damage(tiny_model("llama"), 1, [None], -10)
