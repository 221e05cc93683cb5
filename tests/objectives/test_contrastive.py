from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.objectives import InfoNCE, Matching
from mllm_jax.types import Batch, Outputs, Pairs


def batch(rows, real=None):
    nothing = jnp.zeros((rows, 2), jnp.int32)
    segments = jnp.ones((rows, 2), jnp.int32) if real is None else jnp.repeat(jnp.asarray(real)[:, None], 2, axis=1)
    return Batch(tokens=nothing, targets=nothing, weights=nothing * 1.0, segments=segments, positions=nothing[..., None], kinds=nothing)


def outputs(rows=4, queries=3, d=5, seed=0):
    rng = np.random.default_rng(seed)
    unit = lambda *shape: (lambda x: jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32))(rng.normal(size=shape))
    return Outputs(embeds={"image": unit(rows, queries, d), "text": unit(rows, d)}, scale=jnp.float32(1 / 0.07))


def blip_2(torch, image, text, temperature):
    """LAVIS blip2_qformer.py on one of several devices that hold one row each, restated: what is gathered has no gradient."""
    loss = 0
    everyone, all_texts = image.detach(), text.detach()
    for own in range(len(image)):
        i2t = torch.stack([(image[own] @ t).max() for t in all_texts]) / temperature
        t2i = torch.stack([(q @ text[own]).max() for q in everyone]) / temperature
        target = torch.tensor([own])
        loss = loss + sum(torch.nn.functional.cross_entropy(x[None], target, label_smoothing=0.1) for x in (i2t, t2i)) / 2
    return loss / len(image)


def test_contrast_of_blip_2_and_its_gradients(torch):
    """The most similar query counts, targets are smoothed, candidates get no gradient, the temperature divides."""
    out, temperature = outputs(), 0.07
    objective = InfoNCE(smoothing=0.1, candidates_learn=False)
    score = lambda image, text, t: objective.score(Outputs(embeds={"image": image, "text": text}, scale=1 / t), batch(4))["loss"].value
    value, gradients = jax.value_and_grad(score, (0, 1, 2))(out.embeds["image"], out.embeds["text"], jnp.float32(temperature))
    theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in (out.embeds["image"], out.embeds["text"], np.float32(temperature))]
    loss = blip_2(torch, *theirs)
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for mine, x in zip(gradients, theirs):
        np.testing.assert_allclose(mine, x.grad, rtol=1e-4, atol=1e-6)      # logits are of order 10
    objective = replace(objective, candidates_learn=True)       # which `score` reads
    both = jax.grad(score)(out.embeds["image"], out.embeds["text"], jnp.float32(temperature))
    assert not np.allclose(both, gradients[0], atol=1e-3)


@pytest.mark.parametrize("objective", [InfoNCE(), InfoNCE(smoothing=0.1), InfoNCE(smoothing=0.1, candidates_learn=False)])
def test_rows_without_an_example_count_for_nothing(objective):
    out = outputs(rows=5)
    three = jax.tree.map(lambda x: x[:3], out.embeds)
    want = objective.score(replace(out, embeds=three), batch(3))
    got = objective.score(out, batch(5, real=[1, 1, 1, 0, 0]))
    for name in want:
        np.testing.assert_allclose(got[name].value, want[name].value, rtol=1e-5)
        assert got[name].count == 3


def test_one_vector_of_a_row_is_a_row_of_vectors():
    out = outputs(queries=1)
    flat = replace(out, embeds={**out.embeds, "image": out.embeds["image"][:, 0]})
    a, b = (InfoNCE().score(o, batch(4))["loss"].value for o in (out, flat))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_matching_is_cross_entropy_over_the_pairs_that_are_there():
    logits = jnp.array([[[0.0, 2.0], [1.0, 0.0], [5.0, 5.0]], [[3.0, 0.0], [0.0, 0.0], [9.0, 0.0]]])
    pairs = Pairs(logits=logits, labels=jnp.array([[1, 0, -1], [1, 0, 0]]))
    nll = lambda yes, no: np.log1p(np.exp(no - yes))            # of the answer whose logit comes first
    scores = Matching().score(Outputs(pairs=pairs), batch(2, real=[1, 0]))
    np.testing.assert_allclose(scores["loss"].value, (nll(2, 0) + nll(1, 0)) / 2, rtol=1e-6)
    scores = Matching().score(Outputs(pairs=pairs), batch(2))
    np.testing.assert_allclose(scores["loss"].value, (nll(2, 0) + nll(1, 0) + nll(0, 3) + nll(0, 0) + nll(9, 0)) / 5, rtol=1e-6)
    assert scores["accuracy"].count == 5 and scores["accuracy"].total == 4      # a tie goes to no
    with pytest.raises(KeyError, match="the model gave none"):
        Matching().score(Outputs(), batch(2))


def test_matching_gives_every_row_bits_of_its_own():
    one, other = (Matching().corrupt(batch(64), jax.random.key(seed)).draws for seed in (0, 1))
    assert one.shape == (64,) and len(set(np.asarray(one).tolist() + np.asarray(other).tolist())) == 128
