"""Pieces that several tests use: scripted replies, small graphs, and the tiny agents."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout

import matplotlib
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import generate_rollouts
from llm import sampling
from llm.decoding import Decoder
from llm.policy import Policy, make_policy
from mas import CHAIN, MAS, Agent
from support.flags import HERE
from tree import Candidate, Cost, Sample

torch.set_num_threads(1)
AGENTS = str(HERE / "tiny" / "agents")

# Files whose tests take longest. `make test` hands out whole files: these begin first, so that no
# process is left with a long one at the end.
LONGEST_FILES = ["test_pipeline.py", "test_value.py", "test_train_agents.py"]


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


# ---- Other processes -----------------------------------------------------------------------------


def start_in_fork(function) -> int:
    """Call a function in a forked child, silently. Returns its process id.

    A fork has imported all libraries already, a new process takes seconds for them. It can hang if
    torch has started further threads.
    """
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            try:
                function()
                os._exit(0)
            finally:
                os._exit(1)  # reached only if the function has raised
    return child


def exit_code_of(child, *, timeout=120) -> int:
    """Wait for a child; kill it after `timeout` seconds. Returns its exit code, -9 if killed."""
    deadline = time.time() + timeout
    ended, status = os.waitpid(child, os.WNOHANG)
    while ended == 0:
        if time.time() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)


# ---- Scripts that are stopped --------------------------------------------------------------------


class StopError(BaseException):
    """Ends a script once a test has seen what it wanted to see."""


def stop(*args, **options):
    raise StopError


# ---- Searches without a model --------------------------------------------------------------------


class NoProgress:
    """Replaces SearchProgress and shows nothing."""

    def sampled(self, num_prompts: int, num_messages: int) -> None: ...

    def search_finished(self, num_messages: int) -> None: ...


class ScriptedPolicy:
    """Answers Sample requests without a model. Asserts that it is sent no other request.

    Args:
        say: path of a candidate from the root -> text of its message.

    Attributes:
        batches: number of requests in each batch.
        calls: number of messages so far.
    """

    def __init__(self, say):
        self.say = say
        self.batches = []
        self.calls = 0

    def __call__(self, requests):
        assert all(type(request) is Sample for _, request in requests)
        self.batches.append(len(requests))
        replies = []
        for _, request in requests:
            reply = [self._candidates(node, request.num) for node in request.nodes]
            num_messages = request.num * len(request.nodes)
            self.calls += num_messages
            replies.append((reply, Cost(agent_calls=num_messages)))
        return replies

    def _candidates(self, node, num: int) -> list[Candidate]:
        candidates = []
        for index in range(num):
            text = self.say((*node.path, index))
            candidates.append(Candidate(text, tokens=2, logprob=-0.5, truncated=False))
        return candidates


def drive(search, handlers):
    """Answer the requests of one search, one at a time. Returns the result of the search."""
    reply = None
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value
        handler = handlers[type(request)]
        [(reply, _)] = handler([(None, request)])


# ---- Graphs --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chain() -> MAS:
    return CHAIN


@pytest.fixture(scope="session")
def duo() -> MAS:
    """Two agents: small enough to work out trees by hand."""
    first = Agent("A", sees=("Q",), prompt="You are A.", max_new_tokens=16)
    second = Agent("B", sees=("Q", "A"), prompt="You are B.", max_new_tokens=16)
    return MAS("duo", (first, second))


def hint_graph():
    """B may be skipped: then the second message is C's, the third agent's."""
    a = Agent("A", sees=("Q",), prompt="", max_new_tokens=1)
    b = Agent("B", sees=("A",), prompt="", max_new_tokens=1, when=("A", "help"))
    c = Agent("C", sees=("Q", "A", "B"), prompt="", max_new_tokens=1)
    return MAS("hint", (a, b, c))


# ---- The tiny agents -----------------------------------------------------------------------------


def make_tiny_policy(mas: MAS, *, model: str = AGENTS, **changes) -> Policy:
    """Load a policy as the scripts do, on one thread of the CPU, with messages of 128 tokens.

    changes: flags that differ from their defaults, e.g. `batch_tokens=700`; None for a switch.
    """
    argv = ["--model", model, "--device", "cpu", "--num-threads", "1"]
    for name, value in ({"max_new_tokens": 128} | changes).items():
        argv.append("--" + name.replace("_", "-"))
        if value is not None:
            argv.append(str(value))
    args = generate_rollouts.parse_args(argv)
    return make_policy(args, mas)


def sample_tiny_rollouts(policy: Policy, problems, *, counts, num_agents, seed):
    """Sample rollouts of stage 5, all at once."""
    from train_agents import sample_rollouts

    return sample_rollouts(
        problems,
        policy,
        num_candidates=counts,
        num_agents=num_agents,
        seed=seed,
        max_active=64,
        description="",
    )


@pytest.fixture(scope="session")
def policy(chain) -> Policy:
    return make_tiny_policy(chain)


# ---- Records -------------------------------------------------------------------------------------


def dev_record(step, value, right, auc):
    """Return a line of stage 5's metrics.jsonl in which every number is another one."""
    agent = {"value": value, "right": right, "value_auc": auc, "tokens": 9.0, "truncated": 0.0}
    record = {"step": step, "messages": 10 * step, "dev": {"accuracy": right}}
    record["dev"]["agents"] = {"Planner": agent}
    return record | {"reward": {"Planner": 0.25}, "kl": 0.125, "clip_share": 0.0625}


# ---- Pictures ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that the functions of pictures.py have drawn, kept open."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    for figure in drawn:
        close(figure)


# ---- Pages ---------------------------------------------------------------------------------------


def dom_of(page, tmp_path, fragment="", *, width=1200):
    """Return the document as a browser has built it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    path = tmp_path / "tree.html"
    path.write_text(page, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-sync", "--disable-quic"]
    command += [f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


# ---- Sampling ------------------------------------------------------------------------------------


def keys_of(count: int) -> torch.Tensor:
    """Return the keys of so many messages of one prompt."""
    return torch.tensor([sampling.message_key(0, "p", (0, 1), index) for index in range(count)])


@pytest.fixture(params=[1024, 3, 1], ids="blocks of {}".format)
def block_size(request, monkeypatch):
    """Let the sampler work on a small vocabulary as on a large one: on one block, or on several."""
    monkeypatch.setattr(sampling, "BLOCK_SIZE", request.param)
    return request.param


# ---- Small models with random weights ------------------------------------------------------------

VOCABULARY = 8
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="session")
def small_model():
    """Return a language model with random weights, whose next tokens are far from uniform."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_with_absolute_positions():
    """Return a model with random weights that sees where in its row a token is.

    With rotary positions only distances matter, so that shifted positions would go unnoticed.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def model_with_windows():
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def make_decoder(model, *, cuda_graphs=False):
    """Make a decoder at temperature 1, for which token 0 ends a message."""
    return Decoder(
        model,
        eos_ids={0},
        pad_id=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        cuda_graphs=cuda_graphs,
    )
