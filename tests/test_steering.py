"Where something is added to the residual stream, wherever the padding stands and however a model runs."

import numpy as np
import pytest
import torch

from concept_transfer.concepts import POSITIONS, Position
from concept_transfer.engine import encode, engine, pad
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, tiny_model
from concept_transfer.steering import Transplant, adding, place
from concept_transfer.tasks import load_task
from concept_transfer.toys import TINY

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
