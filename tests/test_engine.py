"What an engine promises: a third one, of one class and without nnsight, gives the numbers of `Local`."

import asyncio
import contextlib
import copy
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import nnsight
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from concept_transfer.arms import Settings
from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.engine import (
    CHUNK,
    Local,
    attach,
    bundled,
    encode,
    engine,
    gathered,
    hidden_of,
    layer_numbers,
    left_batches,
    length_batches,
    pad,
    passing,
    rows_of,
    steered,
    stream,
    with_hidden,
    wrapped,
)
from concept_transfer.evidence import evaluate
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, model_info, tiny_model
from concept_transfer.pairing import paired_tokens
from concept_transfer.remote import Remote, job
from concept_transfer.steering import generate, place
from concept_transfer.tasks import load_task, multiple_choice
from concept_transfer.toys import TINY, tiny_module, tiny_tokenizer


class Hooks:
    "A model that runs here through plain PyTorch hooks."

    name, tokens, precision, own_products = "hooked", 1000, "float32", True
    here, sketches, gradient = True, (), None

    def __init__(self, model):
        self.model, self.weights, self.calls = model, engine(model).weights, set()

    def branching(self, tokens):
        return False

    @contextlib.contextmanager
    def steer(self, layer, change, masked=False):
        self.calls.add("steer")
        seen = []

        def before(module, args, given):
            seen[:] = [given.get("attention_mask")]

        def hook(module, args, output):
            return with_hidden(output, change(hidden_of(output), *(seen if masked else ())))

        inner = self.model._module
        handles = [inner.register_forward_pre_hook(before, with_kwargs=True)]
        handles.append(self.model.layers[layer]._module.register_forward_hook(hook))
        try:
            yield self.model
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, ids, mask, **options):
        where = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return self.model._module(
                input_ids=ids, attention_mask=mask, position_ids=where, **options
            ).logits

    def generate(self, ids, mask, **options):
        self.calls.add("generate")
        with torch.no_grad():
            return self.model._module.generate(input_ids=ids, attention_mask=mask, **options)

    def states(self, ids, layers, at, take=None, batch_tokens=512):
        self.calls.add("states")
        for rows in length_batches(ids, batch_tokens):
            (x, mask, wanted), seen = gathered(self.model, rows, ids, at), {}
            with contextlib.ExitStack() as stack:
                for k in set(layers):
                    stack.enter_context(self.steer(k, partial(self.see, seen, k)))
                self.forward(x, mask)
            yield rows, [take(seen[k], wanted) if take else seen[k][wanted] for k in layers]

    @staticmethod
    def see(seen, k, h):
        seen[k] = h.clone()
        return h

    def scores(self, layer, batches, reduce):
        def run(changes):
            self.calls.add("scores")
            out = [[] for _ in changes]
            for b in batches:
                base = None
                if b.plain:
                    base = reduce(self.forward(*b.plain, logits_to_keep=b.keep), None, b.extra)
                for change, row in zip(changes, out, strict=True):
                    with contextlib.ExitStack() as opened:
                        for k, own in change(b).items():
                            opened.enter_context(self.steer(k, own))
                        row.append(reduce(self.forward(b.ids, b.mask, logits_to_keep=b.keep), base, b.extra))
                    run.read += len(b.rows)
            return out

        run.read = 0
        return run

    def sums(self, texts, prepare, into, notes=None, tokens=0):
        self.calls.add("sums")
        for part in bundled(texts, len, CHUNK):
            (chunk,) = prepare([part])
            Y = rows_of(self.model, chunk.ids, chunk.at, into.target_layers)
            yield partial(into.take, chunk, Y)


def close(a, b, eps=1e-4):
    assert float((a - b).abs().max()) <= eps * max(1.0, float(b.abs().max()))


@pytest.fixture(scope="module")
def corpus():
    return Corpus("scenes", [x for e in ("fear", "anger") for x in load_pairs(f"emotions/{e}").texts][:100])


def whole_way(source, target, corpus):
    "From a concept to the evidence."
    joy = extract_concept(source, load_pairs("emotions/happiness"))
    maps = fit_maps(source, target, corpus, [1, 2], [2], template=joy.template)
    t = place(joy, target, map=maps[1, 2], dose=0.5)
    neutral, task = Corpus("some", load_corpus("neutral").texts[:8]), load_task("emotions/happiness").take(4)
    how = dict(experiments=("equal_damage", "equal_norm"), settings=Settings(random=1, bootstrap=100))
    e = evaluate(t, task, neutral, pairs=load_pairs("emotions/happiness"), **how)
    return joy, t, e, t.generate(["The cat", "It rained all day and"], max_new_tokens=5)


