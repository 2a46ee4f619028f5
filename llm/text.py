"""Untrusted text: only a chat template writes control tokens, never a question or a message."""

import json
import re
from functools import partial
from secrets import token_hex

from tokenizers import Tokenizer


class TextEncoder:
    """Encodes texts in which content makes no added tokens, special or not, such as <|im_end|>.

    A tokenizer makes one wherever a text has its name. In a message it would end the turn and forge
    another. So they have secret names in a copy of the tokenizer. `protect` gives those in content
    their secret names. `encode` then exchanges all names and secret names: the template's become
    tokens, and content is text again. A text without any has the ids that the tokenizer gives it.
    White space, such as a run of newlines, is no control token and may be an added one.
    """

    def __init__(self, tokenizer):
        names = [name for name in tokenizer.get_added_vocab() if name.replace("▁", " ").strip()]
        secret = f"\ue000{token_hex(16)}"  # nobody can guess it
        secret_of = {name: f"{secret}{index}." for index, name in enumerate(names)}
        name_of = {secret: name for name, secret in secret_of.items()}
        self.protect = _replacer(secret_of)
        self._exchange = _replacer(secret_of | name_of)

        # The model must not make them of letters either, as whole words or by its merges.
        def renamed(part):
            if isinstance(part, dict):
                return {secret_of.get(key, key): renamed(value) for key, value in part.items()}
            if isinstance(part, list):
                return [renamed(value) for value in part]
            return secret_of.get(part, part) if isinstance(part, str) else part

        copy = json.loads(tokenizer.backend_tokenizer.to_str())
        if "merges" in copy["model"]:
            merges, is_kept = copy["model"]["merges"], secret_of.keys().isdisjoint
            copy["model"]["merges"] = [m for m in merges if is_kept((*m, "".join(m)))]
        self.tokenizer = Tokenizer.from_str(json.dumps(renamed(copy)))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts whose content is protected."""
        texts = [self._exchange(text) for text in texts]
        return [row.ids for row in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def _replacer(new_of: dict[str, str]):
    """Return a function that replaces these words in a text; of several, the longest."""
    longest_first = sorted(new_of, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return partial(pattern.sub, lambda found: new_of[found[0]])
