"""Tests of llm/loading.py, and of what else depends on the family of a model: its chats.

The templates are short, and do with system role, date and reasoning what the real ones do.
"""

import datetime
import json
import pickle
import shutil
from io import StringIO

import pytest
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from llm.loading import checkpoint_setting, load_pretrained
from llm.policy import ChatFormat
from support.flags import TINY_AGENTS, InputError

# ---- Chats ---------------------------------------------------------------------------------------

QWEN_2 = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
QWEN_3 = f"{QWEN_2}{{% if enable_thinking is false %}}{EMPTY_BLOCK}{{% endif %}}"
LLAMA_3 = """{{ bos_token }}{% if not date_string is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{% endif %}Today Date: {{ date_string }}
{% for message in messages %}{{ message.role }}: {{ message.content }}<|eot_id|>{% endfor %}"""
GEMMA_2 = """{{ bos_token }}{% if messages[0].role == "system" %}
{{- raise_exception("System role not supported") }}{% endif %}
{%- for message in messages %}{{ message.content }}<end_of_turn>{% endfor %}"""
# The first template of Phi-3 leaves out the system turn without an error.
PHI_3 = """{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}<|user|>
{{ message.content }}<|end|>{% endif %}{% endfor %}"""

FAMILIES = {  # template, BOS, and whether it refuses or leaves out the system role
    "qwen2": (QWEN_2, None, False),
    "qwen3": (QWEN_3, None, False),
    "llama3": (LLAMA_3, "<|begin_of_text|>", False),
    "gemma2": (GEMMA_2, "<bos>", True),
    "phi3": (PHI_3, "<s>", True),
}
CHAT = [{"role": "system", "content": "You are the Reader."}]
CHAT += [{"role": "user", "content": "How many?"}]


def make_format(template: str | None, *, bos: str | None = None, **template_kwargs) -> ChatFormat:
    """Make a tokenizer that begins texts with BOS if there is one, and has this template."""
    backend = AutoTokenizer.from_pretrained(TINY_AGENTS).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|im_end|>"
    )
    if bos is not None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, name="--model model", template_kwargs=template_kwargs)


def text_of(chat_format: ChatFormat) -> str:
    return chat_format.tokenizer.decode(chat_format.encode(CHAT))


@pytest.mark.parametrize("template, bos, merges_system", FAMILIES.values(), ids=FAMILIES)
def test_every_template_says_the_role_then_the_question_after_one_bos(template, bos, merges_system):
    chat_format = make_format(template, bos=bos)
    text = text_of(chat_format)
    assert 0 <= text.find("You are the Reader.") < text.find("How many?")
    assert chat_format.merges_system == ("You are the Reader.\n\nHow many?" in text)
    assert chat_format.merges_system == merges_system
    assert bos is None or (text.startswith(bos) and text.count(bos) == 1)


class AnotherDay(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 12, 24)


