"""The simplest tokenizer there is, for tests of planning."""


class Letters:
    """A tokenizer of one token per character, nothing added."""

    chat_template = None
    bos_token = None
    bos_token_id = None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
