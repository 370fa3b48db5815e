"Where something is added to the residual stream, wherever the padding stands and however a model runs."

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from concept_transfer.concepts import POSITIONS, Position, activations, extract_concept
from concept_transfer.data import load_pairs
from concept_transfer.engine import Local, attach, encode, engine, pad
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, tiny_model
from concept_transfer.steering import Transplant, adding, generate, place, residual_norm, seeded
from concept_transfer.tasks import load_task
from concept_transfer.toys import TINY
from concept_transfer.views import direction_words, farthest_texts, ladder

PROMPTS = ["The cat sat on the mat and", "Rain", "We walked home along the river"]


def but_first(h, mask):
    "All tokens but the first of each text."
    return (mask.cumsum(1) > 1)[:, -h.shape[1] :]


def after(k):
    return lambda h, mask: (mask.cumsum(1) > k)[:, -h.shape[1] :]


def toy(m, **options):
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    return place(v, m, 2, dose=1.0, positions=but_first, **options)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.slow
def test_a_rule_that_counts_tokens_generates_as_if_a_prompt_were_alone(family):
    m = tiny_model(family)
    t = toy(m)
    alone = [t.generate(p, max_new_tokens=6) for p in PROMPTS]
    assert t.generate(PROMPTS, max_new_tokens=6) == alone
    far = toy(load_model(m, remote="local"), norm=t.norm)
    assert far.generate(PROMPTS, max_new_tokens=6) == alone


@pytest.mark.parametrize("remote", [False, "local"])
def test_a_rule_that_counts_tokens_steers_choices_as_if_they_were_read_alone(remote):
    "Several answers behind one prompt have a mask of their own kind."
    near = tiny_model("llama")
    m, task = near if not remote else load_model(near, remote=remote), load_task("emotions/happiness").take(4)
    t = toy(m)
    found, want = Bench(m, 2, task).ask(t), []
    with toy(near)():
        for item in task.items:
            prompt, *whole = encode(near, [item.prompt + c for c in ("", *item.choices)])
            n = min(i for i, ids in enumerate(zip(prompt + [-1], *whole)) if len(set(ids)) > 1)  # noqa: B905
            lps = [engine(near).logits(*pad(near, [x], left=True), len(x))[0].log_softmax(-1) for x in whole]
            ends = [range(n, len(x)) for x in whole]
            want.append([sum(lp[j - 1, x[j]] for j in r) for lp, x, r in zip(lps, whole, ends, strict=True)])
    np.testing.assert_allclose(np.array(found.logp), np.array(want), atol=1e-3)


def test_padding_is_left_alone_in_a_pass_of_ones_own():
    m = tiny_model("gpt2")
    t, ids = toy(m), encode(m, PROMPTS)
    with t():
        together = engine(m).logits(*pad(m, ids, left=True))
        alone = torch.cat([engine(m).logits(*pad(m, [x])) for x in ids])
        with torch.no_grad(), m.trace(input_ids=torch.tensor(ids[:1])):  # no mask at all
            bare = m.output.logits[:, -1:].save()
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bare, alone[:1], atol=1e-4, rtol=1e-4)


def test_a_rule_is_one_entry(monkeypatch, tmp_path):
    m = tiny_model("llama")
    monkeypatch.setitem(POSITIONS, "third", Position("third", read=lambda h: h[2], write=after(2)))
    t = place(torch.ones(48), m, 2, positions="third")
    t.save(tmp_path / "t")
    again = Transplant.load(tmp_path / "t", m)
    assert again.positions == "third" and again.generate(PROMPTS) == t.generate(PROMPTS)
    h = torch.zeros(1, 4, 48)
    assert adding(torch.ones(48), "third")(h)[0, :, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="'but_first' cannot be kept .* or use last, all, third"):
        toy(m).save(tmp_path / "u")


# what users give


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def push(llama):
    return place(torch.ones(48), llama, 1, dose=1.0)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.slow
