"""The names of tensors: in memory, as transformers writes them, as published folders have them; all are read.

Of each class with its defaults, whose parameters are never allocated.  What transformers makes of a published name is the oracle.
"""

import re

import pytest

from mllm_jax.hf.families import FAMILIES

TOWER_BEFORE_LLM = (
    (r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.(?=multi_modal_projector\.|image_newline$)", ""))  # fmt: skip
BEFORE_LANGUAGE_MODEL = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
# Names in memory -> those of the folders named, where they differ.
PUBLISHED = {
    "clip_vision_model": ((r"^", "vision_model."),),                                # openai/clip-vit-large-patch14, its tower alone
    "siglip_vision_model": ((r"^", "vision_model."),),                              # google/siglip-so400m-patch14-384, likewise
    "llava": TOWER_BEFORE_LLM,                                                      # llava-hf/llava-1.5-7b-hf
    "llava_next": TOWER_BEFORE_LLM,                                                 # llava-hf/llava-v1.6-mistral-7b-hf
    "llava_onevision": TOWER_BEFORE_LLM,                                            # llava-hf/llava-onevision-qwen2-7b-ov-hf
    "paligemma": TOWER_BEFORE_LLM,                                                  # google/paligemma-3b-pt-224
    "gemma3": TOWER_BEFORE_LLM,                                                     # google/gemma-3-4b-it
    "internvl": (*TOWER_BEFORE_LLM[:2], (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", "")),   # OpenGVLab/InternVL3-1B-hf
    "qwen2_vl": BEFORE_LANGUAGE_MODEL,                                              # Qwen/Qwen2-VL-7B-Instruct
    "qwen2_5_vl": BEFORE_LANGUAGE_MODEL,                                            # Qwen/Qwen2.5-VL-7B-Instruct
    "bert": ((r"^", "bert."), (r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")),    # bert-base-uncased
    "opt": ((r"^model\.", ""),),                                                    # facebook/opt-2.7b
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_of_names_is_that_of_the_table(torch, name):
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion

    family = FAMILIES[name]
    kind = getattr(transformers, family.architecture, None)
    if kind is None:
        pytest.skip(f"transformers has no class {family.architecture}; that of CogVLM comes with its files")
    # The default of InstructBLIP has OPT, and released ones that we read have Vicuna.
    options = {"text_config": transformers.LlamaConfig().to_dict()} if name == "instructblip" else {}
    with torch.device("meta"):
        model = kind(kind.config_class(**options))
    here = {n: p for n, p in model.named_parameters() if not any(re.search(x, family.canonical(n)) for x in family.ignore)}
    table = {n: family.canonical(n) for n in here}
    assert len(set(table.values())) == len(here) and {family.in_memory(table[n]): n for n in here} == {n: n for n in here}
    assert [n for n in here if not any(known(family, part, table[n]) for part in family.parts)] == []
    written = revert_weight_conversion(model, here.copy())
    assert {family.canonical(n) for n in written} == set(table.values())

    changes = get_model_conversion_mapping(model)
    assert all(isinstance(change, WeightRenaming) for change in changes)
    published = {n: n for n in here}
    for pattern, new in PUBLISHED.get(name, ()):
        published = {n: re.sub(pattern, new, old) for n, old in published.items()}
    assert name not in PUBLISHED or published.values() != here.keys()
    for n, old in published.items():
        assert rename_source_key(old, changes, [], model.base_model_prefix, here)[0] == n, old
        assert family.canonical(old) == table[n], old


def known(family, part, name: str) -> bool:
    """Whether a table has this name."""
    rows = (re.escape(part.theirs + row.theirs).replace(r"\{i\}", r"\d+").replace(r"\{k\}", r"\d+") for row in part.rows)
    return any(re.fullmatch(row, name) for row in rows)
