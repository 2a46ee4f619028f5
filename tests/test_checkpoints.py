"""Tests of checkpoints.py, and of what else depends on the family of a model.

Each family is its real architecture with a tiny configuration and random weights, and its kind of
chat template. The tokenizer is that of the tiny agents with the family's special tokens.
"""

import datetime
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import AGENTS, make_tiny_policy
from llm.chat import ChatFormat, without_reasoning
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import chat_template_utils

import generate_rollouts
from llm.adapters import add_lora
from llm.decoding import Decoder, message_key
from llm.loading import (
    checkpoint_fingerprint,
    context_length,
    end_of_message_ids,
    load_pretrained,
    resolve_dtype,
)
from llm.packing import pack
from llm.policy import policy_settings
from mas import CHAIN, State
from support.flags import InputError
from tasks.problems import load_problems
from tree import Sample, make_root
from value import Row, ValueModel, load_backbone

# ---- Families ------------------------------------------------------------------------------------
# The templates are short, and do with system role, date and reasoning what the family's own do.

QWEN_2 = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN_3 = (
    QWEN_2
    + """{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}
<think>

</think>

{% endif %}"""
)

LLAMA_3 = """{{ bos_token }}{% if not date_string is defined %}
{%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
{%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if messages[0].role == "system" %}{% set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif -%}
<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: {{ date_string }}

{{ system }}<|eot_id|>
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

GEMMA_2 = """{{ bos_token }}{% if messages[0].role == "system" %}
{{- raise_exception("System role not supported") }}{% endif %}
{%- for message in messages %}<start_of_turn>
{{- "model" if message.role == "assistant" else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

GEMMA_3 = """{{ bos_token }}{% set system = "" %}{% if messages[0].role == "system" %}
{%- set system = messages[0].content + "\n\n" %}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages %}<start_of_turn>{{ message.role }}
{{ system if loop.first else "" }}{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif %}[INST] {{ message.content }} [/INST]{% endfor %}"""

# The first template of Phi-3 leaves out the system turn without an error.
PHI_3 = """{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}<|user|>
{{ message.content }}<|end|>
<|assistant|>
{% endif %}{% endfor %}"""

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # large, so that random weights say different things
}
WINDOW = 16  # of sliding-window attention; prompts and messages are longer


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
        bos, eos: its special tokens; bos is None if its texts do not begin with one.
        merges_system: whether its template has no system role.
        config: of its architecture, beyond SHAPE.
    """

    name: str
    template: str
    bos: str | None
    eos: str
    merges_system: bool = False
    config: dict = field(default_factory=dict)


FAMILIES = [
    Family("qwen2", QWEN_2, bos=None, eos="<|im_end|>"),
    Family("qwen3", QWEN_3, bos=None, eos="<|im_end|>", config={"head_dim": 8}),
    Family("llama", LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>"),
    Family(
        "gemma2",
        GEMMA_2,
        bos="<bos>",
        eos="<eos>",
        merges_system=True,
        config={"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    ),
    Family(
        "gemma3_text",
        GEMMA_3,
        bos="<bos>",
        eos="<eos>",
        config={
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Family(
        "mistral",
        MISTRAL,
        bos="<s>",
        eos="</s>",
        merges_system=True,
        config={"head_dim": 8, "sliding_window": WINDOW},
    ),
    Family(
        "phi3",
        PHI_3,
        bos="<s>",
        eos="<|endoftext|>",
        merges_system=True,
        config={"sliding_window": WINDOW},
    ),
]


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return the tiny agents' tokenizer with the special tokens and the template of a family."""
    backend = AutoTokenizer.from_pretrained(AGENTS).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token="<|endoftext|>",
    )
    if family.bos is not None:
        bos = (family.bos, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    tokenizer.chat_template = family.template
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    """Return the folder of a checkpoint of a family."""
    folder = tmp_path_factory.mktemp(family.name)
    tokenizer = make_tokenizer(family)
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(family.name, **SHAPE, **special, **family.config)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(checkpoint):
    return make_tiny_policy(CHAIN, model=str(checkpoint), max_new_tokens=12)


CHAT = [
    {"role": "system", "content": "You are the Reader."},
    {"role": "user", "content": "How many?"},
]


def render(policy, chat=CHAT):
    [ids] = policy.chat_format.encode([chat])
    return policy.chat_format.tokenizer.decode(ids)


# ---- Prompts -------------------------------------------------------------------------------------


def test_every_template_says_the_role_then_the_question(family, policy):
    text = render(policy)
    assert 0 <= text.find("You are the Reader.") < text.find("How many?")
    assert policy.chat_format.merges_system == family.merges_system
    if family.merges_system:
        assert "You are the Reader.\n\nHow many?" in text


def test_a_prompt_begins_with_one_bos_where_the_family_has_one(family, policy):
    text = render(policy)
    if family.bos is None:
        assert policy.chat_format.tokenizer.bos_token is None
    else:
        assert text.startswith(family.bos)
        assert text.count(family.bos) == 1


def test_every_family_samples_messages(policy):
    [problem] = load_problems(task="tiny", data=None, split="test", num=1)
    [([candidates], cost)] = policy([(problem, Sample([make_root(problem.question)], 3))])
    assert len({candidate.text for candidate in candidates}) == 3
    assert cost.generated_tokens == sum(candidate.tokens for candidate in candidates)


# ---- Templates -----------------------------------------------------------------------------------


def chat_format(template, **template_kwargs):
    """Return the ChatFormat of a template, without a model."""
    tokenizer = AutoTokenizer.from_pretrained(AGENTS)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, name="--model model", template_kwargs=template_kwargs)


