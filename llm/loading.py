"""Load models and tokenizers by folder or hub name, through `from_pretrained`.

What families of models differ in is handled here, apart from their chats (llm/policy.py).
"""

import logging
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from support.flags import InputError
from support.records import errors_name
from support.runs import file_fingerprint


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the name of the type that `--dtype` means on a device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def load_pretrained(
    flag: str, name: str, auto_class, *, quantize: bool, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by folder or hub name.

    Args:
        flag: the flag that gave `name`, for the messages of errors.
        auto_class: AutoModelForCausalLM, or AutoModel for a backbone without a head.
        quantize: make the weights of linear layers NF4, with double quantisation (bitsandbytes).
        dtype: of all other weights and of the computation, see `resolve_dtype`.

    Raises InputError if there is no such GPU, or if the model cannot be loaded or lacks weights, a
    vocabulary or an end-of-message token.
    """
    with errors_name(f"--device {device}"):
        torch.empty(0, device=device)
    compute_dtype = getattr(torch, resolve_dtype(dtype, device))
    options = {"dtype": compute_dtype, "output_loading_info": True, "trust_remote_code": False}
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
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry
    trouble = f"cannot be loaded{' in NF4' if quantize else ''}; no folder or hub name, or damaged"
    with errors_name(f"{flag} {name}: {trouble}"):
        model, report = auto_class.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    # Weights that the files lack would be random.
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise InputError(f"{flag} {name}: its files lack weights: {', '.join(absent[:3])} ...")
    if tokenizer.eos_token_id is None or not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise InputError(f"{flag} {name}: its tokenizer has no end-of-message (eos) or other token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not quantize:
        return model.to(device), tokenizer
    # On some CPUs, bitsandbytes would repack NF4 weights for a bfloat16 kernel whenever the model
    # is not training: V would differ between training and search, and between machines.
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


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


# The files of a checkpoint that decide what it computes: weights, configuration and tokenizer.
CHECKPOINT_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")


def checkpoint_setting(name: str) -> dict:
    """Return how a checkpoint is recorded: its name, and a fingerprint that moves with it.

    The fingerprint is of the files of a folder, or the commit of a model that the hub has given.
    """
    folder = Path(name)
    if not folder.is_dir():
        snapshot = Path(cached_file(name, "config.json", local_files_only=True)).parent
        return {"name": name, "fingerprint": f"{name}@{snapshot.name}"}
    paths = {path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)}
    return {"name": name, "fingerprint": file_fingerprint(sorted(paths))}