@pytest.mark.slow
def test_a_third_engine_is_one_class(corpus):
    near = tiny_model("llama", max_position_embeddings=512), tiny_model("gpt2", seed=3, n_positions=512)
    hooked = [load_model(m) for m in near]
    for m in hooked:
        attach(m, Hooks(m))
    (joy, t, e, texts), (joy2, t2, e2, texts2) = (whole_way(*ms, corpus) for ms in (near, hooked))
    close(joy2.directions, joy.directions)
    close(t2.direction, t.direction)
    close(t2.vector(), t.vector())
    assert texts == texts2
    gradients = {"unembedding", "gradient"}  # which only `Local` gives
    assert gradients <= {*e2.missing} | {*e.missing}
    for a, b in zip((r for r in e.runs if r.arm not in gradients), e2.runs, strict=True):
        assert (a.arm, a.experiment, a.draw, a.answers["chosen"]) == (
            b.arm,
            b.experiment,
            b.draw,
            b.answers["chosen"],
        )
        close(torch.tensor(b.answers["margin"]), torch.tensor(a.answers["margin"]), 1e-3)
        if a.kl:
            close(torch.tensor(b.kl), torch.tensor(a.kl), 1e-3)
    assert engine(hooked[0]).calls == {"states", "steer"}
    assert engine(hooked[1]).calls == {"states", "scores", "sums", "generate", "steer"}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.slow
def test_every_family_by_hooks_too(family):
    "Reading, nested steering and going on from a layer are what a plain pass does, and leave no bit behind."
    m = tiny_model(family)
    hooked, here = Hooks(m), engine(m)
    ids = m.tokenizer(["Rain.", "The cat sat on the mat.", "We walked home."]).input_ids
    at = [range(len(x)) for x in ids]
    for (rows, a), (same, b) in zip(
        here.states(ids, [3, 1], at), hooked.states(ids, [3, 1], at), strict=True
    ):
        assert rows == same
        for x, y in zip(a, b, strict=True):
            close(x, y)
    batches = left_batches(m, ids, [[len(x) - 2, len(x) - 1] for x in ids])
    up = torch.linspace(-3, 3, 48)
    changes = [
        lambda batch: {2: lambda h: h + up},
        lambda batch: {2: lambda h: h + batch.asked[..., None] * up, 3: lambda h: 2 * h},
    ]
    tables = [e.scores(2, batches, lambda logits, base, extra: logits)(changes) for e in (here, hooked)]
    for a, b in zip(*tables, strict=True):
        for x, y in zip(a, b, strict=True):
            close(x, y)
    x = pad(m, ids, left=True)
    before = here.logits(*x)
    with here.steer(1, lambda h: h + up), here.steer(2, lambda h: 2 * h):
        one = here.logits(*x)
    with hooked.steer(1, lambda h: h + up), hooked.steer(2, lambda h: 2 * h):
        two = hooked.forward(*x, logits_to_keep=1)
    close(one, two)
    assert torch.equal(here.logits(*x), before) and not torch.equal(one, before)


def test_whose_engine():
    "The nnsight object's: not its weights', nor a copy's, and it stays behind when the object is packed."
    m = tiny_model("llama")
    own = engine(m)
    assert engine(m) is own and isinstance(own, Local) and own.name == model_info(m).name
    attach(m, Hooks(m))
    assert isinstance(engine(m), Hooks)
    assert isinstance(engine(load_model(m)), Local) and isinstance(engine(m), Hooks)  # wrapped anew
    copied = copy.deepcopy(m._module)
    assert copied is not m._module and isinstance(engine(wrapped(copied, m.tokenizer)), Local)
    assert "_attached" in m.__dict__ and copy.copy(m.__dict__["_attached"]) == {}


def test_an_edit_of_the_users_own_is_read_through():
    "nnsight's `edit` gives another object for the same weights: what runs it must run it with the edit."
    m = tiny_model("llama")
    with m.edit() as (_, louder):
        m.layers[0].output = 2 * m.layers[0].output
    plain, twice = (activations(x, ["The cat sat."], [0, 2]) for x in (m, louder))
    close(twice[0, 0], 2 * plain[0, 0])
    assert not torch.allclose(twice[0, 1], plain[0, 1])
    close(activations(m, ["The cat sat."], [0, 2]), plain)


def test_memory_that_runs_out_is_halved():
    class Cramped(Local):
        def read(self, ids, *how):
            if len(ids) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().read(ids, *how)

    m = tiny_model("gpt2")
    want = activations(m, ["One.", "Two by two.", "Three."] * 4, [2])
    attach(m, Cramped(m))
    close(activations(m, ["One.", "Two by two.", "Three."] * 4, [2]), want)


@pytest.mark.parametrize("how", [dict(), dict(at=[[0], [0]]), dict(take=lambda h, mask: h.mean(1))])
def test_states_that_are_not_finite_are_named(how):
    "However they are read; what stands in the padding is nobody's."
    module, tokenizer = tiny_module("gpt2")
    m = wrapped(module.eval().requires_grad_(False), tokenizer)
    ids = m.tokenizer(["Rain.", "The cat sat on the mat."]).input_ids
    list(stream(m, ids, [1], **how))

    def spoilt(h):
        return torch.where(torch.arange(len(h))[:, None, None] == 0, torch.nan, h)

    named = pytest.raises(ValueError, match="text 7, 'The cat sat on the mat.*not finite at layer 1")
    with steered(m, 1, spoilt), named:
        list(stream(m, ids, [1], numbers=[3, 7], **how))