def text_of(template, **template_kwargs):
    one_format = chat_format(template, **template_kwargs)
    [ids] = one_format.encode([CHAT])
    return one_format.tokenizer.decode(ids)


class AnotherDay(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 12, 24)


def test_a_prompt_does_not_depend_on_the_day(monkeypatch):
    before = text_of(LLAMA_3)
    monkeypatch.setattr(chat_template_utils, "datetime", AnotherDay)
    assert text_of(LLAMA_3) == before
    assert "Today Date: 26 Jul 2024" in before


def test_every_date_format_has_the_fixed_date():
    template = QWEN_2 + '{{ strftime_now("%A, %d %B %Y, %H:%M:%S, %y-%m, %a %b") }}'
    assert text_of(template).endswith("Friday, 26 July 2024, 00:00:00, 24-07, Fri Jul")


def test_variables_of_the_template_can_be_given():
    empty_block = "<think>\n\n</think>\n\n"
    assert empty_block not in text_of(QWEN_3)
    assert empty_block not in text_of(QWEN_3, enable_thinking=True)
    assert text_of(QWEN_3, enable_thinking=False).endswith(empty_block)
    assert "Today Date: 1 May" in text_of(LLAMA_3, date_string="1 May")


def test_a_template_that_begins_with_a_newline_is_rendered_as_it_is():
    tokenizer = AutoTokenizer.from_pretrained(AGENTS)
    tokenizer.chat_template = "\n " + QWEN_2
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text_of(tokenizer.chat_template) == expected
    assert expected.startswith("\n")


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{% for %}", "its chat template fails"),
        ('{{ raise_exception("no\nroles") }}', "its chat template fails: no$"),
        ('{{ raise_exception("") }}', "its chat template fails"),
        ("{{ messages[7].content }}", "its chat template fails"),
        ("{{ 1 + messages[0].content }}", "its chat template fails"),
        ("{{ messages[0].content }}", "its chat template leaves out the user's text"),
        (None, "its tokenizer has no chat template; the agents need a chat model"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(template, complaint):
    with pytest.raises(InputError, match=f"^--model model: {complaint}") as error:
        chat_format(template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["messages", "tokenize", "chat_template", "tools"])
def test_a_variable_that_is_ours_is_refused(key):
    with pytest.raises(InputError, match=f"--chat-template-kwargs: {key} is set by this program"):
        chat_format(QWEN_2, **{key: False})


@pytest.mark.parametrize("text", ["{", "[1]", "7", '"text"', "null"])
def test_template_variables_that_are_no_json_object_are_refused(text):
    with pytest.raises(InputError, match="--chat-template-kwargs: .* is not (a )?JSON"):
        generate_rollouts.parse_args(["--chat-template-kwargs", text])


def test_template_variables_and_date_are_recorded():
    argv = ["--chat-template-kwargs", '{"enable_thinking": false}']
    settings = policy_settings(generate_rollouts.parse_args(argv), CHAIN)
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert settings["template_date"] == "2024-07-26"
    assert policy_settings(generate_rollouts.parse_args([]), CHAIN)["chat_template_kwargs"] == {}


# ---- Number types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, device, dtype",
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda", "bfloat16"),
        ("auto", "cuda:3", "bfloat16"),
        ("float32", "cuda", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_the_type_of_numbers_is_resolved_and_recorded(flag, device, dtype):
    args = generate_rollouts.parse_args(["--dtype", flag, "--device", device])
    assert resolve_dtype(flag, device) == dtype
    assert policy_settings(args, CHAIN)["dtype"] == dtype


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_a_device_that_does_not_exist_is_refused(device):
    with pytest.raises(InputError, match="--device: .* is not cpu, cuda or cuda:N"):
        generate_rollouts.parse_args(["--device", device])


@pytest.mark.parametrize("num_gpus, device", [(0, "cuda"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, num_gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(InputError, match=f"--device {device}: torch sees {num_gpus} GPUs here"):
        make_tiny_policy(CHAIN, device=device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_agents_are_loaded_in_the_type_that_is_asked_for(dtype):
    model = make_tiny_policy(CHAIN, dtype=dtype).decoder.model
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}


# ---- Reasoning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("The answer is 4.", "The answer is 4."),
        ("<think>Is it 5?\nNo.</think>\n\nFour.", "Four."),
        ("Is it 5? No.</think>\nFour.", "Four."),
        ("<think>Is it 5? And then", ""),
        ("Four. <think>Or is it 5?", "Four."),
        ("Four <think>a\nb</think>boxes.", "Four boxes."),
        ("<think>a</think>Four <think>b</think>boxes.", "Four boxes."),
        ("<think>a <think>b</think> Final answer: 5 </think>Four.", "Four."),
        ("<think>\n\n</think>\n\nFour.", "Four."),
    ],
)
def test_reasoning_is_not_part_of_a_message(text, message):
    assert without_reasoning(text).strip() == message
    one_format = chat_format(QWEN_2)
    ids = one_format.tokenizer(text)["input_ids"]
    assert one_format.message(ids) == message


def test_a_block_that_the_prompt_opens_is_reasoning_until_it_is_closed():
    one_format = chat_format(QWEN_2 + "<think>\n")
    encode = one_format.tokenizer
    assert one_format.message(encode("Is it 5? Final answer: 5")["input_ids"]) == ""
    assert one_format.message(encode("Is it 5?</think>\nFour.")["input_ids"]) == "Four."
    closed = chat_format(QWEN_3, enable_thinking=False)
    assert closed.message(encode("Four.")["input_ids"]) == "Four."


def test_other_agents_see_no_reasoning_and_its_tokens_are_counted(monkeypatch):
    policy = make_tiny_policy(CHAIN)
    text = "<think>Is it 5?</think>Four."
    ids = [*policy.chat_format.tokenizer(text)["input_ids"], *policy.decoder.eos_ids]
    logprobs = [-0.5] * len(ids)

    def decode(*batch, on_message, **options):
        on_message(0, ids, logprobs, 0.0)

    monkeypatch.setattr(policy.decoder, "decode", decode)
    [problem] = load_problems(task="tiny", data=None, split="test", num=1)
    [([[candidate]], cost)] = policy([(problem, Sample([make_root(problem.question)], 1))])
    assert candidate.text == "Four."
    assert not candidate.truncated
    assert candidate.tokens == cost.generated_tokens == len(ids)
    assert candidate.logprob == sum(logprobs)


# ---- The decoder against `generate` --------------------------------------------------------------

GREEDY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
LENGTHS = (5, 2 * WINDOW, WINDOW - 3)  # of the prompts
LIMIT = WINDOW + 8


def random_prompts():
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for length in LENGTHS:
        prompts.append(torch.randint(10, 600, (length,), generator=generator).tolist())
    return prompts


def generate_alone(model, prompt, *, eos_ids):
    """Decode one prompt greedily by `generate`. Returns the new token ids."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=LIMIT, eos_token_id=sorted(eos_ids), pad_token_id=0
    )
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def test_greedy_messages_equal_generate_token_by_token(policy):
    """Prompts of different lengths in one batch. One message ends early and its row is removed."""
    model = policy.decoder.model
    prompts = random_prompts()
    endless = generate_alone(model, prompts[1], eos_ids={-1})
    # A token of the second message ends messages: the others do not say it, or at another step.
    eos_ids = {endless[LIMIT // 3]}
    expected = [generate_alone(model, prompt, eos_ids=eos_ids) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    assert min(map(len, expected)) < max(map(len, expected))

    decoder = Decoder(model, eos_ids=eos_ids, pad_id=0, **GREEDY)
    num = len(prompts)
    longest = max(map(len, prompts)) + LIMIT
    for batch_tokens in (None, 2 * longest):  # all together, and two messages at a time
        messages = decoder.decode(
            prompts,
            [2] * num,
            [LIMIT] * 2 * num,
            [0] * 2 * num,
            [True] * 2 * num,
            batch_tokens=batch_tokens,
        )
        decoded = [tokens for tokens, _ in messages]
        assert decoded[0::2] == expected
        assert decoded[1::2] == expected


def test_messages_that_share_rows_equal_messages_decoded_one_by_one(policy):
    """Three sampled messages per prompt, which begin alike, branch, and end at different steps."""
    model = policy.decoder.model
    prompts = random_prompts()
    repeats = [3] * len(prompts)
    num = sum(repeats)
    keys = [message_key("shared", index) for index in range(num)]
    # Few tokens are likely, so that messages have common beginnings, and some end early.
    sampling = {"temperature": 0.7, "top_k": 2, "top_p": 1.0}
    eos_ids = set(range(0, 640, 8))
    decoder = Decoder(model, eos_ids=eos_ids, pad_id=0, **sampling)
    together = decoder.decode(prompts, repeats, [LIMIT] * num, keys, [False] * num)
    longest = max(map(len, prompts)) + LIMIT
    refilled = decoder.decode(
        prompts, repeats, [LIMIT] * num, keys, [False] * num, batch_tokens=4 * longest
    )
    assert [tokens for tokens, _ in refilled] == [tokens for tokens, _ in together]
    for index, key in enumerate(keys):
        prompt = prompts[index // 3]
        [(tokens, logprobs)] = decoder.decode([prompt], [1], [LIMIT], [key], [False])
        assert together[index][0] == tokens
        assert together[index][1] == pytest.approx(logprobs, abs=1e-3)
    lengths = {len(tokens) for tokens, _ in together}
    assert len(lengths) > 1
    first_two = {tuple(tokens[:2]) for tokens, _ in together}
    assert len(prompts) < len(first_two) < num


@pytest.mark.parametrize("named, ids", [(None, {2}), (5, {2, 5}), ([5, 7], {2, 5, 7})])
def test_a_message_ends_as_the_tokenizer_or_the_checkpoint_says(named, ids):
    """Gemma's tokenizer names <eos>, its checkpoint <end_of_turn> as well."""
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=named))
    assert end_of_message_ids(model, SimpleNamespace(eos_token_id=2)) == ids


# ---- V on every family ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def value_model(checkpoint):
    """Return a V with random LoRA and head."""
    torch.manual_seed(0)
    backbone, tokenizer = load_backbone(
        str(checkpoint), quantize=False, device="cpu", dtype="float32"
    )
    model = ValueModel(add_lora(backbone, rank=2), tokenizer, CHAIN, "full", "huber")
    for parameter in model.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def test_v_reads_one_bos_where_the_family_has_one(family, value_model):
    ids, _ = value_model.encode(CHAIN.step(State("How many?", ()), "Four."))
    bos_id = value_model.tokenizer.bos_token_id
    if family.bos is None:
        assert bos_id is None
        assert value_model.beginning == []
    else:
        assert ids[0] == bos_id
        assert ids.count(bos_id) == 1


def test_states_are_prefixes_of_their_childrens_on_every_family(value_model):
    """For token ids, and for V: one forward over a path reads V of every state on it."""
    state = State("How many boxes? " * 8, ())
    states = []
    for text in ("Some facts. " * 6, "", "Four."):
        state = CHAIN.step(state, text)
        states.append(state)
    encoded = [value_model.encode(state) for state in states]
    for (ids, ends), (child_ids, child_ends) in pairwise(encoded):
        assert child_ids[: len(ids)] == ids
        assert child_ends[: len(ends)] == ends

    ids, ends = encoded[-1]
    assert len(ids) > 2 * WINDOW
    [by_path] = value_model.predict([Row(ids, ends[1:])], batch_tokens=4000)
    together = value_model.score(states, batch_tokens=4000)
    alone = [value_model.score([state], batch_tokens=1)[0] for state in states]
    assert together == pytest.approx(alone, abs=1e-5)
    assert by_path == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 3) for value in alone}) == len(alone)


