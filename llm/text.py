"""Untrusted text: only a chat template writes control tokens, never a question or a message."""

import json
import re
from secrets import token_hex

from tokenizers import Tokenizer

from support.flags import InputError


class TextEncoder:
    """Encodes texts in which content makes no added tokens, special or not, such as <|im_end|>.

    A tokenizer makes one wherever a text has its name. In a message it would end the turn and forge
    another. So they have secret names in a copy of the tokenizer. `protect` gives those in content
    their secret names. `encode` then exchanges all names and secret names: the template's become
    tokens, and content is text again. A text without any has the ids that the tokenizer gives it.
    White space, such as a run of newlines, is no control token and may be an added one.
    """

    def __init__(self, tokenizer):
        added = tokenizer.get_added_vocab()
        names = [name for name in added if name.replace("▁", " ").strip()]
        self.added_ids = set(added.values())
        self.secret = f"\ue000{token_hex(16)}"  # nobody can guess it
        secret_of = {name: f"{self.secret}{index}." for index, name in enumerate(names)}
        self.protect = _replacer(secret_of)
        self._exchange = _replacer(secret_of | {new: old for old, new in secret_of.items()})

        # Nor may the model make them of letters, by its merges or as words of its vocabulary.
        copy = json.loads(tokenizer.backend_tokenizer.to_str())
        copy["truncation"] = copy["padding"] = None
        if "merges" in copy["model"]:
            merges, is_kept = copy["model"]["merges"], secret_of.keys().isdisjoint
            copy["model"]["merges"] = [m for m in merges if is_kept((*m, "".join(m)))]
        quoted = {json.dumps(name): json.dumps(new) for name, new in secret_of.items()}
        text = re.sub(r'"(?:[^"\\]|\\.)*"', lambda s: quoted.get(s[0], s[0]), json.dumps(copy))
        self.tokenizer = Tokenizer.from_str(text)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text whose content is protected."""
        text = self._exchange(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        # Some are recognised only as words of their own, or after a space.
        if text.count(self.secret) > sum(index in self.added_ids for index in ids):
            raise InputError("the tokenizer takes an added token of the chat template for text")
        return ids


def _replacer(new_of: dict[str, str]):
    """Return a function that replaces these words in a text; of several, the longest."""
    pattern = re.compile("|".join(map(re.escape, sorted(new_of, key=len, reverse=True))))
    return lambda text: pattern.sub(lambda found: new_of[found[0]], text)
