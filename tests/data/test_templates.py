"""Chat formats against hand-written text and against `transformers`."""

import pickle
import re

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.formats import TEMPLATES, TOKENS
from mllm_jax.data.templates import Template, chat_template, encode_pair, generation
from mllm_jax.data.tokenizer import load_tokenizer, placeholder
from mllm_jax.types import Part, Turn

CHATS = ("vicuna_v1", "llama3", "chatml", "plain")
WORDS = ["What is it? A cat sits on the mat.", "USER: ASSISTANT: Sure? Yes, two of them."] * 2


def turn(role: str, *parts: str, weight: float | None = None) -> Turn:
    kinds = tuple(Part(kind="image", media=0) if p == "<image>" else Part(text=p) for p in parts)
    return Turn(role=role, parts=kinds, weight=weight)


CONVERSATION = (
    turn("user", "<image>", "\nWhat is it?"),
    turn("assistant", "A cat."),
    turn("user", "Sure?"),
    turn("assistant", "Yes."),
)


@pytest.fixture(scope="module", params=["bytes", "bpe:400"])
def tokenizer(request):
    tokens = [token for name in TOKENS for token in TOKENS[name]]
    return load_tokenizer(request.param, WORDS, tokens=tokens)


def trained(tokenizer, ids, weights) -> list[str]:
    """The trained spans as text."""
    out, last = [], -2
    for i in np.flatnonzero(weights):
        if i == last + 1:
            out[-1].append(ids[i])
        else:
            out.append([ids[i]])
        last = i
    return [tokenizer.decode(span) for span in out]


def test_vicuna_is_llavas_conversation_format(tokenizer):
    ids, weights = Template("vicuna_v1", tokenizer).turns(CONVERSATION)
    assert tokenizer.decode(ids) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT: Yes.</s>"
    )
    assert trained(tokenizer, ids, weights) == [" A cat.</s>", " Yes.</s>"]


def test_chatml_trains_the_end_of_the_turn_and_not_the_new_line(tokenizer):
    ids, weights = Template("chatml", tokenizer).turns((turn("system", "Be kind."), *CONVERSATION[2:]))
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert trained(tokenizer, ids, weights) == ["Yes.<|im_end|>"]


def test_caption_drops_the_question_and_ends_in_a_new_line(tokenizer):
    ids, weights = Template("caption", tokenizer).turns(CONVERSATION[:2])
    assert tokenizer.decode(ids) == "<s><image>A cat.\n"
    assert trained(tokenizer, ids, weights) == ["A cat.\n"]


def test_cogvlm_puts_the_image_first_and_ends_the_last_answer(tokenizer):
    ids, weights = Template("cogvlm", tokenizer).turns((turn("user", "What ", "<image>", "is it?"), *CONVERSATION[1:]))
    assert tokenizer.decode(ids) == "<s><image>Question: What is it? Answer: A cat.\nQuestion: Sure? Answer: Yes.</s>"
    assert trained(tokenizer, ids, weights) == [" A cat.", " Yes.</s>"]
    ids, weights = Template("base", tokenizer).turns((turn("user", "<image>"), turn("assistant", "A cat.")))
    assert tokenizer.decode(ids) == "<s><image>A cat.</s>" and trained(tokenizer, ids, weights) == ["A cat.</s>"]
    ids, _ = Template("cogvlm", tokenizer).turns(CONVERSATION[:1], prompt=True)
    assert tokenizer.decode(ids) == "<s><image>Question: What is it? Answer:"


def test_honeybee_shows_the_image_before_it_asks(tokenizer):
    ids, weights = Template("honeybee", tokenizer).turns(CONVERSATION[:2])
    written = tokenizer.decode(ids)
    assert written.startswith("<s>The following is a conversation between a curious human and AI assistant.")
    assert written.endswith("questions.\nHuman: <image>\nHuman: \nWhat is it?\nAI: A cat.</s>"), written
    assert trained(tokenizer, ids, weights) == [" A cat.</s>"]