def test_lora_adapts_every_linear_layer_of_every_family(value_model):
    """Fused projections as in Phi-3 included."""
    adapted = 0
    for name, module in value_model.backbone.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            assert name.endswith("base_layer")
            adapted += 1
    assert adapted >= 4 * SHAPE["num_hidden_layers"]
    ids, ends = value_model.encode(CHAIN.step(State("How many?", ()), "Four."))
    batch = pack([ids], token_cost=None, max_width=len(ids))
    value_model.outputs(batch, [(0, ends[-1])]).sum().backward()
    for name, parameter in value_model.trained_parameters().items():
        assert parameter.grad.abs().sum() > 0, name


# ---- Loading and fingerprints --------------------------------------------------------------------


def test_a_tokenizer_without_padding_pads_with_its_end(monkeypatch):
    """As that of Llama 3."""
    backend = AutoTokenizer.from_pretrained(AGENTS).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    monkeypatch.setattr("llm.loading.AutoTokenizer.from_pretrained", lambda name: tokenizer)
    _, loaded = load_pretrained(
        "--model", AGENTS, AutoModelForCausalLM, quantize=False, device="cpu", dtype="float32"
    )
    assert loaded.pad_token_id == loaded.eos_token_id == 2


class NeedsBitsandbytes:
    @staticmethod
    def from_pretrained(name, **options):
        raise ImportError("no bitsandbytes")


