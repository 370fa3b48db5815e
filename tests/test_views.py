"What one looks at: ladders, words, token by token, items; each held against a plain computation of its own."

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_transfer.concepts import extract_concept
from concept_transfer.data import Corpus, load_pairs
from concept_transfer.engine import encode, engine, pad
from concept_transfer.measure import KEEP, Bench
from concept_transfer.models import load_model, model_info, tiny_model
from concept_transfer.plots import plot_matrix
from concept_transfer.steering import Transplant, generate, joined, place
from concept_transfer.tasks import load_task
from concept_transfer.views import (
    TEMPERATURES,
    Along,
    TokenHeat,
    damage_anchors,
    direction_words,
    farthest_texts,
    ladder,
    moved_items,
    pushes,
    ranked_words,
    seeded,
    separation,
    together,
    token_heat,
    words_of,
)

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def t(tiny):
    return place(extract_concept(tiny, load_pairs("emotions/happiness"), [1]), tiny, layer=1, dose=0.3)


def test_a_row_costs_what_plain_logits_say(tiny, t):
    up = ladder(t, "It rained and", [1, 2], max_new_tokens=6)
    for r in up.rungs:
        (ids,), (start,) = encode(tiny, [up.prompt + r.text]), encode(tiny, [up.prompt])
        x, mask = pad(tiny, [ids[:-1]])
        n, new = len(ids) - len(start), torch.tensor(ids[len(start) :])
        base = engine(tiny).logits(x, mask, n)[0].log_softmax(-1)  # (n, vocabulary)
        with t(r.strength):
            now = engine(tiny).logits(x, mask, n)[0].log_softmax(-1)
        own, before = (z.gather(1, new[:, None])[:, 0] for z in (now, base))  # (n,)
        assert r.kl == pytest.approx((base.exp() * (base - now)).sum(-1).mean().item(), abs=1e-5)
        assert r.perplexity == pytest.approx(before.mean().neg().exp().item(), rel=1e-4)
        if all(x is not None for _, x in r.words):
            assert sum(x for _, x in r.words) == pytest.approx((own - before).sum().item(), abs=1e-3)
    assert any(all(x is not None for _, x in r.words) for r in up.rungs)


