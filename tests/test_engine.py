"What an engine promises: a third one, of one class and without nnsight, gives the numbers of `Local`."

import contextlib
import copy
from functools import partial

import pytest
import torch

from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.engine import (
    CHUNK,
    Local,
    attach,
    bundled,
    engine,
    gathered,
    hidden_of,
    left_batches,
    length_batches,
    pad,
    rows_of,
    steered,
    stream,
    with_hidden,
    wrapped,
)
from concept_transfer.evidence import Settings, evaluate
from concept_transfer.maps import fit_maps
from concept_transfer.models import load_model, model_info, tiny_model
from concept_transfer.steering import generate, place
from concept_transfer.tasks import load_task
from concept_transfer.toys import TINY, tiny_module


class Hooks:
    "A model that runs here through plain PyTorch hooks."

    name, tokens, precision, branching, own_products = "hooked", 1000, "float32", False, True

    def __init__(self, model):
        self.model, self.weights, self.calls = model, engine(model).weights, set()

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
                    with self.steer(layer, change(b)):
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
    for a, b in zip(e.runs, e2.runs, strict=True):
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
    changes = [lambda batch: lambda h: h + up, lambda batch: lambda h: h + batch.asked[..., None] * up]
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