def test_G1_every_prompt_has_its_own_strength(llama, push, kind, remote):
    t = replace(push, model=load_model(llama, remote=remote)) if remote else push
    each = [0.0, 1.0, -0.5]
    want = [push.generate(p, s, 4) for p, s in zip(PROMPTS, each, strict=True)]
    assert t.generate(PROMPTS, kind(each), 4) == want and len(set(want)) == 3


def test_G1_strengths_and_texts_are_as_many(llama, push):
    with push([0.0, 1.0]) as m:
        ids = pad(m, encode(m, PROMPTS[:2]), left=True)
        both = engine(m).logits(*ids)
    with push(1.0):
        steered = engine(m).logits(*ids)
    torch.testing.assert_close(both, torch.stack([engine(m).logits(*ids)[0], steered[1]]))
    for each in ([1.0], [1.0] * 4):
        with pytest.raises(ValueError, match=f"{len(each)} strengths for 3 texts"):
            push.generate(PROMPTS, each, 3)
    with pytest.raises(ValueError, match="strength \\[\\]"):
        push.generate(PROMPTS, [], 3)


NO_NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    None,
    "1",
    "nan",
    b"1",
    torch.tensor(torch.nan),
    np.float32("inf"),
]


@pytest.mark.parametrize("wrong", NO_NUMBERS, ids=repr)
def test_G3_103_what_is_no_number_is_refused(llama, push, wrong):
    for use in (
        lambda: push.vector(wrong),
        lambda: push.generate("Rain", wrong, 3),
        lambda: push.generate(PROMPTS, [1.0, wrong, 1.0], 3),
        lambda: push(wrong).__enter__(),
        lambda: push(alpha=wrong if wrong is not None else "2").__enter__(),
    ):
        with pytest.raises(ValueError, match="give a finite number"):
            use()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -1.0, "1"], ids=repr)
def test_103_dose_and_norm_are_checked_before_anything_is_read(llama, wrong, monkeypatch):
    monkeypatch.setattr("concept_transfer.steering.residual_norm", None)  # reading would fail
    for name in ("dose", "norm"):
        with pytest.raises(ValueError, match=f"place '{name}'"):
            place(torch.ones(48), llama, 1, **{name: wrong})


def test_numbers_of_numpy_and_torch_are_numbers(llama, push):
    t = place(torch.ones(48), llama, np.int64(1), dose=np.float32(1.0), norm=np.float64(push.norm))
    assert (t.layer, t.dose, type(t.layer)) == (1, 1.0, int)
    for one in (1, np.float32(1), torch.tensor(1.0), np.int64(1)):
        assert t.generate("Rain", one, 3) == push.generate("Rain", 1.0, 3)


SHAPES = [
    {"num_return_sequences": 3, "do_sample": True},
    {"num_return_sequences": 2, "num_beams": 2},
    {"return_dict_in_generate": True},
    {"output_scores": True},
    {"max_length": 9},
    {"generation_config": object()},
    {"attention_mask": torch.ones(1, 4)},
]


@pytest.mark.parametrize("options", SHAPES, ids=lambda options: next(iter(options)))
def test_G4_options_that_change_what_comes_back_are_refused(llama, push, options):
    for use in (
        lambda: generate(llama, "Rain fell", 4, **options),
        lambda: push.generate("Rain", 1.0, 4, **options),
    ):
        with pytest.raises(ValueError, match="one text of max_new_tokens"):
            use()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("most", [9, 2, 1])  # prompts that memory suffices for
def test_G1_every_prompt_keeps_its_strength_with_beams_and_in_halves(llama, push, beams, most):
    class Scarce(Local):
        def generate(self, ids, mask, **options):
            if len(ids) > most:
                raise MemoryError
            return super().generate(ids, mask, **options)

    m, each = load_model(llama), [0.0, 1.0, -0.5]
    want = [push.generate(p, s, 5, num_beams=beams) for p, s in zip(PROMPTS, each, strict=True)]
    t = replace(push, model=attach(m, Scarce(m)))
    assert t.generate(PROMPTS, each, 5, num_beams=beams) == want and len(set(want)) == 3
    for wrong in ([1.0, 2.0], [1.0] * 9):
        with pytest.raises(ValueError, match=f"{len(wrong)} strengths for 3 texts"):
            t.generate(PROMPTS, wrong, 5, num_beams=beams)


