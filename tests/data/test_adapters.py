import base64

import pytest

from mllm_jax.data.adapters import parse
from mllm_jax.data.errors import BadExample
from mllm_jax.types import Blob, Example, Part, Turn

text = lambda t: Part(text=t)
image = lambda i: Part(kind="image", media=i)


def read(raw, **options) -> Example:
    return parse(raw, id="r", source="s", **options)


def ask(*turns, **more):
    """A LLaVA record of alternating turns."""
    return {"conversations": [{"from": "gpt" if i % 2 else "human", "value": t} for i, t in enumerate(turns)], **more}


def reason(raw, **options) -> str:
    with pytest.raises(BadExample) as error:
        read(raw, **options)
    assert error.value.id == "r" and "\n" not in str(error.value)
    return error.value.reason


def test_placeholders_become_parts_where_they_stand():
    example = read(ask("Is <image> like <image>?", "No", image=["a.png", "b.png"], id="33"))
    assert example.turns[0].parts == (text("Is "), image(0), text(" like "), image(1), text("?"))
    assert [blob.path for blob in example.media] == ["a.png", "b.png"]
    assert example.turns[1] == Turn(role="assistant", parts=(text("No"),))
    assert example.extra == {"id": "33"}


def test_front_is_what_llava_trains_on():
    example = read(ask("Say.\n<image>", "A", " And? ", "B", image="a.png"), placement="front")
    assert example.turns[0].parts == (image(0), text("\nSay."))
    assert example.turns[2].parts == (text(" And? "),)          # a turn without images is left alone
    assert read(ask("<image>", "A", image="a.png"), placement="front").turns[0].parts == (image(0),)


def test_a_path_is_one_image_not_its_letters():
    assert len(read({"messages": [{"role": "user", "content": "<image>"}], "images": "a.jpg"}).media) == 1


def test_counts_of_placeholders_and_media_must_agree():
    with pytest.raises(BadExample, match=r"'r' is bad \(placeholders\): 2 placeholders <image> for 1 images"):
        read(ask("<image><image>", "x", image="a.png"))
    assert reason(ask("none", "x", image="a.png")) == "placeholders"
    assert reason(ask("<image>", "x")) == "placeholders"
    assert reason(ask("<image>", "x", image=[])) == "placeholders"
    assert reason({"messages": [{"role": "user", "content": [{"type": "image"}]}]}) == "placeholders"
    fixed = read(ask("none", "x", image=["a.png", "b.png"]), placeholders="prepend")
    assert fixed.turns[0].parts == (image(0), image(1), text("none"))
    assert reason(ask("<image>", "x", image=["a", "b"]), placeholders="prepend") == "placeholders"


def test_html_tags_in_text_are_text():
    asked = "What does <video> do in <audio>?"
    assert read(ask(asked, "Play")).turns[0].parts == (text(asked),)
    example = read(ask("<video>\nWhat?", "A cat", video="v.mp4"))
    assert example.media == (Blob(kind="video", path="v.mp4"),)
    assert example.turns[0].parts == (Part(kind="video", media=0), text("\nWhat?"))


def test_text_of_typed_parts_is_text_whatever_it_says():
    content = [{"type": "text", "text": "literally <image>"}, {"type": "image"}, "!"]
    example = read({"messages": [{"role": "user", "content": content}], "images": ["a.png"]})
    assert example.turns[0].parts == (text("literally <image>"), image(0), text("!"))


def test_all_spellings_of_a_typed_image_give_its_bytes():
    b64 = base64.b64encode(b"png!").decode()
    spellings = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{b64}"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{b64}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64}},
        {"type": "image", "image": {"bytes": b"png!", "path": None}},
        {"type": "image", "image": b"png!"},
    ]
    for part in spellings:
        example = read({"messages": [{"role": "user", "content": [part]}]})
        assert example.media == (Blob(kind="image", data=b"png!"),), part
        assert example.turns[0].parts == (image(0),)
    sound = {"type": "input_audio", "input_audio": {"data": b64, "format": "wav"}}
    assert read({"messages": [{"role": "user", "content": [sound]}]}).media == (Blob(kind="audio", data=b"png!"),)


def test_relative_paths_begin_at_the_root(tmp_path):
    example = read(ask("<image><image><image>", "x", images=["a/b.png", "/c.png", "file:///d.png"]), root=tmp_path)
    assert [blob.path for blob in example.media] == [str(tmp_path / "a/b.png"), "/c.png", "/d.png"]