def test_generation_is_steered_at_every_step():
    m = tiny_model("gpt2", seed=3)
    up = 9 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    with engine(m).steer(2, lambda h: h + up):
        there = generate(m, ["The cat", "It rained all day and"], 6)
    with Hooks(m).steer(2, lambda h: h + up):
        here = m.tokenizer.batch_decode(
            [
                m._module.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=1)[
                    0, len(ids) :
                ]
                for ids in m.tokenizer(["The cat", "It rained all day and"]).input_ids
            ],
            skip_special_tokens=True,
        )
    assert there == here and there != generate(m, ["The cat", "It rained all day and"], 6)


# whose steering it is


def random_places(m, n):
    "So many transplants of random directions, at different layers."
    g = torch.Generator().manual_seed(0)
    return [place(torch.randn(48, generator=g), m, k % 3 + 1, dose=0.8, norm=5.0) for k in range(n)]


def under(t, m, x):
    with t():
        return engine(m).logits(*x)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.slow
def test_111_eight_threads_steer_one_model(family):
    m = tiny_model(family)
    places, x = random_places(m, 8), pad(m, encode(m, ["It rained all day and", "Rain"]), True)
    want = [under(t, m, x) for t in places]
    base, words = engine(m).logits(*x), [t.generate("It rained", max_new_tokens=3) for t in places]

    def work(i):
        for k in range(10):
            assert torch.equal(under(places[i], m, x), want[i])
            if k % 5 == 0:
                assert torch.equal(engine(m).logits(*x), base)
                assert places[i].generate("It rained", max_new_tokens=3) == words[i]
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert torch.equal(engine(m).logits(*x), base)


@pytest.mark.slow
def test_111_eight_threads_with_two_hundred_passes_each():
    m = tiny_model("llama")
    places, x = random_places(m, 8), pad(m, encode(m, ["It rained all day and"]), True)
    want = [under(t, m, x) for t in places]

    def work(i):
        return sum(not torch.equal(under(places[i], m, x), want[i]) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


@pytest.mark.slow
def test_111_fifty_tasks_steer_one_model():
    "Each waits while it is open; half of them read in threads."
    m = tiny_model("gpt2")
    places, x = random_places(m, 50), pad(m, encode(m, ["It rained all day and"]), True)
    want = [under(t, m, x) for t in places]

    async def work(i):
        with places[i]():
            await asyncio.sleep(0.001 * (i % 7))
            read = partial(engine(m).logits, *x)
            got = await asyncio.to_thread(read) if i % 2 else read()
            await asyncio.sleep(0)
            return torch.equal(got, want[i]) and torch.equal(read(), want[i])

    async def all_of_them():
        return await asyncio.gather(*map(work, range(50)))

    assert all(asyncio.run(all_of_them()))


def test_111_contexts_that_close_out_of_order_close_their_own():
    m = tiny_model("llama")
    (a, b), x = random_places(m, 2), pad(m, encode(m, ["It rained"]), True)
    base, one, two = engine(m).logits(*x), a(), b()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    still = engine(m).logits(*x)
    two.__exit__(None, None, None)
    assert torch.equal(still, under(b, m, x)) and torch.equal(engine(m).logits(*x), base)
    with pytest.raises(KeyError), a():
        raise KeyError
    assert torch.equal(engine(m).logits(*x), base)


def test_111_a_model_wrapped_again_is_steered_once():
    m = tiny_model("llama")
    (t,), x = random_places(m, 1), pad(m, encode(m, ["It rained"]), True)
    want = under(t, m, x)
    for other in (load_model(m), wrapped(copy.deepcopy(m._module), m.tokenizer)):
        again = place(t.direction, other, t.layer, dose=0.8, norm=5.0)
        torch.testing.assert_close(under(again, other, x), want)


def test_111_a_trace_of_ones_own_and_a_plain_pass_are_steered():
    m = tiny_model("gpt2")
    (t,), x = random_places(m, 1), pad(m, encode(m, ["It rained"]), True)
    want = under(t, m, x)
    with t(), torch.no_grad():
        plain = m._module(input_ids=x[0], attention_mask=x[1]).logits[:, -1:]
        with m.trace(input_ids=x[0], attention_mask=x[1]):
            own = m.output.logits[:, -1:].save()
    close(plain, want)
    close(own, want)

    def turn(_):
        with t(), passing(m), m.trace(input_ids=x[0], attention_mask=x[1]):
            out = nnsight.save(m.output.logits[:, -1:])
        close(out, want)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(turn, range(12)))