def test_a_generation_within_another_leaves_its_place(llama):
    "`last` writes to the end of the prompt and all behind it, whoever generates meanwhile."

    def meanwhile(ids, scores, **_):
        generate(llama, "It", 1)
        return torch.zeros(len(ids), dtype=torch.bool)

    t = place(
        torch.randn(48, generator=torch.Generator().manual_seed(0)), llama, 1, dose=2.0, positions="last"
    )
    how = dict(max_new_tokens=8, use_cache=False)
    for p in PROMPTS:
        assert t.generate(p, **how, stopping_criteria=[meanwhile]) == t.generate(p, **how)


WRONG_KINDS = {
    "stop_strings": 5,
    "do_sample": "no",
    "num_beams": "2",
    "num_beams ": True,
    "top_k": 2.5,
    "repetition_penalty": [1.2],
    "max_time": "soon",
    "min_new_tokens": -1,
    "temperature": float("nan"),
    "top_p": 2.0,
    "typical_p": -0.1,
    "epsilon_cutoff": 1.5,
    "use_cache": "no",
    "suppress_tokens": ["a"],
    "eos_token_id": "</s>",
    "logits_processor": 5,
    "streamer": 5,
    "prefix_allowed_tokens_fn": 5,
    "custom_generate": "someone/code",
    "trust_remote_code": True,
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_options_of_another_kind_are_named_with_their_value(llama, push, name):
    option, value = name.strip(), WRONG_KINDS[name]
    for use in (generate, lambda m, *args, **how: push.generate(args[0], 1.0, *args[1:], **how)):
        with pytest.raises(ValueError, match=option) as said:
            use(llama, PROMPTS, 3, **{option: value})
        assert repr(value) in str(said.value) or "one by one" in str(said.value)


def test_a_fault_of_a_users_own_function_is_not_called_an_option(llama):
    def broken(h, mask):
        raise TypeError("of mine")

    with pytest.raises(TypeError, match="of mine"):
        place(torch.ones(48), llama, 1, dose=1.0, positions=broken).generate("Rain", 1.0, 3)


def test_an_option_that_is_none_is_the_default(llama):
    want = generate(llama, PROMPTS, 5)
    for option in ("use_cache", "num_beams", "stop_strings", "logits_processor", "eos_token_id"):
        assert generate(llama, PROMPTS, 5, **{option: None}) == want, option
    assert generate(llama, PROMPTS, 5, tokenizer=llama.tokenizer) == want


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_103_a_finite_strength_that_overflows_is_an_error(push, how):
    with pytest.raises(ValueError, match="logits are not finite"):
        push.generate("Rain fell", 1e38, 3, **how)


def test_G4_options_are_honoured_or_refused(llama, push):
    two = ["Rain fell", "The cat sat on the mat"]
    assert push.generate(two, 1.0, 5, num_beams=3) == [push.generate(p, 1.0, 5, num_beams=3) for p in two]
    assert generate(llama, two, 5, num_return_sequences=1, output_scores=False) == generate(llama, two, 5)
    with pytest.raises(ValueError, match="do_sample"):
        generate(llama, two, 5, temperature=0.7)
    with pytest.raises(ValueError, match="'do_smaple'. Did you mean 'do_sample'"):
        generate(llama, two, 5, do_smaple=True)
    for n in (0, -1, 2.5, "4", None):
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate(llama, two, n)


PASSED_OVER = {
    "labels": [[1]],
    "position_ids": [[0]],
    "negative_prompt_ids": torch.ones(2, 3).long(),
    "negative_prompt_attention_mask": torch.ones(2, 3).long(),
    "stop_strings": [""],
    "self": 1,
    "kwargs": {},
    "bos_token_id": 3,
    "low_memory": True,
    "num_assistant_tokens": 3,
    "max_time": -1.0,
    "num_beams": 0,
    "eos_token_id": torch.tensor([10**6]),
    "suppress_tokens": torch.tensor([10**6]),
    "pad_token_id": 1.5,
    "prefill_chunk_size": 0,
    "cache_implementation": "offloaded",
    "watermarking_config": {"x": 1},
}


@pytest.mark.parametrize("option", PASSED_OVER)
def test_options_that_transformers_passes_over_are_refused_in_words(llama, option):
    with pytest.raises(ValueError, match=option):
        generate(llama, PROMPTS, 5, **{option: PASSED_OVER[option]})


def test_early_stopping_may_be_never(llama):
    assert generate(llama, PROMPTS, 5, num_beams=2, early_stopping="never")


@pytest.fixture
def last(llama):
    v = torch.randn(48, generator=torch.Generator().manual_seed(1))
    return place(v, llama, 1, dose=2.0, norm=5.0, positions="last")


@pytest.mark.parametrize("cache", ["static", "sliding_window"])
def test_a_cache_of_fixed_size_changes_nothing(last, cache):
    want = [last.generate(p, 1.0, 6) for p in PROMPTS]
    assert last.generate(PROMPTS, 1.0, 6, cache_implementation=cache) == want


def test_guidance_goes_with_all_positions_alone(llama, last):
    with pytest.raises(ValueError, match="do not go with guidance_scale"):
        last.generate(PROMPTS, 1.0, 6, guidance_scale=2.0)
    t = replace(last, positions="all")
    assert t.generate(PROMPTS, 1.0, 6, guidance_scale=2.0) == [
        t.generate(p, 1.0, 6, guidance_scale=2.0) for p in PROMPTS
    ]


@pytest.mark.parametrize("remote", [False, "local"])
def test_logits_that_are_no_numbers_or_not_of_each_text_are_refused(llama, last, remote):
    m = load_model(llama, remote=remote) if remote else llama
    t = replace(last, model=m)
    with pytest.raises(ValueError, match="logits are not finite"):
        t.generate(PROMPTS, 1e38, 3)
    for processor, why in (
        (lambda i, s: s * float("nan"), "not finite"),
        (lambda i, s: s[:1], "a row for each"),
    ):
        with pytest.raises(ValueError, match=why):
            generate(m, PROMPTS, 3, logits_processor=[processor])


def test_what_is_given_twice_or_for_nothing_is_said(llama, last, tmp_path):
    with pytest.raises(ValueError, match="3 strengths for 2 texts"):
        last.generate(PROMPTS[:2], [0.0, 0.0, 0.0])
    assert hash(last) == hash(replace(last)) and {last, replace(last)} == {last}


WISHES = {
    "repetition_penalty": 1.8,
    "num_return_sequences": 2,
    "num_beams": 2,
    "do_sample": True,
    "temperature": 5.0,
    "suppress_tokens": [*range(2, 300)],
    "min_new_tokens": 12,
    "no_repeat_ngram_size": 1,
    "forced_eos_token_id": 5,
    "max_length": 3,
    "return_dict_in_generate": True,
    "stop_strings": ["a"],
    "exponential_decay_length_penalty": (1, 5.0),
}


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.slow
def test_G7_77_wishes_of_the_model_change_nothing(wish, remote, push):
    m = tiny_model("llama")
    want = generate(m, PROMPTS, 12)
    for k in {wish, "num_beams"} if "num" in wish else {wish}:
        setattr(m._module.generation_config, k, WISHES[k])
    assert generate(load_model(m, remote=remote) if remote else m, PROMPTS, 12) == want


@pytest.mark.parametrize("remote", [False, "local"])
def test_G8_stop_strings_get_the_tokenizer(llama, remote):
    m, long = load_model(llama, remote=remote) if remote else llama, generate(llama, "Rain fell", 12)
    stop = long[4:6]
    assert generate(m, "Rain fell", 12, stop_strings=[stop]) == generate(
        m, "Rain fell", 12, stop_strings=stop
    )
    said = generate(m, "Rain fell", 12, stop_strings=[stop])
    assert long.startswith(said) and stop in said and len(said) < len(long)


OTHER_WAYS = [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}]


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("how", OTHER_WAYS, ids=str)
@pytest.mark.slow
def test_G10_greedy_text_does_not_depend_on_the_cache(llama, push, how, remote):
    p = "The cat sat on the mat. The cat sat on the mat."
    m = load_model(llama, remote=remote) if remote else llama
    for where in ("last", "all", but_first):
        t = replace(push, positions=where, model=m)
        want = replace(t, model=llama).generate(p, 1.0, 12)
        assert t.generate(p, 1.0, 12, **how) == want, where
        with t():
            assert generate(m, p, 12, **how) == want, where
    assert generate(m, p, 12, **how) == generate(llama, p, 12)