def test_roles():
    messages = lambda *roles: {"messages": [{"role": role, "content": role} for role in roles]}
    roles = lambda *given: [turn.role for turn in read(messages(*given)).turns]
    assert roles("developer", "human", "model") == ["system", "user", "assistant"]
    called = roles("user", "function_call", "observation", "tool", "assistant")
    assert called == ["user", "assistant", "tool", "tool", "assistant"]
    assert roles("assistant", "user", "assistant") == ["user", "assistant"]       # a leading answer is dropped
    assert roles("user") == ["user"]                                              # a prompt to be answered
    for wrong in ("user user", "user assistant assistant", "user system", "assistant", "narrator"):
        assert reason(messages(*wrong.split())) == "roles", wrong
    kind = read({"system": "Be kind.", **messages("user", "assistant")})
    assert kind.turns[0] == Turn(role="system", parts=(text("Be kind."),))


def test_weights_of_turns():
    rows = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    weight = lambda **more: read({"messages": [rows[0], {**rows[1], **more}]}).turns[1].weight
    assert weight() is None and weight(loss=False) == 0.0 and weight(loss=True) == 1.0 and weight(loss_scale=0.3) == 0.3


def test_columns_of_questions_put_images_first():
    row = {"image": b"png", "question": "How many?", "answers": ["2", "two"]}
    example = read(row)
    assert example.turns[0].parts == (image(0), text("How many?")) and example.answers == ("2", "two")
    assert example.turns[1].parts == (text("2"),)
    assert [t.role for t in read({"question": "Why?", "answer": None}).turns] == ["user"]
    assert read({"instruction": "Add", "input": "1 2", "output": "3"}).turns[0].parts == (text("Add\n1 2"),)
    texts = [{"user": "a", "assistant": "b", "source": "q"}, {"user": "c", "assistant": "d"}]
    cauldron = read({"images": [b"x"], "texts": texts})
    assert [p for t in cauldron.turns for p in t.parts] == [image(0), *map(text, "abcd")]
    vqa = read({"question": "?", "answers": [{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}]})
    assert vqa.answers == ("x", "y")


def test_captions_and_preferences():
    assert read({"image": b"x", "caption": "a cat"}).captions == ("a cat",)
    assert read({"image": b"x", "captions": [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]}).captions == ("a", "b")
    worse = [{"role": "assistant", "content": "Bob"}]
    example = read({"prompt": "Name it <image>", "images": ["a.png"], "chosen": "Rex", "rejected": worse})
    assert example.turns == (Turn(role="user", parts=(text("Name it "), image(0))),)
    assert example.chosen == (Turn(role="assistant", parts=(text("Rex"),)),)
    assert example.rejected == (Turn(role="assistant", parts=(text("Bob"),)),)


def test_unread_keys_are_kept_while_short():
    extra = read(ask("a", "b", id=5, score=0.5, tags=["x", 1], note="n" * 5000, blob=b"x", nothing=None)).extra
    assert extra == {"id": "5", "score": 0.5, "tags": ["x", 1]}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1], "malformed"),
        ({}, "no_text"),
        ({"image": b"x"}, "no_text"),
        ({"image": b"x", "caption": ""}, "no_text"),
        ({"messages": "hi"}, "malformed"),
        ({"texts": 3}, "malformed"),
        ({"texts": [{"user": "a"}]}, "malformed"),
        ({"question": "?", "chosen": 1}, "malformed"),
        ({"question": "?", "rejected": ["no"]}, "malformed"),
        ({"caption": {"a": 1}}, "no_text"),
        ({"messages": []}, "malformed"),
        ({"messages": [{"role": "user"}]}, "malformed"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "malformed"),
        ({"messages": [{"role": "user", "content": [3]}]}, "malformed"),
        (ask("<image>", "x", image={"bytes": None, "path": None}), "malformed"),
        (ask("<image>", "x", image=7), "malformed"),
        (ask("<image>", "x", image="https://example.org/a.png"), "missing_file"),
        (ask("<image>", "x", image="data:image/png;base64,@@"), "decode"),
    ],
)
def test_broken_records_have_a_reason(raw, expected):
    assert reason(raw) == expected
