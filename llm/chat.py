"""Chats: what an agent is asked, and what it says, by the template of the checkpoint."""

import datetime
import inspect
import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from support.flags import InputError

# ---- Chats ---------------------------------------------------------------------------------------

# The date that a template is told if it asks for today's: Llama 3's own default. A message must not
# depend on the day it was sampled.
TEMPLATE_DATE = "2024-07-26"
DATE_DIRECTIVES = ("%d", "%m", "%y", "%Y", "%b", "%B", "%a", "%A", "%H", "%M", "%S")


def _with_fixed_date(template: str) -> str:
    """Define `strftime_now`, by which templates ask for today's date, at the top of a template."""
    date = datetime.datetime.fromisoformat(TEMPLATE_DATE)
    replacements = ""
    for directive in DATE_DIRECTIVES:
        replacements += f' | replace("{directive}", "{date.strftime(directive)}")'
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{replacements} }}}}{{% endmacro %}}"
    return f"{macro}\n{template}"  # the newline is not rendered: templates trim blocks


class ChatFormat:
    """Turns chats into token ids by the checkpoint's own template, and token ids into messages.

    A template may refuse the system role, or leave it out. The system text then begins the user's
    turn. This is found by rendering an example.

    Args:
        name: the flag and the model that it names, for the messages of errors.
        template_kwargs: further variables of the template, e.g. {"enable_thinking": False}.

    Attributes:
        merges_system: whether the system text becomes part of the user's turn.
        opens_reasoning: whether prompts end with an open reasoning block.

    Raises:
        InputError: if there is no template, or if it fails or leaves out the user's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, template_kwargs: dict):
        self.tokenizer = tokenizer
        self.name = name
        self.template_kwargs = template_kwargs
        if tokenizer.chat_template is None:
            raise self._error("its tokenizer has no chat template; the agents need a chat model")
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters
        for key in template_kwargs:
            if key in arguments or key == "messages":
                raise InputError(f"--chat-template-kwargs: {key} is set by this program")

        self.template = _with_fixed_date(tokenizer.get_chat_template())

        # Render an example to learn what the template does with the two roles.
        example = [
            {"role": "system", "content": "EXAMPLE-OF-SYSTEM"},
            {"role": "user", "content": "EXAMPLE-OF-USER"},
        ]
        self.merges_system = not self._renders_system(example)
        [text] = self._render([example])
        if "EXAMPLE-OF-USER" not in text:
            raise self._error("its chat template leaves out the user's text")
        self.opens_reasoning = text.rstrip().endswith("<think>")

    def encode(self, chats: list[list[dict[str, str]]]) -> list[list[int]]:
        """Return the token ids of each chat, up to where the model's message begins.

        A chat has a system turn and a user turn. Raises InputError if the template fails.
        """
        # The template writes the special tokens itself.
        return self.tokenizer(self._render(chats), add_special_tokens=False)["input_ids"]

    def message(self, token_ids: list[int]) -> str:
        """Return the text of a message, without special tokens and without its reasoning."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        if self.opens_reasoning:
            text = "<think>" + text
        return without_reasoning(text).strip()

    def _renders_system(self, example: list[dict[str, str]]) -> bool:
        self.merges_system = False
        try:
            [text] = self._render([example])
        except InputError:
            return False
        return "EXAMPLE-OF-SYSTEM" in text

    def _render(self, chats: list[list[dict[str, str]]]) -> list[str]:
        if self.merges_system:
            chats = [_merge_system(*chat) for chat in chats]
        try:
            return self.tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=False,
                chat_template=self.template,
                **self.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise self._error(f"its chat template fails: {reason}") from None

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self.name}: {reason}")


def _merge_system(system: dict[str, str], user: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}]


def without_reasoning(text: str) -> str:
    """Remove reasoning blocks, <think> ... </think>, from a message.

    An unclosed block is reasoning up to the end. If only the closing tag is there, everything
    before it is reasoning.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]