@pytest.mark.parametrize(
    "flag, remedy",
    [("--backbone", "give --no-quantize"), ("--model", "leave out --quantize-policy")],
)
def test_without_bitsandbytes_the_error_names_the_flag_that_does_without(flag, remedy):
    with pytest.raises(InputError, match=f"{flag} .*; install it, or {remedy}$"):
        load_pretrained(
            flag, AGENTS, NeedsBitsandbytes, quantize=True, device="cpu", dtype="float32"
        )


def test_the_fingerprint_of_a_checkpoint_is_of_all_its_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(40 << 20))
    before = checkpoint_fingerprint(str(tmp_path), None)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    assert checkpoint_fingerprint(str(tmp_path), None) != before


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "pytorch_model.bin", "config.json", "chat_template.jinja"]
    + ["tokenizer.model", "merges.txt"],
)
def test_every_file_that_decides_what_a_checkpoint_computes_counts(tmp_path, name):
    before = checkpoint_fingerprint(str(tmp_path), None)
    (tmp_path / name).write_text("x")
    assert checkpoint_fingerprint(str(tmp_path), None) != before


def test_a_model_without_trained_positions_has_no_limit():
    """Bloom's positions are biases of the attention; its configuration names no limit."""
    assert context_length(SimpleNamespace(config=Qwen2Config(max_position_embeddings=9))) == 9
    assert context_length(SimpleNamespace(config=BloomConfig())) > 10**9
