"""The named data sets of the cookbook: format, where their files lie under the data root, and where to get them."""

from collections.abc import Mapping
from dataclasses import field

from mllm_jax.config import config


@config
class Dataset:
    format: str                         # a key of `sources.FORMATS`
    path: str = ""                      # relative to the data root; "" if it cannot be had
    options: Mapping[str, str] = field(default_factory=dict)    # of the format; `images` is relative to the root too
    needs: tuple[str, ...] = ()         # what else must be there
    records: int = 0                    # published number; 0: unknown
    url: str = ""
    licence: str = ""


UCI = "CC-BY-4.0 (UCI, optical recognition of handwritten digits)"

DATASETS = {
    "shapes": Dataset(format="shapes", records=4096, licence="Apache-2.0"),
    # Scenes of handwritten digits: described, talked about without the picture, asked about, and held out.
    "digits_captions": Dataset(format="digits", options={"describe": "true", "questions": "0"}, records=100_000, licence=UCI),
    "digits_words": Dataset(
        format="digits", options={"questions": "3", "image": "false"}, records=100_000, licence=UCI),
    "digits_questions": Dataset(format="digits", options={"questions": "3"}, records=100_000, licence=UCI),
    "digits_test": Dataset(format="digits", options={"split": "test"}, records=100_000, licence=UCI),
    # LLaVA and LLaVA-1.5: the files lie as the authors' scripts expect them. Their code moves images to the front.
    "llava_lcs_558k": Dataset(
        format="llava",
        path="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        options={"images": "LLaVA-Pretrain/images", "placement": "front"},
        records=558_128,
        url="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
        licence="those of LAION, CC-3M, SBU and BLIP",
    ),
    "llava_cc3m_595k": Dataset(
        format="llava",
        path="LLaVA-CC3M-Pretrain-595K/chat.json",
        options={"images": "LLaVA-CC3M-Pretrain-595K/images", "placement": "front"},
        records=595_375,
        url="https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K",
        licence="that of CC-3M",
    ),
    "llava_instruct_158k": Dataset(
        format="llava",
        path="LLaVA-Instruct-150K/llava_instruct_150k.json",
        options={"images": "coco/train2017", "placement": "front"},
        records=157_712,
        url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        licence="CC-BY-4.0, and the terms of OpenAI",
    ),
    "llava_mix_665k": Dataset(
        format="llava",
        path="LLaVA-Instruct-150K/llava_v1_5_mix665k.json",
        options={"images": ".", "placement": "front"},
        needs=("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"),
        records=665_298,
        url="https://github.com/haotian-liu/LLaVA#visual-instruction-tuning",
        licence="CC-BY-4.0, the terms of OpenAI, and those of COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
    ),
    "llava_next_779k": Dataset(
        format="parquet",
        path="LLaVA-NeXT-Data/data",
        records=779_289,
        url="https://huggingface.co/datasets/lmms-lab/LLaVA-NeXT-Data",
        licence="those of its sources, and the terms of OpenAI",
    ),
    # The second stage of MoE-LLaVA, as its authors prepared it.
    **{name: Dataset(
        format="llava", path=f"MoE-LLaVA/train_json/{file}.json", options={"images": "MoE-LLaVA", "placement": "front"},
        url="https://huggingface.co/datasets/LanguageBind/MoE-LLaVA", licence=f"that of {whose}")
       for name, file, whose in (
           ("mimicit_la_256k", "la_tune_256k", "MIMIC-IT"), ("lrv_331k", "lrv_tune_331k", "LRV-Instruction"),
           ("lvis_instruct_220k", "lvis_tune_220k_", "LVIS-Instruct4V"), ("svit_157k", "svit_tune_157k", "SVIT"))},
    # LLaVA-OneVision: its mid stage, single images (of both some 0.1M records were never released), several images, and videos.
    **{name: Dataset(
        format="llava", path=f"{file}.json", options={"images": file.partition("/")[0]}, records=records, licence="those of its parts",
        url=f"https://huggingface.co/{url}")
       for name, file, records, url in (
           ("llava_onevision_mid_4m", "LLaVA-OneVision-Mid-Data/mid_stage", 4_000_000, "datasets/lmms-lab/LLaVA-OneVision-Mid-Data"),
           ("llava_onevision_3m2", "LLaVA-OneVision-Data/single_image", 3_200_000, "datasets/lmms-lab/LLaVA-OneVision-Data"),
           ("m4_instruct_560k", "M4-Instruct-Data/m4_instruct_annotations", 560_000, "datasets/lmms-lab/M4-Instruct-Data"),
           ("llava_onevision_video_350k", "ShareGPTVideo/onevision", 350_000, "ShareGPTVideo"))},
    "cogvlm_sft_311k": Dataset(
        format="parquet",
        path="CogVLM-SFT-311K",
        records=311_000,
        url="https://huggingface.co/datasets/THUDM/CogVLM-SFT-311K",
        licence="CC-BY-NC-4.0",
    ),
    # Pairs for contrastive training, as img2dataset writes them.
    "datacomp_1b": Dataset(
        format="webdataset",
        path="datacomp_1b/shards",
        records=1_387_173_656,
        url="https://github.com/mlfoundations/datacomp",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    "laion_400m": Dataset(
        format="webdataset",
        path="laion_400m",
        records=413_871_335,
        url="https://github.com/rom1504/img2dataset/blob/main/dataset_examples/laion400m.md",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    "laion_2b": Dataset(
        format="webdataset",
        path="laion_2b",
        records=2_170_337_258,
        url="https://github.com/rom1504/img2dataset/blob/main/dataset_examples/laion5B.md",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    "coyo_700m": Dataset(
        format="webdataset",
        path="coyo_700m",
        records=746_972_269,
        url="https://github.com/kakaobrain/coyo-dataset",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    # Web documents: shards with the images in them, as OpenFlamingo writes them; the first five that match their sentence.
    "mmc4": Dataset(
        format="webdataset",
        path="mmc4/shards",
        options={"similarity": "0.24", "most": "5"},
        records=101_200_000,
        url="https://github.com/allenai/mmc4",
        licence="ODC-BY for the index; the images are their owners'",
    ),
    # Its images are addresses; the files hold what was found there in their place.
    "obelics": Dataset(
        format="parquet",
        path="obelics/data",
        options={"columns": "images+texts"},
        records=141_047_697,
        url="https://huggingface.co/datasets/HuggingFaceM4/OBELICS",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    "sharegpt4v_pt_1246k": Dataset(
        format="llava",
        path="ShareGPT4V/share-captioner_coco_lcs_sam_1246k_1107.json",
        options={"images": ".", "placement": "front"},
        needs=("coco/train2017", "LLaVA-Pretrain/images", "sam/images"),
        records=1_246_901,
        url="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
        licence="CC-BY-NC-4.0, the terms of OpenAI, and those of COCO, LAION, CC-3M, SBU and SAM",
    ),
    "mobilevlm_v2_mix_2m": Dataset(
        format="llava",
        path="MobileVLM/MobileVLM_V2_FT_Mix2M.json",
        options={"images": ".", "placement": "front"},
        url="https://huggingface.co/datasets/mtgv/MobileVLM_V2_FT_Mix2M",
        licence="that of each of its parts",
    ),
    "blip_capfilt": Dataset(
        format="webdataset",
        path="blip_capfilt/shards",
        url="https://github.com/salesforce/BLIP#pre-training-datasets-download",
        licence="BSD-3 for the captions; the images are their owners'",
    ),
    "coyo_100m": Dataset(
        format="webdataset",
        path="coyo_100m/shards",
        records=100_000_000,
        url="https://github.com/kakaobrain/coyo-dataset",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    # Questions of benchmarks, written as chats: the links say where from.
    "vqav2": Dataset(format="messages", path="vqav2/train.jsonl", url="https://visualqa.org/download.html", licence="CC-BY-4.0, COCO"),
    "gqa": Dataset(format="messages", path="gqa/train.jsonl", url="https://cs.stanford.edu/people/dorarad/gqa", licence="CC-BY-4.0"),
    "ocr_vqa": Dataset(format="messages", path="ocr_vqa/train.jsonl", url="https://ocr-vqa.github.io", licence="that of its authors"),
    "vsr": Dataset(format="messages", path="vsr/train.jsonl", url="https://github.com/cambridgeltl/visual-spatial-reasoning",
                   licence="Apache-2.0"),
    "science_qa": Dataset(format="messages", path="science_qa/train.jsonl", url="https://scienceqa.github.io", licence="CC-BY-NC-SA-4.0"),
    "aok_vqa": Dataset(format="messages", path="aok_vqa/train.jsonl", url="https://allenai.org/project/a-okvqa", licence="Apache-2.0, COCO"),
    "refcoco": Dataset(format="messages", path="refcoco/train.jsonl", url="https://github.com/lichengunc/refer", licence="Apache-2.0, COCO"),
    "refcoco_plus": Dataset(format="messages", path="refcoco+/train.jsonl", url="https://github.com/lichengunc/refer",
                            licence="Apache-2.0, COCO"),
    "refcocog": Dataset(format="messages", path="refcocog/train.jsonl", url="https://github.com/lichengunc/refer", licence="Apache-2.0, COCO"),
    "vg_locations": Dataset(format="messages", path="vg/locations.jsonl", url="https://homes.cs.washington.edu/~ranjay/visualgenome",
                            licence="CC-BY-4.0"),
    "sharegpt_40k": Dataset(format="llava", path="ShareGPT/llava_v1_5_sharegpt40k.json", records=40_688,
                            url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K", licence="the terms of OpenAI"),
    "pmd": Dataset(
        format="webdataset", path="pmd", records=70_000_000, url="https://huggingface.co/datasets/facebook/pmd", licence="those of its parts"
    ),
    "laion_coco": Dataset(
        format="webdataset",
        path="laion_coco",
        records=600_000_000,
        url="https://laion.ai/blog/laion-coco/",
        licence="CC-BY-4.0 for the index; the images are their owners'",
    ),
    "docmatix": Dataset(
        format="parquet", path="Docmatix/images", url="https://huggingface.co/datasets/HuggingFaceM4/Docmatix", licence="MIT",
    ),
    "websight": Dataset(
        format="parquet",
        path="WebSight/v0.2",
        options={"columns": "image+text", "rename": "text:caption"},
        url="https://huggingface.co/datasets/HuggingFaceM4/WebSight",
        licence="CC-BY-4.0",
    ),
    # Fifty sets in one form, each in a folder of its own.
    "the_cauldron": Dataset(
        format="parquet", path="the_cauldron", url="https://huggingface.co/datasets/HuggingFaceM4/the_cauldron", licence="those of its sources",
    ),
    # Images with captions, as BLIP-2 draws from them.
    "coco_captions": Dataset(format="webdataset", path="coco_captions/shards", records=566_747, url="https://cocodataset.org",
                             licence="CC-BY-4.0; the images are their owners'"),
    "visual_genome": Dataset(format="webdataset", path="visual_genome/shards", records=821_774,
                             url="https://homes.cs.washington.edu/~ranjay/visualgenome", licence="CC-BY-4.0"),
    "cc3m": Dataset(format="webdataset", path="cc3m/shards", records=3_318_333, url="https://ai.google.com/research/ConceptualCaptions",
                    licence="free to use; the images are their owners'"),
    "cc12m": Dataset(format="webdataset", path="cc12m/shards", records=12_423_374,
                     url="https://github.com/google-research-datasets/conceptual-12m", licence="free to use; the images are their owners'"),
    "sbu": Dataset(format="webdataset", path="sbu/shards", records=860_000, url="https://www.cs.rice.edu/~vo9/sbucaptions",
                   licence="the images are their owners'"),
    "laion_115m": Dataset(format="webdataset", path="laion_115m/shards", records=115_000_000,
                          url="https://github.com/salesforce/BLIP#pre-training-datasets-download", licence="that of LAION-400M"),
    "textcaps": Dataset(format="messages", path="textcaps/train.jsonl", records=109_765, url="https://textvqa.org/textcaps", licence="CC-BY-4.0"),
    "ok_vqa": Dataset(format="messages", path="ok_vqa/train.jsonl", records=9_009, url="https://okvqa.allenai.org", licence="CC-BY-4.0, COCO"),
    # What the papers used and nobody else can have: named so that a recipe can say so.
    "wit_400m": Dataset(
        format="webdataset", records=400_000_000, url="https://arxiv.org/abs/2103.00020", licence="not public"
    ),
    "cogvlm_grounding_40m": Dataset(format="webdataset", records=40_000_000, url="https://arxiv.org/abs/2311.03079", licence="not public"),
    "internvl2_5_pairs": Dataset(format="messages", url="https://arxiv.org/abs/2412.05271", licence="not public"),
    "internvl2_5_instruct": Dataset(format="messages", url="https://arxiv.org/abs/2412.05271", licence="not public"),
    # WebLI, CC3M-35L, VQ2A-CC3M-35L, OpenImages and WIT as PaliGemma mixes them, in weights that are not published.
    # Not published: pairs of image and text; documents, questions and videos beside them; conversations.
    **{f"qwen2_vl_{name}": Dataset(format="webdataset", url="https://arxiv.org/abs/2409.12191", licence="not public")
       for name in ("pairs", "mixture", "instruct")},
    "paligemma_mixture": Dataset(format="webdataset", url="https://arxiv.org/abs/2407.07726", licence="not public"),
    # Web documents, pairs of six sets, text; and what MM1 was tuned with.
    **{f"mm1_{name}": Dataset(format=form, records=n, url="https://arxiv.org/abs/2403.09611", licence="not public")
       for name, form, n in (("documents", "parquet", 500_000_000), ("captions", "webdataset", 0), ("text", "parquet", 0),
                             ("instruct_1450k", "messages", 1_450_000))},
    "webli": Dataset(
        format="webdataset", records=10_000_000_000, url="https://arxiv.org/abs/2209.06794", licence="not public"
    ),
    "qwen_vl_pairs_1400m": Dataset(
        format="webdataset", records=1_400_000_000, url="https://arxiv.org/abs/2308.12966", licence="not public"
    ),
    "qwen_vl_tasks_77m": Dataset(
        format="messages", records=76_800_000, url="https://arxiv.org/abs/2308.12966", licence="not public"
    ),
    "qwen_vl_chats_350k": Dataset(
        format="messages", records=350_000, url="https://arxiv.org/abs/2308.12966", licence="not public"
    ),
}
