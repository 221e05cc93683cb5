"""Every family computes what transformers computes: hidden states, logits, loss, gradients of all tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.encoders.vit import normalize
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load
from mllm_jax.objectives import InfoNCE, NextToken, Sigmoid
from tests.hf import ours

STATES = 1e-4       # float32 sums in another order; hidden states are of order 1 to 10
LOSS = 1e-5
GRADIENTS = 1e-3    # of the largest entry of each tensor


def close(a, b, atol=STATES):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= atol


def check_gradients(saved, cfg, gradients, least: int):
    """The gradient of every tensor of theirs, read through the table."""
    family, _ = describe(saved.folder)
    theirs = {family.canonical(n): p.grad for n, p in saved.model.named_parameters()}
    compared = 0
    for link in family.links(cfg):
        grad = theirs[link.theirs]
        mine = np.asarray(gradients[link.ours] if link.layer is None else gradients[link.ours][link.layer])
        if grad is None:                                        # not reached: a layer after the chosen one
            assert not mine.any(), link.ours
            continue
        want = link.to_ours(grad.numpy())
        # Where the exact gradient is zero (bias of keys), both have only noise.
        assert np.abs(mine - want).max() <= GRADIENTS * np.abs(want).max() + 1e-6, (link.theirs, link.ours)
        compared += bool(np.abs(want).max() > 1e-5)
    assert compared >= least


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "llama_biased", "llama_linear", "mistral_window", "qwen2_window",
                                  "gemma", "gemma3_text", "opt", "stablelm", "phi"])
def test_language_model(saved, torch, name):
    from tests.hf import tiny

    it = saved(name)
    lengths = [40, 23, 5]
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (3, 40))
    real = np.arange(40) < np.array(lengths)[:, None]
    ids, mask = torch.tensor(tokens), torch.tensor(real.astype(int))
    out = it.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()

    cfg, params = load(it.folder)
    graph, batch = ours.graph_of(cfg), ours.batch(tokens, lengths)

    @jax.jit
    def run(params):
        model = ours.merge(graph, params)
        x = model.embed(batch.tokens)
        hidden = model(x, batch)[0]
        return ours.decoder_states(model, x, batch), hidden, hidden @ model.unembed

    def loss(params):
        model = ours.merge(graph, params)
        return lm_loss(model(model.embed(batch.tokens), batch)[0], model.unembed, batch)

    states, hidden, logits = run(params)
    for k in range(cfg.depth):
        close(states[k][real], out.hidden_states[k].detach()[real])
    close(hidden[real][:, : cfg.width], out.hidden_states[-1].detach()[real])
    close(logits[real], out.logits.detach()[real])
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, cfg, gradients, least=20)


def lm_loss(hidden, unembed, batch):
    from mllm_jax.types import Outputs

    return NextToken().score(Outputs(hidden=hidden, unembed=unembed), batch)["loss"].value


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_dual_encoder(saved, torch, name):
    from tests.hf import tiny

    it = saved(name)
    rng = np.random.default_rng(1)
    s, files = tiny.TEXT["max_position_embeddings"], tiny.images(4)
    tokens = rng.integers(2, 90, (4, s))
    lengths = [s, 9, 7, 4]
    for row, n in zip(tokens, lengths):
        row[n - 1] = tiny.TEXT["eos_token_id"]
        row[n:] = tiny.TEXT["pad_token_id"]
    if name == "siglip":                                        # reads the padding and pools the last position
        lengths = [s] * 4
    pixels = tiny.pixel_values(it.processor, files)
    out = it.model(input_ids=torch.tensor(tokens), pixel_values=pixels, return_loss=True, output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()

    cfg, params = load(it.folder)
    tower = cfg.inputs["image"]
    media = ours.media([[f] for f in files], tower.view, tower.patch, np.full((4, s), -1))
    graph, batch = ours.graph_of(cfg), ours.batch(tokens, lengths, media)
    check_pixels(media.values[:, 0], pixels, tower.encoder)

    @jax.jit
    def run(params):
        model = ours.merge(graph, params)
        image, text = model.inputs["image"], model.text
        states = [image.encode(batch.media["image"].values[:, 0], k) for k in range(image.cfg.depth + 1)]
        return states, ours.decoder_states(text, text.embed(batch.tokens), batch), image.embed(batch.media["image"]), model(batch)

    states, text_states, pooled, o = run(params)
    for mine, theirs in zip(states, out.vision_model_output.hidden_states, strict=True):
        close(mine, theirs.detach())
    for mine, theirs in zip(text_states, out.text_model_output.hidden_states, strict=True):
        real = np.asarray(batch.segments) > 0
        close(mine[real], theirs.detach()[real])
    close(pooled[:, 0], it.model.vision_model(pixels).pooler_output.detach())
    close(o.embeds["image"], out.image_embeds.detach())
    close(o.embeds["text"], out.text_embeds.detach())
    bias = 0 if o.bias is None else o.bias
    close(o.scale * o.embeds["image"] @ o.embeds["text"].T + bias, out.logits_per_image.detach())

    objective = {"clip": InfoNCE(), "siglip": Sigmoid()}[name]
    loss = lambda params: objective.score(ours.merge(graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, cfg, gradients, least=50)


def check_pixels(values, pixels, encoder):
    """Our raw patches, normalized, are the pixel values of transformers."""
    n, grid, p = len(values), encoder.grid, encoder.patch
    theirs = pixels.numpy().reshape(n, 3, grid, p, grid, p).transpose(0, 2, 4, 3, 5, 1).reshape(n, grid * grid, -1)
    # The pixels are the same; 1/255 would be one level.  Dividing in another order costs the last bits.
    assert np.abs(np.asarray(normalize(values, encoder.mean, encoder.std)) - theirs).max() < 1e-5


def llava_rows(tokens_per_image: int, image_token: int):
    """Rows with two images, one and none: (tokens, slots, lengths, images of each row)."""
    rng = np.random.default_rng(2)
    n, s = tokens_per_image, 2 * tokens_per_image + 12
    tokens, slot = rng.integers(0, 90, (3, s)), np.full((3, s), -1)
    for row, starts in ((0, (2, n + 5)), (1, (0,))):
        for i, start in enumerate(starts):
            tokens[row, start : start + n] = image_token
            slot[row, start : start + n] = np.arange(i * n, (i + 1) * n)
    return tokens, slot, [s, n + 7, 9], [2, 1, 0]


LLAVA = ["llava-clip-llama", "llava-siglip-mistral", "llava-pad-qwen2", "llava-siglip-qwen3", "llava-siglip-gemma"]


@pytest.mark.parametrize("name", LLAVA)
def test_llava(saved, torch, name):
    from tests.hf import tiny

    it = saved(name)
    cfg, params = load(it.folder)
    tower = cfg.inputs["image"]
    tokens, slot, lengths, counts = llava_rows(tower.encoder.grid**2, tiny.IMAGE_TOKEN)
    files = tiny.images(3)
    pixels = tiny.pixel_values(it.processor, files)
    real = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    ids, mask = torch.tensor(tokens), torch.tensor(real.astype(int))
    out = it.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=ids.masked_fill(mask == 0, -100),
                   output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()

    rows = [files[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(3)]
    media = ours.media(rows, tower.view, tower.patch, slot)
    graph, batch = ours.graph_of(cfg), ours.batch(tokens, lengths, media)
    flat = media.values.reshape(-1, *media.values.shape[2:])[np.asarray(media.mask).reshape(-1)]
    check_pixels(flat, pixels, tower.encoder)

    @jax.jit
    def run(params):
        model = ours.merge(graph, params)
        x, o = model.embed(batch).x, model(batch)
        return model.inputs["image"](batch.media["image"]).tokens, ours.decoder_states(model.decoder, x, batch), o.hidden, o.hidden @ o.unembed

    features, states, hidden, logits = run(params)
    theirs = it.model.model.get_image_features(pixels, return_dict=True).pooler_output
    close(features.reshape(6, -1, features.shape[-1])[np.asarray(media.mask).reshape(-1)], torch.stack(theirs).detach())
    for k in range(cfg.decoder.depth):
        close(states[k][real], out.hidden_states[k].detach()[real])
    close(hidden[real], out.hidden_states[-1].detach()[real])
    close(logits[real], out.logits.detach()[real])
    loss = lambda params: NextToken().score(ours.merge(graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, cfg, gradients, least=50)


def test_bfloat16_compute_stays_near(saved, torch):
    """Matmuls in bfloat16: a coarse check that nothing else than rounding differs."""
    from mllm_jax import sharding

    it = saved("llama")
    cfg, params = load(it.folder)
    tokens = np.random.default_rng(0).integers(0, 90, (2, 16))
    graph, batch = ours.graph_of(cfg), ours.batch(tokens, [16, 16])

    def logits(params):
        model = ours.merge(graph, params)
        return model(model.embed(batch.tokens), batch)[0].astype(jnp.float32) @ model.unembed

    want = it.model(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    with sharding.use(sharding.Layout(dtype="bfloat16")):
        got = jax.jit(logits)(params)
    # Three layers of 8 significant bits each: 2^-8 relative, times a few.
    assert np.abs(np.asarray(got) - want).max() < 0.05 * np.abs(want).max()
