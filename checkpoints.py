"""Load models and tokenizers from a folder or the hub.

The model and its tokenizer are loaded by name through `from_pretrained`. The agents' model and the
backbone of V are loaded in the same way. Families differ in their chat templates, in how they begin
a text, and in whether they reason before they answer; those differences are handled here.
"""

import datetime
import hashlib
import inspect
import re
import sys
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from runs import InputError

# ---- Weights and tokenizer -----------------------------------------------------------------------


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the name of the type that `--dtype` means on a device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def load_pretrained(
    flag: str, name: str, auto_class, *, quantize: bool, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by folder or hub name through `from_pretrained`.

    With `quantize`, the weights of linear layers are NF4 with double quantisation (bitsandbytes).

    Args:
        flag: the flag that gave `name`, for the messages of errors.
        auto_class: AutoModelForCausalLM, or AutoModel for a backbone without a head.
        dtype: of all other weights and of the computation, see `resolve_dtype`.

    Raises:
        InputError: if there is no such GPU, or if the model cannot be loaded or lacks weights or
            an end-of-message token.
    """
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{flag} {name}: no model here (the folder has no config.json)")
    _check_there_is(device)
    compute_dtype = getattr(torch, resolve_dtype(dtype, device))
    options = {"dtype": compute_dtype, "output_loading_info": True}
    if quantize:
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    # transformers shows a bar and a report of the weights; the report is checked below instead.
    disable_progress_bar()
    set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = auto_class.from_pretrained(name, **options)
    except ImportError as error:
        if not quantize:
            raise InputError(f"{flag} {name}: a package is missing: {error}") from None
        remedy = "give --no-quantize" if flag == "--backbone" else "leave out --quantize-policy"
        raise InputError(
            f"{flag} {name}: NF4 needs bitsandbytes ({error}); install it, or {remedy}"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{flag} {name}: cannot be loaded as a folder or from the hub: {reason}"
        ) from None

    # Weights that the files lack would be random.
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:
        examples = ", ".join(map(str, sorted(absent)[:3]))
        class_name = type(model).__name__
        raise InputError(
            f"{flag} {name}: its files do not hold all weights of {class_name}: {examples} ..."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {name}: its tokenizer has no end-of-message (eos) token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if quantize:
        _keep_weights_unpacked(model)
    else:
        model = model.to(device)
    return model, tokenizer


def _check_there_is(device: str) -> None:
    """Raise InputError if `device` is a GPU that torch does not see."""
    wanted = torch.device(device)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= num_gpus:
        raise InputError(f"--device {device}: torch sees {num_gpus} GPUs here; give another one")


def _keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking NF4 weights for a bfloat16 kernel on some CPUs.

    It would repack them whenever the model is not training: V would differ between training and
    search, and from one machine to another.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read; no limit for one without trained positions."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def end_of_message_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids that end a message, by the tokenizer and by the checkpoint.

    Nothing else of the checkpoint's generation config is used: its sampling must not leak in.
    """
    from_checkpoint = model.generation_config.eos_token_id
    if not isinstance(from_checkpoint, list):
        from_checkpoint = [from_checkpoint]
    return {tokenizer.eos_token_id, *from_checkpoint} - {None}


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that begin every text: the BOS token if the tokenizer adds one, or none.

    The models of such a family were always trained with it.
    """
    ids = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []


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


# ---- Is it the same checkpoint? ------------------------------------------------------------------

# The files of a checkpoint that decide what it computes: weights, configuration and tokenizer.
CHECKPOINT_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")


def checkpoint_fingerprint(name: str, model: PreTrainedModel) -> str:
    """Return a fingerprint of a checkpoint: of the files of a folder, or the commit on the hub.

    It does not depend on where the folder is. model: as loaded from `name`.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{model.config._commit_hash}"
    digest = hashlib.blake2b(digest_size=16)
    paths = {path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)}
    for path in sorted(paths):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