@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.slow
def test_C3_prompt_and_continuation_are_the_whole_text(family):
    m = tiny_model(family)
    tok = m.tokenizer
    for prompt in (*PROMPTS, "Rain fell on", "naïve 😀"):
        said = generate(m, prompt, 6)
        (ids,) = encode(m, [prompt])
        new = engine(m).generate(*pad(m, [ids], left=True), max_new_tokens=6, do_sample=False, pad_token_id=1)
        assert tok.decode(ids, skip_special_tokens=True) + said == tok.decode(
            new[0], skip_special_tokens=True
        )


def test_C3_the_first_space_stays(llama):
    the = llama.tokenizer.convert_tokens_to_ids("\u2581the")
    assert generate(llama, "Rain fell on", 1, prefix_allowed_tokens_fn=lambda b, ids: [the]) == " the"


def test_B9_prompts_may_be_an_array(llama, push):
    assert generate(llama, np.array(PROMPTS), 4) == generate(llama, PROMPTS, 4)
    assert push.generate(np.array(PROMPTS), 1.0, 4) == push.generate(PROMPTS, 1.0, 4)


def test_C4_a_chat_is_one_prompt():
    m = load_model(tiny_model("llama"))
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="template"):
        generate(m, chat, 3)
    m.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    )
    one = generate(m, chat, 3)
    assert isinstance(one, str) and generate(m, [chat, chat], 3) == [one, one]