def test_111_a_bench_under_another_transplant_forgets_it():
    m = tiny_model("llama")
    (a, b), task = random_places(m, 2), load_task("emotions/happiness").take(3)
    bench, fresh = Bench(m, b.layer, task), Bench(m, b.layer, task)
    with a():
        one = bench.ask()
    two = bench.ask()
    assert not np.allclose(one.logp[0], two.logp[0])
    np.testing.assert_array_equal(two.logp[0], fresh.ask().logp[0])


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.slow
def test_114_threads_read_one_model(remote):
    m, texts = tiny_model("llama"), ["The cat sat.", "Rain.", "We walked home."]
    m = load_model(m, remote=remote) if remote else m
    want = activations(m, texts)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: activations(m, texts), range(16)):
            assert torch.equal(got, want)


def test_simulated_jobs_leave_the_modules_of_other_threads_alone():
    m = load_model(tiny_model("llama"), remote="local")
    before, done, missed = (
        {"pydantic", "matplotlib", "concept_transfer.data"} & {*sys.modules},
        threading.Event(),
        [],
    )

    def look():
        while not done.is_set():
            missed.extend(before - {*sys.modules})

    other = threading.Thread(target=look)
    other.start()
    for _ in range(5):
        activations(m, ["Rain."])
    done.set()
    other.join()
    assert not missed


@pytest.mark.parametrize(
    "held", [threading.Lock(), place(torch.ones(48), tiny_model("llama"), 1)], ids=["lock", "ours"]
)
def test_a_rule_that_cannot_be_sent_is_refused_in_words(held):
    m = load_model(tiny_model("llama"), remote="local")

    def rule(h, mask):
        return mask[:, -h.shape[1] :] if held else None

    with pytest.raises(ValueError, match="cannot be sent with a request"):
        place(torch.ones(48), m, 1, positions=rule).generate("Rain", 1.0, 3)


def test_a_request_with_what_a_server_does_not_have_is_refused():
    from fastcore.basics import first  # of no server

    m = load_model(tiny_model("llama"), remote="local")
    missing = pytest.raises(ModuleNotFoundError, match="a server does not have fastcore")
    with missing, m.trace([3, 5, 7], backend=job(m, Remote(simulated=True))):
        first(m.lm_head.output.save())


def test_111_a_served_model_is_steered_for_one_thread_at_a_time():
    m = load_model(tiny_model("llama"), remote="local")
    (t, other), errors = random_places(m, 2), []
    text = t.generate("It rained", max_new_tokens=3)

    def elsewhere():
        for ask in (lambda: activations(m, ["Rain."]), lambda: other.generate("Rain", max_new_tokens=2)):
            try:
                ask()
            except Exception as e:
                errors.append(str(e))

    with t():
        job = threading.Thread(target=elsewhere)
        job.start()
        job.join()
        assert generate(m, "It rained", 3) == text
    assert len(errors) == 2 and all("steered by another thread or task" in e for e in errors)
    activations(m, ["Rain."])


# what comes in


def with_marks(template, *marks, **special):
    "A tiny model whose tokenizer puts marks around every text."
    back = copy.deepcopy(tiny_model("llama").tokenizer.backend_tokenizer)
    ids = {k: back.token_to_id(k) for k in marks}
    back.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    special = special or dict(bos_token="<s>", eos_token="</s>")
    return load_model(tiny_module("llama")[0], PreTrainedTokenizerFast(tokenizer_object=back, **special))


