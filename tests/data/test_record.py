import msgpack
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import REASONS, BadExample
from mllm_jax.data.record import embed, pack_example, unpack_example, write_array_record
from mllm_jax.data.sources import open_source
from mllm_jax.types import Blob, Example, Part, Turn

SOUND = Part(kind="audio", media=0)

FULL = Example(
    id="set/7",
    turns=(
        Turn(role="system", parts=(Part(text="Sei höflich. 緑"),)),
        Turn(role="user", weight=0.5, parts=(Part(kind="image", media=1), Part(text="\r\n"), SOUND)),
        Turn(role="assistant", parts=(), weight=0.0),
    ),
    media=(Blob(kind="audio", path="a/b.wav"), Blob(kind="image", data=b"\0\xff" * 9)),
    captions=("one", ""),
    answers=("a", "b"),
    chosen=(Turn(role="assistant", parts=(Part(text="yes"),)),),
    rejected=(Turn(role="assistant", parts=(Part(text="no"),)),),
    kind="colour",
    source="set",
    extra={"score": 0.25, "n": 2**40, "deep": {"list": [1, "x", None, True, b"\1"]}},
)


@pytest.mark.parametrize("example", [FULL, Example(id="")], ids=["full", "empty"])
def test_unpack_inverts_pack(example):
    assert unpack_example(pack_example(example)) == example


def test_defaults_take_no_room():
    assert set(msgpack.unpackb(pack_example(Example(id="x")))) == {"v", "id"}


def test_what_would_not_come_back_equal_is_refused():
    for value in ((1, 2), {1, 2}, object(), 2**70):
        with pytest.raises(BadExample, match="'x' is bad .malformed.: extra=.* cannot be stored"):
            pack_example(Example(id="x", extra={"k": value}))


def test_foreign_bytes_and_later_schemas_are_refused():
    for data in (b"", b"\xff\xd8\xff\xe0", msgpack.packb([1, 2]), msgpack.packb({"id": "x"})):
        with pytest.raises(ConfigError, match="are not a record of mllm_jax"):
            unpack_example(data)
    with pytest.raises(ConfigError, match="schema 2, this version reads up to 1; upgrade"):
        unpack_example(msgpack.packb({"v": 2, "id": "x"}))


def test_files_hold_their_media(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"pixels")
    example = Example(id="x", media=(Blob(kind="image", path=str(tmp_path / "picture.png")),))
    many = [example] + [Example(id=f"{i}", captions=("c" * i,)) for i in range(300)]
    assert write_array_record(tmp_path / "some.array_record", iter(many)) == 301
    (tmp_path / "picture.png").unlink()
    source = open_source("array_record:some.array_record", tmp_path)
    assert source[0].media == (Blob(kind="image", data=b"pixels"),)
    assert [source[i] for i in range(300, 0, -1)] == many[:0:-1]
    with pytest.raises(BadExample, match="'x' is bad .missing_file.: .*picture.png: No such file"):
        embed(example)


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    def stops():
        yield FULL
        raise RuntimeError("power cut")

    with pytest.raises((RuntimeError, BadExample)):
        write_array_record(tmp_path / "half.array_record", stops())
    assert not (tmp_path / "half.array_record").exists()


def test_a_broken_file_is_refused_on_opening(tmp_path):
    write_array_record(tmp_path / "a.array_record", (Example(id=str(i)) for i in range(9)))
    whole = (tmp_path / "a.array_record").read_bytes()
    (tmp_path / "a.array_record").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="is not ArrayRecord, or breaks off"):
        len(open_source("array_record:a.array_record", tmp_path))


def test_errors_survive_a_process_and_name_the_record_once():
    import pickle

    error = pickle.loads(pickle.dumps(BadExample("", "decode", "3 bytes"))).of("a/1").of("b/2")
    assert (error.id, error.reason) == ("a/1", "decode")
    assert str(error) == f"record 'a/1' is bad (decode): 3 bytes; {REASONS['decode']}"
