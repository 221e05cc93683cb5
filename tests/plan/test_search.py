"""The search: which layouts it looks at, what it writes, and that it can be trained with."""

import json
import math
from dataclasses import replace

import pytest

from mllm_jax.cli import main
from mllm_jax.config import ConfigError, load, override
from mllm_jax.launch import layouts
from mllm_jax.plan import search as searching
from mllm_jax.plan.analytic import Needs
from mllm_jax.plan.roofline import Roof
from mllm_jax.plan.search import Base, Candidate, Left, Ratio, Wanted, meshes, remarks, search, variants
from mllm_jax.sharding import Layout


@pytest.fixture(scope="module")
def gemma():
    return load("projector/gemma3").tiny()


class On:
    """As many chips as are asked for."""

    def __init__(self, chips, slices=1):
        self.devices, self.slices = [None] * chips * slices, slices


def rows_of(recipe, rows):
    return override(recipe, f"stages.instruct.data.batch_size={rows}")


@pytest.mark.parametrize(("rows", "on", "first"), [
    (64, On(16), {"data": 1, "fsdp": 16, "tensor": 1}), (64, On(256), {"data": 1, "fsdp": 64, "tensor": 4}),
    (256, On(128, 2), {"data": 1, "fsdp": 128, "tensor": 1}), (24, On(16), {"data": 1, "fsdp": 8, "tensor": 2}),
])
def test_as_few_chips_as_possible_share_a_row(gemma, rows, on, first):
    found = meshes(rows_of(gemma, rows), "instruct", on)
    assert found[0] == first and all(math.prod(m.values()) * on.slices == len(on.devices) for m in found)
    assert all(rows % (m["data"] * m["fsdp"] * on.slices) == 0 for m in found)


def test_positions_of_a_row_are_split_where_that_is_asked_for(gemma):
    assert meshes(rows_of(gemma, 64), "instruct", On(16), least=4) == [{"data": 1, "fsdp": 4, "tensor": 1, "context": 4}]
    assert meshes(rows_of(gemma, 2), "instruct", On(16), least=2) == []         # of which there are too few
    assert meshes(load("contrastive/siglip").tiny(), "contrastive", On(4), least=2) == []


def test_more_chips_share_a_row_where_nothing_else_fits():
    """Of 10 bytes: what may fit comes first; what needs less than twice what there is is tried before there is more; then all there is."""
    one = lambda seconds, needs: Candidate(layout=Layout(), overrides=(), needs=needs, seconds=seconds)
    left = Left([[one(1.0, 9.0), one(2.0, 12.0), one(3.0, 11.0)], [one(4.0, 8.0)], [one(5.0, 30.0)]])
    take = lambda memory, best=math.inf, alone=True: getattr(left.take(Ratio(memory=memory), 10.0, best, alone), "seconds", None)
    assert take(1.0) == 1.0                                 # and the compiler is taken to refuse each
    assert take(1.2, alone=False) is None
    assert take(1.2) == 3.0 and take(1.2) == 4.0
    assert take(1.5) == 2.0
    assert take(1.5) is None and not list(left.wider)       # 30 bytes are never tried
    assert Left([[one(1.0, 30.0)]]).take(Ratio(), 10.0, math.inf, True).seconds == 1.0      # but where they are all there is


def test_experts_are_shared_where_there_are_some(gemma):
    sparse = rows_of(load("experts/moe_llava").tiny(), 64)
    stage = list(sparse.stages)[-1]
    assert [m.get("expert") for m in meshes(sparse, stage, On(16))][-1] in (2, 4) and len(meshes(gemma, "instruct", On(8))) == 1


def test_rows_that_divide_over_nothing_are_said_with_what_would(gemma):
    with pytest.raises(ConfigError, match="batch_size is 7, which does not divide over 32 chips.* such as 32, or 1 chip") as error:
        meshes(rows_of(gemma, 7), "instruct", On(32))
    assert "\n" not in str(error.value)


def test_longer_rows_are_fewer_and_have_more_room():
    recipe = load("projector/llava_15")
    assert list(variants(recipe, "instruct", (2048, 4096))) == [(), (
        "stages.instruct.data.seq_len=4096", "stages.instruct.data.batch_size=32", "stages.instruct.data.items.image=6")]
    with pytest.raises(ConfigError, match="64 rows of 2048 positions are 43.6907 rows of 3000"):
        list(variants(recipe, "instruct", (3000,)))
    with pytest.raises(ConfigError, match="stage align does not pack"):
        list(variants(recipe, "align", (4096,)))


def test_what_is_kept_takes_memory_and_saves_time_and_parts_do_the_opposite():
    one = Needs(parameters=10.0, optimizer=20.0, batch=0.0, gradients=10.0, activations=8.0, temporaries=8.0, code=0.0)
    base = Base(layout=Layout(), overrides=(), rows=4, needs=one, by_row=16.0, gradients=10.0, roof=Roof(compute=10.0, gathers=4.0),
                keeps={"qkv": (8.0, 1.0), "attention": (4.0, 0.5), "out": (4.0, 0.5), "mlp": (16.0, 2.0)})
    found = {(c.layout.remat, c.layout.microbatches): c for c in base.candidates()}
    assert {n for _, n in found} == {1, 2, 4}
    assert found["full", 1].needs == 56 and found["qkv+attention", 1].needs == 68 and found["qkv+attention", 1].seconds == 8.5
    assert found["full", 2].needs == 56 - 16 + 8 + 10 and found["full", 4].seconds > found["full", 2].seconds > found["full", 1].seconds


