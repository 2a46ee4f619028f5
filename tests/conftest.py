"""Shared pieces: a scripted stand-in for the policy, and the embedded tiny agents loaded once."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from generate_rollouts import Candidate, Cost, Policy, Sample  # noqa: E402
from mas import GRAPHS, MAS, Agent  # noqa: E402

torch.set_num_threads(1)
AGENTS = str(HERE.parent / "tiny" / "agents")


def pytest_configure(config):
    """Deprecations inside torch and peft are theirs to mend."""
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.*:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing.*:FutureWarning")


class NoProgress:
    """Stands in for a progress bar."""

    def update(self, n=1): ...

    def set_postfix_str(self, text): ...


class ScriptedPolicy:
    """Answers Sample requests from `say(path) -> text`, a function of the candidate's path from the root alone.

    Also checks what a driver owes it: one kind of request per batch, and records the batch sizes.
    """

    def __init__(self, say):
        self.say, self.batches, self.calls = say, [], 0

    def __call__(self, requests):
        assert all(type(request) is Sample for _, request in requests)
        self.batches.append(len(requests))
        replies = []
        for _, request in requests:
            self.calls += request.num * len(request.nodes)
            replies.append(([[Candidate(self.say(node.path + (k,)), 2, -0.5, False) for k in range(request.num)]
                             for node in request.nodes], Cost(agent_calls=request.num * len(request.nodes))))
        return replies


def drive(search, handlers):
    """Answer one search's requests without `run`: the plainest possible driver. Returns its result."""
    reply = None
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value
        [(reply, _)] = handlers[type(request)]([(None, request)])


@pytest.fixture(scope="session")
def chain() -> MAS:
    return GRAPHS["chain"]


@pytest.fixture(scope="session")
def duo() -> MAS:
    """Two agents: small enough to work out trees by hand."""
    return MAS("duo", (Agent("A", ("Q",), "You are A.", 16), Agent("B", ("Q", "A"), "You are B.", 16)))


def make_tiny_policy(chain, **changes) -> Policy:
    settings = dict(seed=0, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=128, batch_tokens=32768, device="cpu", quantize=False)
    return Policy(chain, changes.pop("model", AGENTS), **(settings | changes))


@pytest.fixture(scope="session")
def policy(chain) -> Policy:
    return make_tiny_policy(chain)
