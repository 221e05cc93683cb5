"""Chat formats as Jinja strings, the special tokens that they write, and what ends an answer; templates.py applies them.

What stands between `{% generation %}` and `{% endgeneration %}` is trained.  Strings and not files, for an export writes
them as the `chat_template` of its tokenizer.
"""

# Content is a string or a list of typed parts, as processors of `transformers` take it.
MEDIUM = "'<' + part.type + '>'"
_TEXT = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{{ part.text if part.type == 'text' else " + MEDIUM + " }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_BEGIN = "('' if loop.previtem is defined and loop.previtem.type != 'text' else '<fake_token_around_image>')"
_FAKE = _TEXT.replace("part.text if", "part.text.strip(' ') if").replace(MEDIUM, f"{_BEGIN} + {MEDIUM} + '<fake_token_around_image>'")

_CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{ text(message.content) + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ text(message.content) + '<|im_end|>' }}{%- endif -%}{{ '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_TAGGED = "'<|vision_start|>' + " + MEDIUM + " + '<|vision_end|>'"
# The processors of BLIP-2 and InstructBLIP put media first, before the token that begins a text.
_FIRST = (
    "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content if part.type == 'text' -%}"
    "{{ part.text }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- for message in messages if message.content is not string -%}{%- for part in message.content if part.type != 'text' -%}"
    "{{ " + MEDIUM + " }}{%- endfor -%}{%- endfor -%}"
)

TEMPLATES = {
    # LLaVA-1.5, conversation.py conv_vicuna_v1: no space after </s>, and one before the answer, which is trained.
    "vicuna_v1": _TEXT + (
        "{%- set given = messages[0].role == 'system' -%}{{ bos_token }}{%- if given -%}{{ text(messages[0].content) }}"
        "{%- else -%}{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user\\'s questions.' }}{%- endif -%}{{ ' ' }}"
        "{%- for message in (messages[1:] if given else messages) -%}"
        "{%- if message.role == 'user' -%}{{ 'USER: ' + text(message.content) + ' ' }}"
        "{%- elif message.role == 'assistant' -%}{{ 'ASSISTANT:' }}"
        "{%- generation -%}{{ ' ' + text(message.content) + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ raise_exception('vicuna_v1 has no role ' + message.role) }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    ),
    "llama3": _TEXT + (
        "{{ bos_token }}{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ text(message.content) | trim + '<|eot_id|>' }}{%- endgeneration -%}"
        "{%- else -%}{{ text(message.content) | trim + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
    ),
    "chatml": _TEXT + _CHATML,
    # Qwen2-VL and 2.5: tags around media.  Qwen3-VL says no more who it is, and its processor writes the tags of each step of a video.
    "qwen2_vl": _TEXT.replace(MEDIUM, _TAGGED) + (
        "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
    ) + _CHATML,
    "qwen3_vl": _TEXT.replace(MEDIUM, f"({MEDIUM} if part.type == 'video' else {_TAGGED})") + _CHATML,
    # No names of roles: questions end in a new line, answers with the end token.
    "plain": _TEXT + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ text(message.content) + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ text(message.content) + '\\n' }}{%- endif -%}{%- endfor -%}"
    ),
    # LLaVA's first stage (preprocess_plain): the images, then the caption and a new line; the question is dropped.
    "caption": _TEXT + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ text(message.content) + '\\n' }}{%- endgeneration -%}"
        "{%- elif message.content is not string -%}{%- for part in message.content -%}"
        "{{ '' if part.type == 'text' else " + MEDIUM + " }}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    ),
    # BLIP-2 with OPT (LAVIS, blip2_opt.py): a new line ends the text; the token that begins it is trained unless there is a question.
    "blip2": _FIRST + (
        "{%- set so = namespace(far='') -%}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ (' ' if so.far else bos_token) + words(message.content) + '\\n' }}{%- endgeneration -%}"
        "{%- set so.far = 'said' -%}{%- elif words(message.content) -%}{{ ('' if so.far else bos_token) + words(message.content) }}"
        "{%- set so.far = 'asked' -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt and not so.far -%}{{ bos_token }}{%- endif -%}"
    ),
    # InstructBLIP with Vicuna (LAVIS, blip2_vicuna_instruct.py): an instruction and its answer, without names of roles.
    "instructblip": _FIRST + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ ' ' + words(message.content) + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ words(message.content) }}{%- endif -%}{%- endfor -%}"
    ),
    # Honeybee (tokenization_honeybee.py): images on lines of their own, before the first question.  The space
    # before an answer is trained with it, since most tokenizers have no other token for the first word.
    "honeybee": _TEXT + (
        "{{ bos_token }}{{ 'The following is a conversation between a curious human and AI assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user\\'s questions.' }}{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}"
        "{%- for part in message.content if message.content is not string and part.type != 'text' -%}{{ '\\nHuman: ' + " + MEDIUM + " }}"
        "{%- endfor -%}{{ '\\nHuman: ' }}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}"
        "{%- elif message.role == 'assistant' -%}{{ '\\nAI:' }}"
        "{%- generation -%}{{ ' ' + text(message.content) + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ raise_exception('honeybee has no role ' + message.role) }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '\\nAI:' }}{%- endif -%}"
    ),
    # Gemma 3, as its tokenizer has it, with the spans of what is trained; AROUND says what becomes of an image.
    "gemma": (
        "{%- macro trimmed(content) -%}{%- if content is string -%}{{ content | trim }}{%- else -%}{%- for part in content -%}"
        "{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        "{{ bos_token }}{%- set system = messages[0].role == 'system' -%}{%- set first = messages[0].content -%}"
        "{%- set lead = (first if first is string else first[0].text) + '\\n\\n' if system else '' -%}"
        "{%- for message in (messages[1:] if system else messages) -%}"
        "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('user and assistant must take turns') }}{%- endif -%}"
        "{%- if message.role == 'assistant' -%}{{ '<start_of_turn>model\\n' }}"
        "{%- generation -%}{{ trimmed(message.content) + '<end_of_turn>' }}{%- endgeneration -%}"
        "{%- else -%}{{ '<start_of_turn>' + message.role + '\\n' + (lead if loop.first else '') + trimmed(message.content) + '<end_of_turn>' }}"
        "{%- endif -%}{{ '\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    ),
    # The processor of PaliGemma: images first, wherever they were, one question, a new line, one answer.
    "paligemma": (
        "{%- for message in messages -%}{%- if message.role != ['user', 'assistant'][loop.index0] -%}"
        "{{ raise_exception('one question and one answer is all that paligemma knows') }}{%- endif -%}"
        "{%- if message.role == 'assistant' -%}{%- generation -%}{{ message.content | trim + eos_token }}{%- endgeneration -%}"
        "{%- elif message.content is string -%}{{ bos_token + message.content | trim + '\\n' }}"
        "{%- else -%}{%- for part in message.content if part.type != 'text' -%}{{ " + MEDIUM + " }}{%- endfor -%}{{ bos_token }}"
        "{{ message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join | trim + '\\n' }}{%- endif -%}{%- endfor -%}"
    ),
    # CogVLM, the "base" of its processors: an image, a text and its continuation, with nothing between them.
    "base": _TEXT + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ text(message.content) + eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ text(message.content) }}{%- endif -%}{%- endfor -%}"
    ),
    # Its "chat": the image first, wherever it was.
    "cogvlm": _TEXT + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ ' ' + text(message.content) + (eos_token if loop.last else '') }}{%- endgeneration -%}"
        "{{ '' if loop.last else '\\n' }}"
        "{%- else -%}{%- set parts = [] if message.content is string else message.content -%}"
        "{{ text(parts | rejectattr('type', 'equalto', 'text') | list) }}{{ 'Question: ' }}"
        "{{ message.content if message.content is string else text(parts | selectattr('type', 'equalto', 'text') | list) | trim }}"
        "{{ ' Answer:' }}{%- endif -%}{%- endfor -%}"
    ),
    # OpenFlamingo (train/data.py): a chunk of text about an image ends before the next one.  Of a document nothing is trained before
    # its first image, nor its end token; of a caption or an answer all is.
    "flamingo": (
        "{%- macro chunks(parts) -%}{%- for part in parts -%}{%- if part.type != 'text' -%}"
        "{{ ('<|endofchunk|>' if parts[:loop.index0] | rejectattr('type', 'equalto', 'text') | list else '') + " + MEDIUM + " }}"
        "{%- else -%}{%- set line = part.text if loop.previtem is defined and loop.previtem.type == 'text' else part.text.lstrip(' ') -%}"
        "{{ line if loop.nextitem is defined and loop.nextitem.type == 'text' else line.rstrip(' ') }}{%- endif -%}{%- endfor -%}{%- endmacro -%}"
        "{{ bos_token }}{%- for message in messages -%}"
        "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
        "{%- set media = parts | rejectattr('type', 'equalto', 'text') | list | length -%}"
        "{%- if message.role != 'assistant' -%}{{ chunks(parts) }}{%- else -%}"
        "{%- set start = 1 if media and parts[0].type == 'text' else 0 -%}{{ chunks(parts[:start]) }}"
        "{%- generation -%}{{ chunks(parts[start:]) + '<|endofchunk|>' + (eos_token if loop.last and not media else '') }}{%- endgeneration -%}"
        "{{ eos_token if loop.last and media else '' }}{%- endif -%}{%- endfor -%}"
    ),
    # The processor of Idefics: bare text without blanks around images, which stand between tokens that
    # neighbours share; a document is one turn.
    "idefics": _FAKE + (
        "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ text(message.content) + (eos_token if loop.last else '') }}{%- endgeneration -%}"
        "{%- else -%}{{ text(message.content) }}{%- endif -%}{%- endfor -%}"
    ),
    "idefics_instruct": _FAKE + (
        "{{ bos_token }}{%- for message in messages -%}{{ '' if loop.first else '\\n' }}{{ message.role | capitalize + ':' }}"
        "{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ ' ' + text(message.content) + '<end_of_utterance>' }}{%- endgeneration -%}"
        "{%- else -%}{{ '' if message.content is not string and message.content[0].type != 'text' else ' ' }}"
        "{{ text(message.content) + '<end_of_utterance>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '\\nAssistant:' }}{%- endif -%}"
    ),
    # Idefics3 and SmolVLM: a new line after each turn; what stands around an image is its layout's.
    "idefics3": _TEXT + (
        "{{ bos_token }}{%- for message in messages -%}{{ message.role | capitalize + ':' }}"
        "{%- if message.role == 'assistant' -%}"
        "{%- generation -%}{{ ' ' + text(message.content) + '<end_of_utterance>' }}{%- endgeneration -%}"
        "{%- else -%}{{ '' if message.content is not string and message.content[0].type == 'image' else ' ' }}"
        "{{ text(message.content) + '<end_of_utterance>' }}{%- endif -%}{{ '\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
    ),
}  # fmt: skip

# Special tokens that a format writes; a tokenizer made here is given them.
TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    **dict.fromkeys(("qwen2_vl", "qwen3_vl"), ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")),
    "gemma": ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
    "flamingo": ("<|endofchunk|>",),
    "idefics": ("<fake_token_around_image>",),
    "idefics_instruct": ("<fake_token_around_image>", "<end_of_utterance>"),
    "idefics3": ("<end_of_utterance>",),
}
# What ends a turn, besides the end token.
STOPS = {"llama3": "<|eot_id|>", **dict.fromkeys(("chatml", "qwen2_vl", "qwen3_vl"), "<|im_end|>"), "caption": "\n",
         "gemma": "<end_of_turn>", "flamingo": "<|endofchunk|>", "idefics_instruct": "<end_of_utterance>",
         "idefics3": "<end_of_utterance>", "blip2": "\n"}
# Special tokens in the place of which a processor puts more, before tokenizing: the new lines merge with those beside them.
AROUND = {"<start_of_image>": "\n\n<start_of_image>{image}<end_of_image>\n\n"}