class Found:
    """What the compiler says of a layout: (seconds of a step, bytes), or None where it does not fit."""

    def __init__(self, said):
        self.fits, (self.step_seconds, total) = said is not None, said or (0, 0)
        self.estimate, self.memory = type("E", (), {"seconds": self.step_seconds}), type("M", (), {"total": total})


def searched(recipe, on, monkeypatch, candidates, says, **wanted):
    """(remat of the programs that were looked at in order, what was found); candidates are (remat, seconds, bytes) by the model."""
    calls, made = [], [Candidate(layout=Layout(remat=r), overrides=(), needs=n, seconds=s) for r, s, n in candidates]
    monkeypatch.setattr(searching, "bases", lambda *_: [type("B", (), {"candidates": lambda self: made})()])
    look = lambda name, recipe, stage, on, layout, options: calls.append(layout.remat) or Found(says[layout.remat])
    monkeypatch.setattr(searching, "quick", look)
    return calls, search("projector/gemma3", recipe, None, on, Layout(), wanted=Wanted(**wanted))


def test_no_more_is_compiled_than_can_win(gemma, tpu, monkeypatch):
    """The compiler is taken to find twice the time of the model, and no room for the fastest."""
    likely = [("qkv+attention+mlp", 1.0, 3e9), ("qkv+attention", 1.2, 2e9), ("attention", 1.3, 1e9), ("full", 2.0, 0.5e9)]
    calls, found = searched(gemma, tpu("v5e:2x2"), monkeypatch, likely, {"qkv+attention+mlp": None, "qkv+attention": (2.4, 2e9)}, jobs=1)
    assert calls == ["qkv+attention+mlp", "qkv+attention"]                  # 1.3 x 2 is no better than 2.4
    assert [c.layout.remat for c in found] == ["qkv+attention", "attention", "full", "qkv+attention+mlp"]
    assert [c.fits for c in found] == [True, None, None, False]


def test_what_the_model_takes_for_too_large_is_tried_once_the_compiler_finds_less(gemma, tpu, monkeypatch):
    """Of 16 GB; everything seems to need more, and the compiler finds a quarter of that."""
    sizes = [("qkv+attention+mlp", 1.0, 100e9), ("attention", 1.5, 50e9), ("full", 2.0, 30e9)]
    calls, found = searched(gemma, tpu("v5e:2x2"), monkeypatch, sizes, {"full": (2.0, 7.5e9), "attention": (1.5, 12.5e9)}, jobs=1)
    assert calls == ["full", "attention"] and found[0].layout.remat == "attention"


def test_two_are_looked_at_side_by_side(gemma, tpu, monkeypatch):
    sizes = [("qkv+attention+mlp", 1.0, 3e9), ("qkv+attention", 1.2, 2e9), ("full", 2.0, 1e9)]
    calls, found = searched(gemma, tpu("v5e:2x2"), monkeypatch, sizes, {r: (s, n) for r, s, n in sizes}, jobs=2)
    assert sorted(calls) == ["qkv+attention", "qkv+attention+mlp"] and found[0].layout.remat == "qkv+attention+mlp"


def test_what_is_found_is_written_and_trained_with(tpu, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "stages.instruct.data"
    assert main(["plan", "resolution/m3", "--tiny", "--topology", "v5e:2x4", "--search", "--rows", "640", "--budget", "0",
                 "--out", "found.json", f"{data}.batch_size=16"]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert "written: mllm-jax train resolution/m3 --layout found.json" in said and "It fits" in said
    assert found["machine"] == {"chip": "v5e", "chips": 8, "slices": 1} and f"{data}.seq_len=640" in found["overrides"]
    remat = found["layout"]["remat"]
    assert layouts.find("found.json", "tpu").remat == remat and remat in searching.POLICIES
    assert main(["train", "resolution/m3", "--tiny", "--layout", "found.json", "stages.instruct.steps=2"]) == 0
    ran = json.loads((tmp_path / "runs/resolution-m3-tiny/recipe.json").read_text())
    assert ran["layout"]["remat"] == remat and ran["layout"]["mesh"]["fsdp"] == 8
    assert ran["overrides"] == [*found["overrides"], "stages.instruct.steps=2"]


def test_what_the_choice_means_for_the_rest_is_said():
    recipe, layout = load("projector/llava_15"), Layout(mesh={"data": 1, "fsdp": 64, "tensor": 4}, microbatches=1)
    one = Candidate(layout=layout, overrides=(), needs=1.0, seconds=1.0)
    [few] = remarks(recipe, "instruct", On(256), one)
    assert few == "64 rows are too few for 256 chips: 4 chips share each row; stages.instruct.data.batch_size=256 would use them better"
    long = replace(one, layout=replace(layout, mesh={"fsdp": 16, "context": 2}))
    assert next(remarks(recipe, "instruct", On(32), long)) == "rows of 2,048 positions are too long for a chip: 2 chips share each"
    [odd] = remarks(recipe, "instruct", On(512), replace(one, layout=replace(layout, mesh={"fsdp": 512})))
    assert "the rows of stage align (256) do not divide over this layout; train with --stages instruct" in odd


@pytest.mark.parametrize(("argv", "says"), [
    (["--out", "f.json"], "--out is for a search; give --search too"), (["--search", "--out", "f.txt"], "a layout's file ends in .json"),
    (["--search", "--rows", "2k"], "--rows is '2k'; write lengths"), (["--search", "--stage", "aline"], "nearest: align"),
])
def test_a_mistake_is_one_line(tpu, argv, says, capsys):
    assert main(["plan", "projector/llava_15", "--tiny", "--topology", "v5e:2x2", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