def test_a_prompt_does_not_depend_on_the_day(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", AnotherDay)
    assert "Today Date: 26 Jul 2024" in text_of(make_format(LLAMA_3))
    text = text_of(make_format(QWEN_2 + "{{ strftime_now('%y-%m-%d, %A') }}"))
    assert text.endswith("24-07-26, Friday")


def test_variables_of_the_template_can_be_given():
    assert not text_of(make_format(QWEN_3)).endswith(EMPTY_BLOCK)
    assert text_of(make_format(QWEN_3, enable_thinking=False)).endswith(EMPTY_BLOCK)
    assert "Today Date: 1 May" in text_of(make_format(LLAMA_3, date_string="1 May"))
    with pytest.raises(InputError, match="tokenize"):  # is set by the program
        make_format(QWEN_3, tokenize=True)


OPENED = QWEN_2 + "<think>\n"  # by the prompt: then all is reasoning until it is closed
REASONING = [  # template, what is sampled, and the message
    (QWEN_2, "The answer is 4.", "The answer is 4."),
    (QWEN_2, "<think>Is it 5?\nNo.</think>\n\nFour.", "Four."),
    (QWEN_2, "Is it 5? No.</think>\nFour.", "Four."),
    (QWEN_2, "<think>Is it 5? And then", ""),
    (QWEN_2, "Four. <think>Or is it 5?", "Four."),
    (QWEN_2, "<think>a</think>Four <think>b\nb</think>boxes.", "Four boxes."),
    (QWEN_2, "<think>a <think>b</think> Final answer: 5 </think>Four.", "Four."),
    (OPENED, "Is it 5? Final answer: 5", ""),
    (OPENED, "Is it 5?</think>\nFour.", "Four."),
]


@pytest.mark.parametrize("template, text, message", REASONING)
def test_reasoning_is_not_part_of_a_message(template, text, message):
    chat_format = make_format(template)
    ids = chat_format.tokenizer(text)["input_ids"]
    assert chat_format.message([*ids, chat_format.tokenizer.eos_token_id]) == message


# ---- Loading -------------------------------------------------------------------------------------


def load(name):
    options = {"quantize": False, "device": "cpu", "dtype": "auto"}
    return load_pretrained("--model", str(name), AutoModelForCausalLM, **options)


def test_a_model_without_end_of_message_or_weights_is_refused(copied_agents):
    # A tokenizer without padding pads with its end, as that of Llama 3; it cannot lack both.
    settings = copied_agents / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.replace('"pad_token": "<|endoftext|>"', '"pad_token": null'))
    _, tokenizer = load(copied_agents)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    settings.write_text(text.replace('"eos_token": "<|im_end|>"', '"eos_token": null'))
    with pytest.raises(InputError, match="end-of-message"):
        load(copied_agents)
    settings.write_text(text)

    # Weights that are not in the files would be random.
    weights = load_file(copied_agents / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copied_agents / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lack weights"):
        load(copied_agents)


def test_code_of_a_checkpoint_is_not_run_though_the_terminal_says_yes(copied_agents, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO("y\n" * 99))
    (copied_agents / "foreign.py").write_text("raise RuntimeError('it was run')")
    path = copied_agents / "config.json"
    settings = json.loads(path.read_text()) | {"model_type": "foreign"}
    path.write_text(json.dumps(settings | {"auto_map": {"AutoConfig": "foreign.Foreign"}}))
    with pytest.raises(InputError, match=f"^--model {copied_agents}: [^\n]+$"):
        load(copied_agents)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGED = [("config.json", b"[]"), ("config.json", None), ("tokenizer.json", None)]
DAMAGED += [("model.safetensors", content) for content in (None, POINTER, pickle.dumps({"a": 1}))]


@pytest.mark.parametrize("file, content", DAMAGED)
def test_a_checkpoint_with_a_damaged_or_missing_file_is_refused(copied_agents, file, content):
    (copied_agents / file).unlink()
    if content is not None:
        (copied_agents / file).write_bytes(content)
    with pytest.raises(InputError, match=f"--model {copied_agents}: "):
        load(copied_agents)


FILES = ["model-1-of-2.safetensors", "pytorch_model.bin", "config.json", "merges.txt"]
FILES += ["chat_template.jinja", "tokenizer.model"]


def test_the_fingerprint_of_a_checkpoint_is_of_all_that_decides_what_it_computes(tmp_path):
    seen = [checkpoint_setting(str(tmp_path))["fingerprint"]]
    for name in FILES:
        for last_byte in b"12":
            size = 17 << 20 if name == FILES[0] else 1  # more than is read at once
            (tmp_path / name).write_bytes(bytes(size) + bytes([last_byte]))
            seen.append(checkpoint_setting(str(tmp_path))["fingerprint"])
    assert len(set(seen)) == 1 + 2 * len(FILES)
    (tmp_path / "README.md").write_text("no part of it")
    assert checkpoint_setting(str(tmp_path)) == {"name": str(tmp_path), "fingerprint": seen[-1]}


def test_a_model_of_the_hub_is_recorded_by_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(TINY_AGENTS, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load("org/tiny")
    assert checkpoint_setting("org/tiny")["fingerprint"] == f"org/tiny@{commit}"