@pytest.mark.parametrize(
    "given",
    [np.ones(48), [1.0] * 48, (1,) * 48, np.ones((1, 48), np.float16), torch.nn.Parameter(torch.ones(48))],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.slow
def test_K1_directions_of_any_kind(llama, push, given):
    t = place(given, llama, 1, dose=1.0)
    assert torch.equal(t.vector(), push.vector()) and not t.direction.requires_grad
    assert Bench(llama, 1).place(given, dose=1.0).direction.equal(push.direction)
    if isinstance(given, np.ndarray):
        given[...] = 5  # the caller's own array is another one
        assert t.direction.max() == 1


@pytest.mark.parametrize("v", [torch.ones(1), torch.tensor(1.0), torch.ones(3, 1), torch.ones(47)])
def test_what_is_added_has_the_width_of_the_states(v):
    with pytest.raises(ValueError, match="cannot be added to states of width 48"):
        adding(v)(torch.zeros(3, 2, 48))


@pytest.mark.parametrize(
    "wrong",
    [
        *("joy", None, 5, {"a": 1}, ["a"] * 48, np.array(["a"] * 48), [[1.0], [1.0, 2.0]], torch.ones(2, 48)),
        *(np.ones(47), [float("nan")] * 48, torch.zeros(48), torch.full((48,), torch.inf)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_K1_what_is_no_direction_is_refused(llama, wrong):
    with pytest.raises(ValueError):
        place(wrong, llama, 1)


def test_swapped_arguments_are_told(llama, push):
    joy = extract_concept(llama, load_pairs("honesty"), [1])
    for use, name in (
        (lambda: place(llama, joy, 1), "concept"),
        (lambda: place(joy, "smollm2-135m-instruct", 1), "target"),
        (lambda: place(joy, llama, map={}), "map"),
        (lambda: place(joy, llama, "1"), "layer"),
        (lambda: place(joy, llama, 1.5), "layer"),
        (lambda: place(joy, llama, 1, positions=3), "positions"),
        (lambda: generate(PROMPTS, llama), "model"),
        (lambda: generate(llama, 5), "prompts"),
    ):
        with pytest.raises(ValueError, match=f"'{name}'"):
            use()
    for use in (
        lambda: extract_concept("smollm2-135m-instruct", load_pairs("honesty")),
        lambda: extract_concept(joy, joy),
    ):
        with pytest.raises(ValueError, match="load_model gives one"):
            use()
    with pytest.raises(ValueError, match="ContrastPairs"):
        extract_concept(llama, "emotions/happiness")
    for seed in (-1, 1.5, "a"):
        with pytest.raises(ValueError, match="seed"):
            extract_concept(llama, load_pairs("honesty"), [1], seed=seed)


@pytest.mark.parametrize("layers", ["12", [1.5], [], ["1"], 1, [None]], ids=str)
def test_107_layers_are_whole_numbers(llama, layers):
    with pytest.raises(ValueError, match="layers .*: give at least one whole number"):
        extract_concept(llama, load_pairs("honesty"), layers)


def test_the_norm_is_of_a_model_a_layer_and_texts(llama):
    for given in (
        ("llama", 1),
        (llama, 1.5),
        (llama, 9),
        (llama, 1, "Rain fell"),
        (llama, 1, []),
        (llama, 1, [5]),
    ):
        with pytest.raises(ValueError):
            residual_norm(*given)


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_steered_generations(llama):
    "Contexts are opened and closed as often; what was freed once is used again."
    t, process = place(torch.ones(48), llama, 1, dose=0.1), psutil.Process()

    def grown(n):
        for k in range(n):
            t.generate("It rained", 1 + k % 3, 2)
        gc.collect()
        return process.memory_info().rss / 1e6

    settled = grown(200)
    assert grown(1000) - settled < 5  # MB


# what would do nothing, or something else, without a word


def test_a_direction_whose_length_is_no_number_is_refused(llama, push, tmp_path):
    "Divided by an infinite norm it was zero, and steering did nothing."
    for strange in (
        torch.full((48,), 1e38),
        torch.full((48,), 1e-42),
        torch.ones(48, device="meta"),
        [10**400],
    ):
        with pytest.raises(ValueError, match="direction"):
            place(strange, llama, 1, norm=5.0)
    with pytest.raises(ValueError, match="direction.*too long"):
        replace(push, direction=torch.full((48,), 1e38))
    half = replace(push, direction=torch.full((48,), 6e4).half())  # its norm is beyond float16
    assert torch.allclose(half.vector(), push.vector())
    with pytest.raises(ValueError, match="norm"):
        replace(push, norm=0.0)


def test_a_transplant_stands_in_its_own_target(push):
    with pytest.raises(ValueError, match="transplant 'direction' belongs to tiny-llama-0"):
        replace(push, model=tiny_model("gpt2"))


def test_strength_and_alpha_exclude_each_other(push):
    for strength in (2.0, [1.0, 2.0], torch.zeros(2)):
        with pytest.raises(ValueError, match="give one of them"), push(strength, alpha=1.0):
            pass
    with push(alpha=1.0) as model:
        assert generate(model, "It rained", 2) != "x"
    with pytest.raises(ValueError, match="finite number"):
        push.vector(10**400)


@pytest.mark.parametrize(
    "option", [{"eos_token_id": 10**9}, {"suppress_tokens": [3, -1]}, {"bad_words_ids": [[10**9]]}]
)
def test_tokens_that_there_are_not_are_refused(option):
    with pytest.raises(ValueError, match="this tokenizer has no token"):
        generate(tiny_model("llama"), "Rain", 3, **option)


def test_a_complex_direction_is_none():
    for v in (torch.ones(48) * 1j, np.ones(48) * (1 + 1j)):
        with pytest.raises(ValueError, match="row of real numbers"):
            place(v, tiny_model("llama"), 1)


def test_a_strength_for_each_text_is_not_read_under():
    "Readings sort their texts, and would give a strength to another one."
    m = tiny_model("llama")
    t = place(torch.ones(48), m, 1)
    with t([0.0, 3.0]), pytest.raises(ValueError, match="read under one strength"):
        activations(m, ["A b", "It rained all day"], [3])
    with t([0.0, 3.0]), pytest.raises(ValueError, match="read under one strength"):
        Bench(m, 1, load_task("knowledge").take(2)).ask()
    with t(3.0):
        assert len(activations(m, ["A b", "It rained all day"], [3])) == 2


@pytest.mark.parametrize("seed", [1.5, "1", True, -1])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed"), seeded(seed):
        pass


@pytest.mark.slow
def test_seeded_texts_are_the_same_in_threads():
    t = place(torch.ones(48), tiny_model("llama"), 1)

    def written(seed):
        with seeded(seed):
            return t.generate("It rained all", 1.0, 12, do_sample=True)

    want = [written(s) for s in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(written, [*range(4)] * 5)] == want * 5


@pytest.mark.parametrize("prompts", [(x for x in "ab"), None, Path("x"), 3])
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="a text, a chat or a list of these is needed"):
        place(torch.ones(48), tiny_model("llama"), 1).generate(prompts)


def test_prompts_come_as_arrays_and_columns_too():
    t, texts = place(torch.ones(48), tiny_model("llama"), 1), ["It rained", "A b"]
    want = t.generate(texts, 1.0, 3)
    assert t.generate(np.array(texts), 1.0, 3) == t.generate(pd.Series(texts), 1.0, 3) == want


def test_least_and_most_new_tokens_go_together():
    with pytest.raises(ValueError, match="min_new_tokens is more than max_new_tokens"):
        generate(tiny_model("llama"), "Rain", 3, min_new_tokens=9)
    with pytest.raises(ValueError, match="min_length=99: prompt and max_new_tokens have but"):
        generate(tiny_model("llama"), "Rain", 3, min_length=99)


@pytest.mark.parametrize("kind, strength", [(torch.float32, 1e30), (torch.float16, [1.0, 1e6])])
def test_what_a_model_has_no_numbers_for_is_not_added(kind, strength):
    m = tiny_model("llama")
    m._module.to(kind)
    t = place(torch.ones(48), m, 1, dose=1.0, norm=1.0)
    with pytest.raises(ValueError, match=f"is beyond {kind}"):
        t.generate(["Rain", "Snow"], strength, 3)


@pytest.mark.parametrize(
    "use", [partial(ladder, prompt="A"), direction_words, partial(farthest_texts, texts=["A"])]
)
def test_what_needs_a_model_says_so(use):
    alone = replace(place(torch.ones(48), tiny_model("llama"), 1), model=None)
    with pytest.raises(ValueError, match="has no model: load it with"):
        use(alone)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beam_groups": 2},
        {"diversity_penalty": 0.5},
        {"target_lookbehind": 3},
        {"assistant_lookbehind": 3},
    ],
)
def test_options_of_beams_and_helpers_that_are_not_there_are_refused(llama, option):
    with pytest.raises(ValueError, match="does nothing"):
        generate(llama, PROMPTS, 3, **option)


def test_a_truth_is_no_strength():
    g = tiny_model("gpt2")
    with pytest.raises(ValueError, match="strength True"):
        place(torch.ones(48), g, 1).vector(True)