@pytest.mark.slow
def test_decoding_is_the_same_in_every_row(tiny, t):
    up = ladder(t, "It rained and", [2], max_new_tokens=8)
    assert up.base.text == generate(tiny, up.prompt, 8, repetition_penalty=1.2)
    assert up.rungs[1].text == t.generate(up.prompt, 2, 8, repetition_penalty=1.2)
    how = dict(max_new_tokens=8, do_sample=True, temperature=1.5)
    state = torch.get_rng_state()
    one, two, other = (ladder(t, up.prompt, [1e-9, 2], seed, **how) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert one.rungs[0].text == one.rungs[1].text and one.rungs == two.rungs and one.base != other.base
    with seeded(1):
        assert one.base.text == generate(tiny, up.prompt, **how, repetition_penalty=1.2)
    assert one.decoding["seed"] == 1 and "seed" not in up.decoding


def test_marks_of_a_tokenizer_are_never_written(t, monkeypatch):
    marked, seen = tiny_model("llama", max_position_embeddings=256), {}
    marked.tokenizer.add_tokens(["<start_of_image>", "<strong>", " a_word"])
    new = marked.tokenizer.convert_tokens_to_ids("<start_of_image>")
    monkeypatch.setattr(Transplant, "generate", lambda self, *a, **k: seen.update(k) or ["", ""])
    ladder(replace(t, target=model_info(marked), model=marked), "It rained", [1])
    assert seen["suppress_tokens"] == [new]


def test_a_model_that_stops_at_once_has_an_empty_row(t, monkeypatch):
    monkeypatch.setattr(Transplant, "generate", lambda self, *a, **k: ["", " again", ""])
    up = ladder(t, "It rained", [1, 2])
    assert [r.kl is None for r in up.rungs] == [True, False, True] and up.base.words == ()
    assert up.shown == [] and "does not show" in up.verdict and "again" in repr(up)
    assert up.data["rows"][0]["kl"] is None and json.dumps(up.data, allow_nan=False)


def test_strength_one_that_changes_nothing_is_said(t, monkeypatch):
    monkeypatch.setattr(Transplant, "generate", lambda self, *a, **k: [" again"] * 2)
    up = ladder(t, "It rained", [1])
    assert up.verdict.startswith("Strength 1 writes what the base model writes. It shows at none")


def test_options_that_generate_refuses_are_refused(t):
    with pytest.raises(ValueError, match="num_return_sequences"):
        ladder(t, "It rained", [1], num_return_sequences=2)
    with pytest.raises(ValueError, match="prompt"):
        ladder(t, ["It rained"], [1])


@pytest.mark.parametrize("family, norm", [("llama", "norm"), ("gemma3_text", "norm"), ("gpt2", "ln_f")])
def test_words_are_direction_times_norm_times_unembedding(family, norm):
    model = tiny_model(family)
    gain = getattr(model._module.base_model, norm).weight
    gain = 1 + gain if family.startswith("gemma") else gain
    v = torch.randn(model_info(model).width, generator=torch.Generator().manual_seed(1))
    formula = model._module.get_output_embeddings().weight @ (gain * (v - v.mean() * (family == "gpt2")))
    assert np.corrcoef(pushes(model, v), formula)[0, 1] > 0.95
    assert np.corrcoef(pushes(model, v), pushes(model, -v))[0, 1] < -0.999


def test_words_are_words(tiny):
    words = ranked_words(tiny, torch.arange(tiny._module.config.vocab_size).float(), 12)
    assert len({w.casefold() for w, _ in words}) == 12 and all(w[0].isalpha() for w, _ in words)
    assert [x for _, x in words] == sorted((x for _, x in words), reverse=True)


def test_a_server_says_the_same(tiny, t):
    far = load_model(tiny, remote="local")
    there = replace(t, model=far)
    np.testing.assert_allclose(pushes(far, t.direction), pushes(tiny, t.direction), atol=1e-3)
    here, away = (ladder(x, "It rained and", [1], max_new_tokens=4) for x in (t, there))
    assert here.table.text.tolist() == away.table.text.tolist()
    np.testing.assert_allclose(here.table.kl, away.table.kl, atol=1e-5)
    steered = [list(token_heat(x, "It rained").rows.values())[-1] for x in (t, there)]
    np.testing.assert_allclose(*([x for _, x in row] for row in steered), atol=1e-3)


def test_items_are_those_of_the_bench(tiny, t):
    task = load_task("emotions/happiness").take(8)
    moved = moved_items(t, task, 2)
    base, after = Bench(tiny, 1, task).ask([None, t])
    table = moved.table.sort_values("item")
    np.testing.assert_allclose(table.change, after.margin - base.margin)
    most, wrong = moved.ends()
    assert most.change.iloc[0] == table.change.max() and (wrong.change < 0).all()
    assert table.prompt.tolist() == task.prompts
    for item, said in zip(task.items, table.choices, strict=True):
        assert all(c.strip() in said for c in item.choices)
    (wanted, *rest), k = moved.choices(moved.typical), moved.typical
    assert wanted[0] == task.items[k].choices[task.items[k].target].strip()
    np.testing.assert_allclose([sum(x[1:][i] for x in (wanted, *rest)) for i in (0, 1)], 1)
    assert table.change.sort_values().iloc[3] == table.change[table.item == k].item()


def test_small_moves_are_told_apart_from_none(tiny, t):
    task, shares = load_task("emotions/happiness").take(1), [0.00121, 0.5, 0.4, 0.05, 0.04, 0.00879]
    moved = moved_items(t, task)

    def answered(*shares):
        return replace(moved.before, logp=(np.log(shares),))

    before, after = answered(*shares), answered(0.00134, 0.49987, *shares[2:])
    (said,) = replace(moved, before=before, after=after).table.choices
    for words in ("0.0012 to 0.0013; ", "0.5000 to 0.4999; ", ": stays at 0.40; "):
        assert words in said
    same = replace(moved, before=before, after=before)
    assert same.title == f"{t.name}: 1 items, none of which moved" and "stays at 0.00; " in repr(same)


@pytest.mark.parametrize("page, text", [((255, 255, 255), (34, 34, 34)), ((17, 17, 17), (224, 224, 224))])
def test_highlights_are_seen_and_read_on_light_and_dark_pages(page, text):
    def luminance(colour):
        x = np.array(colour) / 255
        return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    def contrast(*colours):
        low, high = sorted(map(luminance, colours))
        return (high + 0.05) / (low + 0.05)

    shown = TokenHeat("joy", "", {"tiny": [(" word", x) for x in (0.01, -0.01, 9, -9)]})._repr_html_()
    grounds = np.array(re.findall(r"rgba\(([\d.]+),([\d.]+),([\d.]+),([\d.]+)\)", shown), float)
    mixed = [a * np.array(c) + (1 - a) * np.array(page) for *c, a in grounds]
    assert len(mixed) == 4 and min(contrast(x, page) for x in mixed) > 1.1
    assert min(contrast(x, text) for x in mixed) > 4.5


def test_labels_of_moved_items_do_not_cover_each_other(tiny, t):
    moved = moved_items(t, load_task("emotions/happiness").take(8), 4)
    (ax,) = moved.show().axes
    places = sorted(x.get_position()[1] for x in ax.texts)
    assert len(places) == len({*moved.ends()[0].item, *moved.ends()[1].item})
    assert np.diff(places).min() > np.ptp([moved.before.margin, moved.after.margin]) / 20


def test_a_damage_is_like_what_plain_logits_say(tiny):
    texts = Corpus("some", [f"The harbour number {i} was quiet on that day." for i in range(8)])
    found, bench = damage_anchors(tiny, texts), Bench(tiny, -1, neutral=texts)
    before, read = bench.texts
    kl = []
    for ids in encode(tiny, read):
        z = engine(tiny).logits(*pad(tiny, [ids[:-1]]), KEEP)[0].log_softmax(-1)  # (KEEP, vocabulary)
        kl.append([(z.exp() * (z - (z / T).log_softmax(-1))).sum(-1).mean().item() for T in TEMPERATURES])
    *warm, led = found.values()
    np.testing.assert_allclose(warm, np.mean(kl, 0), rtol=1e-4)
    alone = [
        Bench(tiny, 0, load_task("emotions/happiness").take(1), texts).words(f"{x} ") for x in before[:3]
    ]
    assert led == pytest.approx(np.mean([damage.mean for _, damage in alone]), rel=1e-3)


def test_what_a_view_cannot_show_is_said(tiny, t):
    pairs = load_pairs("emotions/happiness", "test")
    with pytest.raises(ValueError, match="several states a text"):
        separation(t, pairs, "all")
    with pytest.raises(ValueError, match="seed=5 is of sampling"):
        ladder(t, "It rained", [1], seed=5)
    task = load_task("emotions/happiness").take(2)
    with pytest.raises(ValueError, match="tasks of one name"):
        together(t, t, [task, task])
    with pytest.raises(ValueError, match="p is \\(1, 1\\), changes are \\(1, 2\\)"):
        plot_matrix(np.zeros((1, 2)), np.zeros((1, 1)), ["joy"], ["honesty", "power"])
    with pytest.raises(ValueError, match="no neutral text has more than"):
        damage_anchors(tiny, Corpus("short", [str(k) for k in range(60)]))


def test_two_at_once_add_up_where_steps_are_small(tiny, t):
    task = load_task("emotions/happiness").take(4)
    other = place(torch.randn(len(t.direction), generator=torch.Generator().manual_seed(3)), tiny, layer=1)
    small = together(replace(t, dose=0.01), replace(other, dose=0.01), [task]).table.iloc[0]
    assert small["both"] == pytest.approx(small["sum"], abs=0.1 * abs(small.iloc[1:3]).max())


def test_two_of_one_name_are_told_apart(t):
    row = together(t, t, []).data["rows"][0]
    assert row[t.name] == row[f"{t.name} (2)"] < row["both"]


def test_what_is_printed_fits_a_screen(t):
    pairs = load_pairs("emotions/happiness")
    for view in (separation(t, pairs), moved_items(t, load_task("emotions/happiness").take(40))):
        lines = repr(view).splitlines()
        assert len(view.table) >= 40 and 2 < len(lines) <= 12 and max(map(len, lines)) < 260


def test_words_of_every_layer_are_said(tiny, t):
    deeper = place(extract_concept(tiny, load_pairs("emotions/happiness"), [2]), tiny, layer=2, dose=0.3)
    said = direction_words(joined([t, deeper])).columns
    assert [*said] == [f"own ({t.target.name}, layer {k})" for k in (1, 2)]
    assert said.popitem()[1] == direction_words(deeper).columns[f"own ({t.target.name})"]


def test_what_is_no_text_is_refused(t):
    with pytest.raises(ValueError, match="no token to read"):
        token_heat(t, "")
    with pytest.raises(ValueError, match="'str' instances are not allowed"):
        farthest_texts(t, "It rained")


def test_what_is_shown_is_escaped(tiny, t):
    pairs = load_pairs([{"positive": f"{HOSTILE} joy", "negative": "no"}, {"positive": "a", "negative": "b"}])
    named = replace(t, name=HOSTILE)
    views = (
        ladder(named, HOSTILE, [1], max_new_tokens=3),
        words_of(HOSTILE, {HOSTILE: (tiny, t.direction)}, 2, HOSTILE),
        Along(HOSTILE, "texts", "cosine", {HOSTILE: 1.0}),
        token_heat(named, HOSTILE),
        separation(named, replace(pairs, name=HOSTILE)),
    )
    for view in views:
        page = view._repr_html_()
        assert "<script" not in page and html.escape(HOSTILE)[:8] in page


def test_a_row_of_the_source_is_the_sources(tiny, t):
    joy, other = extract_concept(tiny, load_pairs("sentiment"), [1]), tiny_model("llama", seed=3)
    carried = replace(t, source=model_info(tiny), source_layer=1)
    for source, said in ((None, "is no model"), (other, "belongs to tiny-llama-0")):
        with pytest.raises(ValueError, match=said):
            direction_words(carried, joy, source)
        with pytest.raises(ValueError, match=said):
            token_heat(carried, "It rained", joy, source)
    assert model_info(tiny).name in token_heat(carried, "It rained", joy, tiny).rows


def test_what_does_not_go_together_is_said(tiny, t):
    with pytest.raises(ValueError, match="positions 'last'"):
        together(t, replace(t, positions="last"), [])
    for view in (lambda: farthest_texts(t, ["a"], -1), lambda: moved_items(t, load_task("cloze"), 0)):
        with pytest.raises(ValueError, match="'n': Input should be greater than 0"):
            view()


@pytest.mark.parametrize("v", [torch.zeros(48), torch.ones(47), torch.ones(1), [float("nan")] * 48, "joy"])
def test_a_push_needs_a_direction(tiny, v):
    with pytest.raises(ValueError, match="direction"):
        pushes(tiny, v)