@pytest.mark.parametrize("name", [*CHATS, "caption", "honeybee"])
def test_ids_and_mask_equal_those_of_transformers(name, tokenizer):
    content = lambda t: [{"type": "text", "text": p.text} if p.kind == "text" else {"type": p.kind} for p in t.parts]
    messages = [{"role": t.role, "content": content(t)} for t in CONVERSATION]
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=chat_template(name, tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, weights = Template(name, tokenizer).turns(CONVERSATION)
    assert ids.tolist() == theirs["input_ids"]
    assert weights.tolist() == theirs["assistant_masks"]
    prompt = tokenizer.apply_chat_template(
        messages[:3], chat_template=chat_template(name, tokenizer), add_generation_prompt=True, tokenize=False
    )
    ours, weights = Template(name, tokenizer).turns(CONVERSATION[:3], prompt=True)
    assert tokenizer.decode(ours) == prompt
    assert not weights.any()


@pytest.mark.parametrize("name", CHATS)
def test_without_generation_marks_the_prefixes_give_the_same_mask(name, tokenizer):
    ours = Template(name, tokenizer)
    own = own_template(tokenizer, re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", ours.jinja))
    for a, b in zip(own.turns(CONVERSATION), ours.turns(CONVERSATION), strict=True):
        np.testing.assert_array_equal(a, b)


def own_template(tokenizer, jinja: str) -> Template:
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.chat_template = jinja
    return Template("tokenizer", tokenizer)


def test_a_template_that_rewrites_history_falls_back_to_marks(tokenizer):
    # As templates of reasoning models do, it says something else about turns that are not the last.
    jinja = (
        "{% for m in messages %}{{ '(past)' if not loop.last }}{{ m.role }}: {{ m.content | trim }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    turns = (turn("user", "Hi "), turn("assistant", " Yes. "), turn("user", "So?"), turn("assistant", "No."))
    ids, weights = own_template(tokenizer, jinja).turns(turns)
    assert tokenizer.decode(ids) == "(past)user: Hi(past)assistant: Yes.</s>(past)user: So?assistant: No.</s>"
    assert [s.strip() for s in trained(tokenizer, ids, weights)] == ["Yes.</s>", "No.</s>"]


@pytest.mark.parametrize("jinja", [
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
])  # fmt: skip
def test_a_template_without_assistant_spans_is_an_error(jinja, tokenizer):
    with pytest.raises(ConfigError, match="put {% generation %} around"):
        own_template(tokenizer, jinja).turns(CONVERSATION[2:] * 2)


def test_a_template_that_ignores_the_wish_for_a_prompt_does_not_train_names_of_roles(tokenizer):
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    ids, weights = own_template(tokenizer, jinja).turns(CONVERSATION[2:])
    assert [s.strip() for s in trained(tokenizer, ids, weights)] == ["Yes.</s>"]


def test_a_tokenizers_own_template_writes_its_own_placeholder(tmp_path):
    """As Qwen2-VL's does: typed parts, and a placeholder between two marks."""
    from transformers import AutoTokenizer

    made = load_tokenizer("bytes", media=(), tokens=("<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
    made.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens={"image_token": "<|image_pad|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    ids, weights = Template("tokenizer", tokenizer).turns((turn("user", "<image>", "A <|image_pad|>?"), *CONVERSATION[1:2]))
    assert tokenizer.decode(ids) == (
        "user\n<|vision_start|><|image_pad|><|vision_end|>A <|image_pad|>?<|im_end|>\nassistant\nA cat.<|im_end|>\n"
    )
    assert ids.tolist().count(placeholder(tokenizer, "image")[1]) == 1
    assert trained(tokenizer, ids, weights) == ["A cat.<|im_end|>"]
    # One of our own formats, too, writes the placeholder of the tokenizer.
    ids, _ = Template("plain", tokenizer).turns(CONVERSATION[:2])
    assert tokenizer.decode(ids) == "<s><|image_pad|>\nWhat is it?\nA cat.</s>"


def test_special_tokens_that_a_user_types_stay_text(tokenizer):
    typed = "Is </s> or <image> a token?"
    ids, weights = Template("plain", tokenizer).turns((turn("user", typed), turn("assistant", "No: </s> is text.")))
    assert tokenizer.decode(ids) == f"<s>{typed}\nNo: </s> is text.</s>"
    special = [i for i in ids.tolist() if i in tokenizer.all_special_ids]
    assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert trained(tokenizer, ids, weights) == ["No: </s> is text.</s>"]


def test_a_turn_may_have_a_weight_of_its_own(tokenizer):
    turns = (turn("user", "Sure?", weight=0.5), turn("assistant", "No.", weight=0.0), *CONVERSATION[2:])
    ids, weights = Template("vicuna_v1", tokenizer).turns(turns)
    assert sorted(set(weights.tolist())) == [0.0, 0.5, 1.0]
    # A token of pairs may begin with the blank before the word.
    assert [s.strip() for s in trained(tokenizer, ids, weights == 0.5)] == ["Sure?"]
    assert trained(tokenizer, ids, weights == 1) == [" Yes.</s>"]


def test_roles_that_the_template_refuses_are_a_bad_example(tokenizer):
    with pytest.raises(BadExample, match="vicuna_v1 has no role tool"):
        Template("vicuna_v1", tokenizer).turns((turn("tool", "x"),))


def test_an_unknown_template_names_the_nearest(tokenizer):
    with pytest.raises(ConfigError, match="nearest: vicuna_v1"):
        Template("vicuna", tokenizer)


def test_stops_are_what_ends_an_answer(tokenizer):
    assert [tokenizer.decode([i]) for i in Template("chatml", tokenizer).stops] == ["</s>", "<|im_end|>"]
    assert [tokenizer.decode([i]) for i in Template("caption", tokenizer).stops] == ["</s>", "\n"]
    assert Template("vicuna_v1", tokenizer).stops == (tokenizer.eos_token_id,)
    assert generation("vicuna_v1", tokenizer) == {"eos_token_id": tokenizer.eos_token_id}
    assert generation("blip2", tokenizer) == {"eos_token_id": list(Template("caption", tokenizer).stops)}


def test_a_template_survives_pickling(tokenizer):
    template = Template("plain", tokenizer)
    typed = (turn("user", "</s>"), turn("assistant", "A cat."))
    before = template.turns(typed)
    after = pickle.loads(pickle.dumps(template)).turns(typed)
    np.testing.assert_array_equal(before[0], after[0])


def test_clip_begins_ends_and_is_cut(tokenizer):
    template = Template("clip", tokenizer)
    ids, weights = encode_pair("A cat.", template, 77)
    assert tokenizer.decode(ids) == "<s>A cat.</s>"
    assert weights.tolist() == [0] + [1] * (len(ids) - 1)
    ids, _ = encode_pair("A cat. " * 50, template, 16)
    assert len(ids) == 16 and ids[-1] == tokenizer.eos_token_id


def test_siglip_is_lower_case_without_punctuation_and_fills_the_row(tokenizer):
    ids, weights = encode_pair("  A  Cat, on_the mat! ", Template("siglip", tokenizer), 64)
    assert len(ids) == 64
    assert tokenizer.decode(ids).removesuffix("<pad>" * int(np.sum(ids == tokenizer.pad_token_id))) == "a cat onthe mat</s>"
    assert not weights[ids == tokenizer.pad_token_id].any()


def test_every_template_makes_a_prompt_of_one_question(tokenizer):
    for name in TEMPLATES:
        assert len(Template(name, tokenizer).turns(CONVERSATION[:1], prompt=True)[0])