CHAT = [{"role": "user", "content": "Does it rain?"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


def test_C1_a_text_that_was_rendered_with_a_start_mark_gets_no_second():
    m = tiny_model("llama")
    m.tokenizer.chat_template = TEMPLATE
    text = m.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    want = m.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert encode(m, [text]) == encode(m, ["<s>" + text]) == [want]
    (ids, at), _ = paired_tokens(m, tiny_model("gpt2"), [text, "Rain fell."])
    assert ids[0] == want and ids[1] == encode(m, ["Rain fell."])[0] and at[1]
    assert encode(m, ["<s>"]) == encode(m, [""]) == [[0]]


@pytest.mark.parametrize("start", ["<s> ", ""])
def test_C2_no_text_ends_with_an_end_mark(start):
    m, plain = with_marks(f"{start}$A </s>", *start.split(), "</s>"), tiny_model("llama")
    want = [0] * bool(start) + plain.tokenizer("Rain fell", add_special_tokens=False).input_ids
    for text in ("Rain fell", "Rain fell</s>", "Rain fell</s></s>"):
        assert encode(m, [text]) == [want]
        assert paired_tokens(m, plain, [text])[0][0] == [want]
    assert not start or generate(m, "Rain fell", 5) == generate(plain, "Rain fell", 5)
    many = encode(m, ["Rain fell", "rain " * 300, "It"])
    assert len(many[1]) == 128 and not any(1 in x for x in many)
    for ask in (partial(activations, m), partial(paired_tokens, plain, m)):
        with pytest.raises(ValueError, match="text 1 is empty"):
            ask(["fine", ""])


def test_C2_marks_of_other_names():
    "As BertTokenizer puts them around every text; and an end mark may stand for a start."
    m = with_marks("<s> $A </s>", "<s>", "</s>", cls_token="<s>", sep_token="</s>")
    assert encode(m, ["Rain fell"]) == encode(tiny_model("llama"), ["Rain fell"])
    other = with_marks("</s> $A", "</s>", bos_token="</s>", eos_token="</s>")
    assert encode(other, ["Rain"])[0][0] == 1 and encode(other, ["</s>Rain</s>"]) == encode(other, ["Rain"])
    assert encode(other, [""]) == encode(other, ["</s>"]) == [[1]]
    bare = with_marks("$A", eos_token="</s>", bos_token="</s>")
    assert encode(bare, ["</s>"]) == [[1]]  # as GPT-2 starts from nothing


def test_C4_chat_messages_are_rendered_or_refused():
    m = tiny_model("llama")
    with pytest.raises(ValueError, match="text 0 is a chat .*template"):
        encode(m, CHAT)
    m.tokenizer.chat_template = TEMPLATE
    want = m.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert encode(m, CHAT) == encode(m, [CHAT]) == [want]
    assert encode(m, [CHAT, CHAT + CHAT])[0] == want
    said = generate(m, CHAT, 3)
    assert generate(m, [CHAT], 3) == [said] and isinstance(said, str)
    for wrong in ([{"role": "user"}], [{"role": "user", "content": None}], ["Hi"], [[{}]], [{"text": "Hi"}]):
        with pytest.raises(ValueError, match="text 1 is a chat .*content"):
            encode(m, ["fine", wrong])
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with pytest.raises(ValueError, match="both texts; join those of parts"):
        encode(m, parts)
    with pytest.raises(ValueError, match="text 0"):
        paired_tokens(m, m, [CHAT])


def test_C4_an_answer_that_was_begun_goes_on():
    m = tiny_model("llama")
    m.tokenizer.chat_template = TEMPLATE.replace(
        "{% endfor %}<assistant>", "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    begun, asked = encode(m, [[*CHAT, {"role": "assistant", "content": "It does"}], CHAT])
    assert m.tokenizer.decode(begun).endswith("It does") and m.tokenizer.decode(asked).endswith("<assistant>")


@pytest.mark.parametrize("text", ["half \ud800 a pair", b"bytes", None, 5, float("nan")])
def test_96_what_is_no_text_is_named(text):
    m = tiny_model("gpt2")
    for ask in (
        partial(encode, m),
        partial(activations, m),
        partial(generate, m),
        partial(paired_tokens, m, m),
    ):
        with pytest.raises(ValueError, match="text 1 is no text"):
            ask(["fine \U0001f600", text])


@pytest.mark.parametrize(
    "strange", ["one text", 5, None, {"a": "x"}, {"x"}, Corpus("c", ["x"]), np.array("x")]
)
def test_what_is_no_list_of_texts_is_not_read(strange):
    m = tiny_model("llama")
    for ask in (partial(encode, m), partial(activations, m), partial(paired_tokens, m, m)):
        with pytest.raises(ValueError, match="texts: a list is needed here"):
            ask(strange)
    with pytest.raises(ValueError, match="is no model"):
        encode(["x"], m)


@pytest.mark.parametrize("change", [lambda h: None, lambda h: h[:1], lambda h: 1.0, lambda h: h[..., :3]])
@pytest.mark.parametrize("remote", [False, "local"])
def test_a_change_that_gives_no_stream_is_said(change, remote):
    "One that works in place and returns nothing would be measured as no change at all."
    m = load_model(tiny_model("gpt2"), remote=remote)
    with pytest.raises(Exception, match="a change of the residual stream gives"):
        Bench(m, 1, load_task("emotions/fear").take(2)).ask(change)
    for call in (partial(activations, m), partial(generate, m, max_new_tokens=2)):
        gives = pytest.raises(Exception, match="a change of the residual stream gives")
        with gives, engine(m).steer(1, change):
            call(["It rained all day.", "The cat"])


def test_weights_that_were_trained_are_another_model():
    m = tiny_model("llama")
    weight, was = m._module.lm_head.weight, model_info(m)
    with torch.no_grad():
        weight.add_(0.1)
    now = model_info(m)
    assert not was.same(now) and now == model_info(load_model(m))
    m._module.bfloat16()
    assert model_info(m).precision == engine(m).precision == "bfloat16" and now.same(model_info(m))


def test_a_model_of_nnsight_is_steered_too():
    "No hook of ours was in it: it was read, and steering did nothing."
    module, tokenizer = tiny_module("llama", 0)
    raw = nnsight.TransformersModel(
        module, task="text-generation", tokenizer=tokenizer, rename={"model.layers": "layers"}
    )
    push, ours = (place(torch.ones(48), x, 1, norm=5.0, dose=3.0) for x in (raw, tiny_model("llama")))
    assert push.generate("It rained", 1.0, 5) == ours.generate("It rained", 1.0, 5)
    assert push.generate("It rained", 1.0, 5) != push.generate("It rained", 0.0, 5)
    with pytest.raises(ValueError, match="is no model; load_model gives one"):
        activations(
            nnsight.TransformersModel(module, task="text-generation", tokenizer=tokenizer), ["It rained"]
        )


def test_steering_that_is_left_in_another_thread_ends():
    m = tiny_model("gpt2")
    push = place(torch.ones(48), m, 1, norm=5.0, dose=3.0)
    before, opened = activations(m, ["It rained"]), push()
    opened.__enter__()
    assert not torch.equal(activations(m, ["It rained"]), before)
    leave = threading.Thread(target=opened.__exit__, args=(None, None, None))
    leave.start()
    leave.join()
    assert torch.equal(activations(m, ["It rained"]), before)


# what is taken for granted of a model


def local_module(window=256):
    "GPT-Neo, with local attention in every second layer."
    t, layers = tiny_tokenizer("byte"), [[["global", "local"], 2]]
    size = dict(hidden_size=48, num_layers=4, num_heads=4, max_position_embeddings=1024, vocab_size=len(t))
    size |= dict(bos_token_id=0, eos_token_id=1, attention_types=layers, window_size=window)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neo", **size))
        for w in module.parameters():
            if w.ndim == 2:
                w.data = torch.randn_like(w) / w.shape[-1] ** 0.5
    return module.eval(), t


def alone(module, t, prompt, answer):
    ids, p = t(prompt + answer).input_ids, len(t(prompt).input_ids)
    with torch.no_grad():
        lp = module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(lp[j - 1, ids[j]]) for j in range(p, len(ids)))


SHEEP = (
    "What happens when it rains on a hill for a very long time, and nobody is there to see it, and the sheep?"
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
RIVERS = [
    tuple(f"The water {way} the hill in {k} small and very muddy streams" for k in NUMBERS)
    for way in ("runs down", "climbs up")
]


@pytest.mark.parametrize("window", [256, 100])
def test_E1_choices_in_a_model_with_local_attention_are_read_as_each_alone(window):
    module, t = local_module(window)
    m = load_model(module, t)
    task = multiple_choice("q", [(SHEEP, *RIVERS)])
    got = Bench(m, 2, task).ask().logp[0]
    want = [alone(module, t, task.items[0].prompt, a) for a in task.items[0].choices]
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert [engine(m).branching(n) for n in (8, window + 29)] == [True, False]


def test_E1_a_sliding_window_is_found_by_asking():
    near, far = engine(tiny_model("mistral", sliding_window=20)), engine(tiny_model("llama"))
    assert [near.branching(n) for n in (4, 16, 17)] == [True, True, False]
    assert [far.branching(n) for n in (128, 129)] == [True, False]  # of a context of 128


def test_A4_a_model_that_sees_the_future_is_refused():
    with pytest.raises(ValueError, match="a later token moves an earlier state"):
        tiny_model("llama", is_causal=False)


def test_67_weights_that_are_not_finite_are_said():
    module, tokenizer = tiny_module("llama")
    module.model.layers[1].mlp.up_proj.weight.data *= torch.nan
    with pytest.raises(ValueError, match="not finite"):
        load_model(module, tokenizer)


def test_H4_passes_are_made_in_evaluation_mode():
    m = tiny_model("gpt2", resid_pdrop=0.5)
    want, words = activations(m, ["Rain fell on the roof."]), generate(m, "Rain fell", 5)
    m._module.train()
    m._module.transformer.h[1].eval()
    x = pad(m, encode(m, ["Rain"]))
    assert (
        torch.equal(activations(m, ["Rain fell on the roof."]), want) and generate(m, "Rain fell", 5) == words
    )
    assert torch.equal(engine(m).logits(*x), engine(m).logits(*x))
    assert m._module.training and m._module.transformer.drop.training
    assert not m._module.transformer.h[1].training and not m._module.transformer.h[1].mlp.training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_K2_return_dict_may_be_false(family):
    m, task = tiny_model(family), load_task("knowledge").take(2)
    want = activations(m, ["Rain."]), generate(m, "Rain", 3), Bench(m, 1, task).ask()
    m._module.config.return_dict = False
    again = load_model(m._module, m.tokenizer)
    assert torch.equal(activations(again, ["Rain."]), want[0]) and generate(again, "Rain", 3) == want[1]
    np.testing.assert_array_equal(Bench(again, 1, task).ask().logp[0], want[2].logp[0])
    assert m._module.config.return_dict is False


def test_102_logits_that_are_not_finite_are_an_error():
    m = tiny_model("gpt2")
    m._module.half().transformer.h[2].mlp.c_proj.weight.data *= 3e4
    hot = load_model(m)
    t = place(torch.ones(48), hot, 1, dose=0.5, norm=1.0)
    with pytest.raises(ValueError, match="not finite from layer 1 on.*float32"):
        evaluate(t, load_task("emotions/happiness").take(4), experiments=("equal_norm",))


def test_memory_that_runs_out_in_the_end_says_what_needs_less():
    "While reading, going on from a layer, generating or reducing."
    m = tiny_model("llama")

    def full(h):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    bench = Bench(m, 0, load_task("knowledge").take(2))
    uses = [lambda: activations(m, ["Rain.", "It"], [2]), bench.ask, lambda: generate(m, ["Rain", "It"], 2)]
    for use in uses:
        with engine(m).steer(1, full), pytest.raises(MemoryError, match="bfloat16.*Tried to allocate"):
            use()
    batches = left_batches(m, encode(m, ["Rain fell."]), [[1]])
    with pytest.raises(MemoryError, match="shorter texts"):
        engine(m).scores(1, batches, lambda *logits: full(logits))([lambda batch: {}])
    with engine(m).steer(1, lambda h: h.nothing), pytest.raises(AttributeError):
        generate(m, "Rain", 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError()])
def test_G9_generation_is_halved_where_memory_runs_out(error):
    class Scarce(Local):
        most = 2

        def generate(self, ids, mask, **options):
            if len(ids) > self.most:
                raise error
            return super().generate(ids, mask, **options)

    m, prompts = tiny_model("llama"), ["Rain fell", "It", "The cat sat on", "We", "They walked home and"]
    want = generate(m, prompts, 6)
    attach(m, Scarce(m))
    assert generate(m, prompts, 6) == want
    engine(m).most = 0
    with pytest.raises(type(error)):
        generate(m, prompts, 6)


def test_a_bench_is_halved_where_memory_runs_out(monkeypatch):
    class Scarce(Local):
        most = 99

        def logits(self, ids, *how):
            if len(ids) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().logits(ids, *how)

        def read(self, ids, *how):
            if len(ids) > self.most:
                raise MemoryError
            return super().read(ids, *how)

    m = tiny_model("llama")
    push = place(torch.randn(m._module.config.hidden_size), m, 1, dose=0.3)

    def answers():
        bench = Bench(m, 1, load_task("behaviours/politeness").take(6))
        return bench.ask([None, push]), bench.hurt([push])[0].kl

    attach(m, Scarce(m))
    monkeypatch.setattr("concept_transfer.engine.OPEN", ContextVar("open", default=([],)))  # left elsewhere
    (want, kl), engine(m).most = answers(), 1
    got, again = answers()
    for a, b in zip(want, got, strict=True):
        assert np.allclose(a.metrics["margin"], b.metrics["margin"], atol=1e-5)
    assert again == pytest.approx(kl, rel=1e-4)
    engine(m).most = 0
    with pytest.raises(MemoryError):
        answers()


@pytest.mark.slow
def test_async_clients_work_beside_us():
    "nnsight puts `save` on every object, from which on anyio refused to load; even where it came before us."
    code = """
import nnsight, concept_transfer.concepts, anyio, httpx, torch

async def ask():
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            await client.get("http://127.0.0.1:9/")
        except httpx.ConnectError:
            return "nobody there"

print(anyio.run(ask), hasattr(torch.ones(1), "save"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["nobody", "there", "True"]


OTHERS = {  # family: (its blocks, its configuration)
    "rwkv": ("rwkv.blocks", dict(hidden_size=48, attention_hidden_size=48, num_hidden_layers=3)),
    "roberta": ("roberta.encoder.layer", dict(is_decoder=True, max_position_embeddings=256)),
    "xlnet": ("transformer.layer", dict(d_model=48, n_layer=3, n_head=4, d_inner=64)),
    "openai-gpt": ("transformer.h", dict(n_embd=48, n_layer=3, n_head=4, n_positions=256)),
    "bart": ("model.decoder.layers", dict(d_model=48, decoder_layers=3, decoder_attention_heads=4)),
}


def other_family(name):
    "A random model of a family that has its own ways, with large weights, and its tokenizer."
    t, (blocks, size) = tiny_tokenizer("byte"), OTHERS[name]
    small = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    size = (small if name == "roberta" else {}) | size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, vocab_size=len(t), bos_token_id=0, eos_token_id=1, **size)
        module = AutoModelForCausalLM.from_config(config)
        for w in module.parameters():
            if w.ndim == 2:
                w.data = torch.randn_like(w) / w.shape[-1] ** 0.5
    return module.eval(), t, {blocks: "layers"}


@pytest.mark.parametrize(
    "family, says",
    [
        ("rwkv", "padding in front of a text moves its states"),  # it knows no mask
        ("roberta", "padding in front of a text moves its states"),  # it counts positions by itself
        ("xlnet", r"are \(6, 1, 48\), not \(1, 6, 48\)"),  # tokens come first
        ("bart", "padding in front of a text moves its states"),
    ],
)
def test_a_family_that_would_give_other_numbers_in_a_batch_is_refused(family, says):
    module, t, rename = other_family(family)
    with pytest.raises(ValueError, match=says):
        load_model(module, t, rename=rename)


def test_a_model_that_cannot_run_is_said_in_words():
    module, t = tiny_module("llama")
    module.model.layers[1].mlp = torch.nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM: it does not run as language models do .RuntimeError"
    ):
        load_model(module, t)


def test_blocks_may_return_lists():
    module, t, rename = other_family("openai-gpt")
    m, texts = load_model(module, t, rename=rename), ["Rain fell on the roof.", "Rain"]
    v = place(torch.randn(48, generator=torch.Generator().manual_seed(0)), m, 1, dose=1.0)
    want = [v.generate(x, s, 5) for x, s in zip(texts, (1.0, -2.0), strict=True)]
    assert v.generate(texts, [1.0, -2.0], 5) == want != v.generate(texts, 0.0, 5)


def test_a_context_without_limit():
    module, t = tiny_module("llama")
    module.config.max_position_embeddings = -1
    assert generate(load_model(module, t), "Rain fell", 3)


def other_tokenizer(words, at=0, **how):
    "One that knows some words, and nothing for all others."
    t = Tokenizer(WordLevel({w: at + i for i, w in enumerate(words.split())}, **how))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t)


@pytest.mark.parametrize(
    "tokenizer, says",
    [
        (other_tokenizer("rain fell"), "this tokenizer cannot read the texts .*UNK"),
        (other_tokenizer("a rain"), "this tokenizer cannot read the texts .*UNK"),
        (other_tokenizer("a rain fell", 900), "text 0 has the token 902, and the model knows 800"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_the_model(tokenizer, says):
    m = load_model(tiny_model("llama")._module, tokenizer)
    for use in (lambda: generate(m, "rain fell", 3), lambda: activations(m, ["rain fell"])):
        with pytest.raises(ValueError, match=says):
            use()


def test_a_tokenizer_that_deals_is_refused():
    m = tiny_model("llama")
    t = copy.deepcopy(m.tokenizer)
    t.backend_tokenizer.model.dropout = 1.0  # no pair of letters is ever merged
    t.add_special_tokens({"additional_special_tokens": ["<new>"]})
    with pytest.raises(ValueError, match="text 0 has the token 800, and the model knows 800"):
        generate(load_model(m._module, t), "Rain <new>", 3)
    real, n = t.__class__.__call__, iter(range(10))

    class Dealt(t.__class__):
        def __call__(self, text, **how):
            return real(self, text if next(n) % 2 else "b", **how)

    t.__class__ = Dealt
    x = load_model(m._module, t)
    with pytest.raises(ValueError, match="not at all, or each time otherwise"):
        encode(x, ["Rain"])


def test_a_start_mark_behind_blanks_is_the_only_one():
    m = tiny_model("llama")
    bos = m.tokenizer.bos_token
    plain, *led = encode(m, ["Rain fell", f" {bos}Rain fell", f"\n{bos}Rain fell", f"{bos} {bos}Rain fell"])
    assert all(x.count(m.tokenizer.bos_token_id) == 1 and x == plain for x in led)


def test_texts_on_both_sides_of_a_change_of_rotations_are_said():
    rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64)
    rope |= dict(short_factor=[1.0] * 6, long_factor=[4.0] * 6)
    m = tiny_model("llama", max_position_embeddings=512, rope_parameters=rope)
    texts = ["Rain fell.", "It rained all day on the roof. " * 12]
    with pytest.warns(UserWarning, match="longer than 64 tokens, from where on this model turns positions"):
        encode(m, texts)
    with warnings.catch_warnings(action="error"):
        for text in texts:
            encode(m, [text])


@pytest.mark.parametrize(
    "template, who",
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "system"),
        ("{{ messages[0].content }}", "user"),
        ("{{ bos_token }}", "system"),
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused(template, who):
    m = tiny_model("llama")
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why does it rain?"}]
    m.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"text 0 is a chat .*: it leaves out what '{who}' says"):
        encode(m, [chat])
    m.tokenizer.chat_template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    chat[1]["content"] = "<think>hm</think>" + chat[1]["content"]  # thoughts may go
    assert m.tokenizer.decode(encode(m, [chat])[0]).endswith("Why does it rain?")


@pytest.mark.parametrize("layers", [[True], [False, True, False, True], [1, True]])
def test_whether_a_layer_is_wanted_is_no_number(layers):
    m = tiny_model("llama")
    for use in (layer_numbers, lambda m, layers: activations(m, ["Rain"], layers)):
        with pytest.raises(ValueError, match="give at least one whole number"):
            use(m, layers)
