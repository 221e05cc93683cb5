"""What is wrong with one record of a data set.

The data code raises `BadExample` and nothing else for a fault of a record, so that the loader can count
it by reason and skip it, or stop with the record's id (`recipe.Data.on_bad_example`).
"""

# Reason -> what the reader of the message can do about it.
REASONS = {
    "missing_file": "put the file there, or remove the record",
    "decode": "replace the file: it is truncated, or no medium of its kind",
    "bomb": "shrink the image, or remove the record",
    "narrow": "crop the image, or remove the record",
    "tiny": "remove the record, or lower the limit of 8 pixels a side",
    "placeholders": "write one placeholder, such as <image>, for each medium of the record",
    "roles": "turns must alternate between the user and the assistant, the user first",
    "empty_answer": "remove the turn: there is nothing to learn from it",
    "no_trained": "no token would enter the loss; check the template and the weights of the turns",
    "overlong": "raise data.seq_len, or set data.overlong to 'drop' or 'truncate'",
    "overtrained": "raise data.trained, or set data.overlong to 'drop' or 'truncate'",
    "too_many_items": "raise data.items, or remove the record",
    "no_text": "remove the record, or name the caption column that it has",
    "malformed": "mend the record: it does not follow the format",
}


class BadExample(ValueError):
    """One record cannot be used: `reason` is a key of REASONS, `detail` says what was found and expected.

    Code that sees bytes and not the record (the decoder) leaves `id` empty; whoever knows it calls `of(id)`.
    """

    def __init__(self, id: str, reason: str, detail: str):
        assert reason in REASONS, reason
        super().__init__(id, reason, detail)        # all three in `args`, so that pickling between processes works
        self.id, self.reason, self.detail = id, reason, detail

    def of(self, id: str) -> "BadExample":
        """The same fault, of the record with this id; an id that is already known stays."""
        return BadExample(self.id or id, self.reason, self.detail)

    def __str__(self) -> str:
        where = f"record {self.id!r}" if self.id else "a record"
        return f"{where} is bad ({self.reason}): {self.detail}; {REASONS[self.reason]}"
