"""The same six records written in every format, and the Examples that each must give."""

import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mllm_jax.types import Blob, Example, Part, Turn


def png(seed: int, size: int = 16) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


# (images, question with placeholders, answer)
RECORDS = [
    ([png(0)], "<image>\nWhat is it?", "A dog."),
    ([png(1)], "What colour is <image> there?", "Vert, ça va: 緑"),
    ([], "Is the tag <video> part of HTML?\r\nSay why.", "Yes.\n"),
    ([png(2), png(3)], "<image><image>\nCompare.", 'They are "equal"'),
    ([png(4)], "Look.\n<image>", "Done"),
    ([png(5)], "<image>\nOne, two?", "Three"),
]


def plain(example: Example) -> Example:
    """What must not depend on the format: everything but the id and where it came from; media as bytes."""
    media = tuple(Blob(kind=b.kind, data=b.data or Path(b.path).read_bytes()) for b in example.media)
    return Example(
        id="", turns=example.turns, media=media, captions=example.captions, answers=example.answers, extra=example.extra
    )


def expected(record) -> Example:
    images, question, answer = record
    parts, number = [], 0
    for i, text in enumerate(question.split("<image>")):
        if i:
            parts.append(Part(kind="image", media=number))
            number += 1
        if text:
            parts.append(Part(text=text))
    turns = Turn(role="user", parts=tuple(parts)), Turn(role="assistant", parts=(Part(text=answer),))
    return Example(id="", turns=turns, media=tuple(Blob(kind="image", data=data) for data in images))


def _photos(folder: Path) -> list[list[str]]:
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    names = [[f"photos/{i}_{j}.png" for j in range(len(images))] for i, (images, _, _) in enumerate(RECORDS)]
    for row, (images, _, _) in zip(names, RECORDS, strict=True):
        for name, data in zip(row, images, strict=True):
            (folder / name).write_bytes(data)
    return names


def _turns(question: str, answer: str, role: str, content: str, names: tuple[str, str]) -> list[dict]:
    return [{role: names[0], content: question}, {role: names[1], content: answer}]


def llava_json(folder: Path) -> str:
    rows = []
    for names, (_, question, answer) in zip(_photos(folder), RECORDS, strict=True):
        row = {"conversations": _turns(question, answer, "from", "value", ("human", "gpt"))}
        # One image is a string, several are a list, none has no key: as in the published files.
        rows.append(row | ({"image": names[0] if len(names) == 1 else names} if names else {}))
    (folder / "chat.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return "llava:chat.json"


def messages_jsonl(folder: Path) -> str:
    lines = []
    for names, (_, question, answer) in zip(_photos(folder), RECORDS, strict=True):
        row = {"messages": _turns(question, answer, "role", "content", ("user", "assistant")), "images": names}
        lines.append(json.dumps(row, ensure_ascii=False))
    # A byte order mark, Windows line ends and blank lines.
    text = "\ufeff" + "\r\n\r\n".join(lines) + "\r\n  \r\n"
    (folder / "chat.jsonl").write_bytes(text.encode())
    return "messages:chat.jsonl"


def openai_jsonl(folder: Path) -> str:
    """Typed parts with data: URIs."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for images, question, answer in RECORDS:
        parts, left = [], list(images)
        for i, text in enumerate(question.split("<image>")):
            if i:
                url = "data:image/png;base64," + base64.b64encode(left.pop(0)).decode()
                parts.append({"type": "image_url", "image_url": {"url": url}})
            if text:
                parts.append({"type": "text", "text": text})
        reply = [{"type": "text", "text": answer}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "parts.jsonl").write_text("\n".join(lines))
    return "messages:parts.jsonl"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tars(folder: Path) -> str:
    """Two shards, of which the second begins with a key that ended the first; keys with dots; upper-case extensions."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = ["a.0", "b.0.5", "c", "c", "long" * 40, "e"]
    for shard, rows in enumerate((range(3), range(3, 6))):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in rows:
                images, question, answer = RECORDS[i]
                conversation = _turns(question, answer, "from", "value", ("human", "gpt"))
                for data, extension in zip(images, ("PNG", "webp"), strict=False):
                    add(tar, f"{keys[i]}.{extension}", data)
                add(tar, f"{keys[i]}.json", json.dumps({"conversations": conversation}).encode())
    return "webdataset:{00000..00001}.tar"


def parquet(folder: Path) -> str:
    """As the hub keeps it: images as structs, the conversation as a list of structs, two files, small row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in enumerate((RECORDS[:4], RECORDS[4:])):
        images = [[{"bytes": data, "path": None} for data in images] for images, _, _ in rows]
        messages = [_turns(q, a, "role", "content", ("user", "assistant")) for _, q, a in rows]
        table = pa.table({"images": images, "messages": messages})
        pq.write_table(table, folder / f"train-{file:05d}-of-00002.parquet", row_group_size=3)
    return "parquet:."


def array_record(folder: Path) -> str:
    from mllm_jax.data.record import write_array_record
    from mllm_jax.data.sources import open_source

    source = open_source(llava_json(folder), folder)
    write_array_record(folder / "all.array_record", (source[i] for i in range(len(source))))
    return "array_record:all.array_record"


def tfds_builder(folder: Path, file_format: str) -> str:
    """Prepared by TFDS itself, from encoded bytes, without TensorFlow."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():      # one name, prepared twice

        class Chat(tfds.core.GeneratorBasedBuilder):
            code_path = None            # TFDS would look for checksums here, with a package it does not require
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
                features = {
                    "images": tfds.features.Sequence(tfds.features.Image()),
                    "messages": tfds.features.Sequence(message),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, (images, question, answer) in enumerate(RECORDS):
                    messages = _turns(question, answer, "role", "content", ("user", "assistant"))
                    yield i, {"images": [io.BytesIO(data) for data in images], "messages": messages}

    builder = Chat(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(folder), compute_stats="skip")
    )
    return f"tfds:{Path(builder.data_dir).relative_to(folder)}"


def tfds_array_record(folder: Path) -> str:
    return tfds_builder(folder, "array_record")


def tfds_parquet(folder: Path) -> str:
    return tfds_builder(folder, "parquet")


def rows() -> list[dict]:
    """What `python:` finds: decoded images, as Hugging Face `datasets` gives them."""
    return [
        {
            "images": [Image.open(io.BytesIO(data)) for data in images],
            "messages": _turns(question, answer, "role", "content", ("user", "assistant")),
        }
        for images, question, answer in RECORDS
    ]


def python(folder: Path) -> str:
    return f"python:{__name__}:rows"


FORMATS = [
    llava_json, messages_jsonl, openai_jsonl, tars, parquet, array_record, tfds_array_record, tfds_parquet, python
]  # fmt: skip
