"""Stage 5: finetune the agents on a reward for each of their messages (MAPPA, arXiv 2601.23228).

Each step samples messages for some training questions with the agents as they are now, gives each
message a reward, and makes messages that did better than expected more likely.

    python train_agents.py                                    # reward V -> runs/tiny/agents
    python train_agents.py --reward outcome                   # the control: only the final answer
    python train_agents.py --rollouts tree --num-candidates 1.8.1.1 --baseline siblings
    python evaluate.py --run runs/after --adapter runs/tiny/agents --value runs/tiny/value

Differs from MAPPA: the reward is V, which was trained on final answers only, without a human or a
stronger model (MAPPA's coach is `--reward coach`); agents are LoRA adapters on one frozen base,
which is also the reference; the adapters that are best on held-out problems are kept, whatever
their reward.

What a message is worth is in rewards.py; this file has the update, and the loop around it.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from generate_rollouts import (
    add_training_problems_arguments,
    grade_terminals,
    load_training_problems,
)
from llm.adapters import AgentAdapters, adapter_names
from llm.coach import Coach
from llm.loading import checkpoint_fingerprint
from llm.packing import Batch, collate, packed_batches, sequence_columns, token_cost_for
from llm.policy import Policy, add_policy_arguments, make_policy
from mas import MAS, counts_per_agent, load_graph
from report.diagnosis import agents_signatures, with_warnings
from report.pictures import plot_training
from report.tables import training_line, training_table
from search import add_value_argument, load_model, model_folder, sample_all
from support.flags import (
    InputError,
    Parser,
    add_overwrite_argument,
    cli,
    non_negative_float,
    positive_float,
    positive_int,
    unit_float,
)
from support.progress import SearchProgress, Work, ignore
from support.records import (
    append_jsonl,
    device_of_this_process,
    open_to_append,
    process_rank,
    read_jsonl,
    write_line,
)
from support.runs import fingerprint, open_run, read_config, seeded, write_config
from support.statistics import problem_aucs
from tasks.problems import Problem, source
from train_value import add_lora_training_arguments, save_problems, write_checkpoint
from tree import Node, Sample, make_child, make_root, run_searches
from value import ValueModel, weights_fingerprint

# ---- Rollouts ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """What the agents said about one question.

    Attributes:
        root: of the tree of messages. Passes are a tree that branches at the first agent only.
            `reward` of a terminal node is z: +1 if its answer is right, else -1. `V` is the value
            model's reading of a node's state, if there is one.
        nodes: one per message, parents before their children.
        tokens: path of a node -> (token ids of its prompt, token ids of its message), as sampled.
    """

    problem: Problem
    root: Node
    nodes: list[Node]
    tokens: dict[tuple[int, ...], tuple[list[int], list[int]]]


def sample_tree(
    question: str, mas: MAS, *, num_candidates: tuple[int, ...], num_agents: int
) -> Generator[Sample, list, Node]:
    """Give every state C candidates, agent by agent, and return the root.

    Differs from `label_tree`: nothing is selected, and equal messages are not merged. So every
    message is a fair sample of its agent, and the mean over the candidates of a state estimates the
    expectation under the agents.

    Args:
        num_candidates: C per agent. (K, 1, 1, 1) gives K independent passes.
        num_agents: only this many agents of the schedule speak.
    """
    root = make_root(question)
    frontier = [root]
    while frontier:
        children = []
        for node, candidates in (yield from sample_all(frontier, mas, num_candidates)):
            node.children = []
            for index, candidate in enumerate(candidates):
                node.children.append(make_child(mas, node, candidate, index))
            children += node.children
        frontier = []
        for child in children:
            turn = mas.turn_index(child.state)
            if turn is not None and turn < num_agents:
                frontier.append(child)
    return root


def sample_rollouts(
    problems: list[Problem],
    policy: Policy,
    *,
    num_candidates: tuple[int, ...],
    num_agents: int,
    seed: str,
    max_active: int,
    description: str,
) -> list[Rollout]:
    """Sample a tree of messages for each problem, and grade the final answers.

    The policy must not have a journal: only generated messages come with their token ids.

    seed: becomes the policy's seed. Every step needs its own, or its noise would repeat.
    """
    policy.seed = seed
    tokens = defaultdict(dict)

    def keep_tokens(job, candidate_index: int, token_ids: list[int]) -> None:
        path = (*job.path, candidate_index)
        tokens[job.problem_id][path] = (job.prompt_ids, token_ids)

    searches = []
    for problem in problems:
        search = sample_tree(
            problem.question, policy.mas, num_candidates=num_candidates, num_agents=num_agents
        )
        searches.append((problem, search))
    expected = expected_work_of_rollout(num_candidates[:num_agents])
    progress = SearchProgress(len(problems), expected, description=description)
    policy.on_batch, policy.on_message = progress.sampled, keep_tokens
    rollouts = []
    with progress:
        for problem, root, _ in run_searches(
            searches, {Sample: policy}, max_active=max_active, progress=progress
        ):
            nodes = descendants(root)
            grade_terminals(problem, policy.mas, nodes)
            rollouts.append(Rollout(problem, root, nodes, tokens[problem.id]))
    policy.on_batch, policy.on_message = ignore, ignore
    # The order in which searches finish depends on how many are active at once.
    return sorted(rollouts, key=lambda rollout: rollout.problem.id)


def expected_work_of_rollout(num_candidates: tuple[int, ...]) -> Work:
    prompts, messages, states = 0, 0, 1
    for num in num_candidates:
        prompts += states
        states *= num
        messages += states
    return Work(prompts, messages)


def descendants(root: Node) -> list[Node]:
    """Return all nodes below `root`, parents before their children."""
    nodes = []
    frontier = root.children
    while frontier:
        nodes += frontier
        children = []
        for node in frontier:
            children += node.children or []
        frontier = children
    return nodes


def read_values(rollouts: list[Rollout], value_model: ValueModel, *, batch_tokens: int) -> None:
    """Let V read every state, that of the question alone included.

    V was not trained on questions alone. V(question) serves as a baseline only, and a baseline that
    does not depend on the message adds no bias to the policy gradient.
    """
    nodes = []
    for rollout in rollouts:
        nodes += [rollout.root, *rollout.nodes]
    values = value_model.score([node.state for node in nodes], batch_tokens=batch_tokens)
    for node, value in zip(nodes, values, strict=True):
        node.V = value


# ---- Rewards: one number per message, None if there is none --------------------------------------
# The gold answer is read by `outcome`, by `search`, by `random`, by `mix_with_outcome`, and by the
# last term of `value-delta`.

Rewards = dict[Node, float | None]


def mean_outcomes(rollout: Rollout) -> Rewards:
    """Return Q(s, a) of each message: the mean z of the final answers below it.

    None if these were not sampled (`num_agents` of `sample_tree`).
    """
    outcomes: Rewards = {}
    for node in reversed(rollout.nodes):
        below = [outcomes[child] for child in node.children or []]
        if None in below:
            outcomes[node] = None
        else:
            outcomes[node] = statistics.fmean(below) if below else node.reward
    return outcomes


def search_rewards(rollout: Rollout) -> Rewards:
    """Return Q(s, a) of each message, in [-1, 1]. `outcome_rewards` is (Q + 1) / 2."""
    return mean_outcomes(rollout)


def outcome_rewards(rollout: Rollout) -> Rewards:
    """Return the share of right final answers after each message, in [0, 1].

    In independent passes: 1 for every message of a pass that ends in a right answer, else 0.
    """
    return {node: (outcome + 1) / 2 for node, outcome in mean_outcomes(rollout).items()}


def value_rewards(rollout: Rollout) -> Rewards:
    """Return (V(s_{i+1}) + 1) / 2, in [0, 1]; s_{i+1} is the state that the message leads to."""
    return {node: (node.V + 1) / 2 for node in rollout.nodes}


def value_delta_rewards(rollout: Rollout) -> Rewards:
    """Return (V(s_{i+1}) - V(s_i)) / 2, in [-1, 1]: how much the message changes V.

    After the last message, z = +1 or -1 takes the place of V(s_{i+1}). So the rewards from s_i to
    the end of a pass sum to (z - V(s_i)) / 2, whatever V is. Siblings share V(s_i), so their
    differences equal those of `value_rewards`, for all agents but the last.
    """
    rewards = {}
    for node in rollout.nodes:
        after = node.V if node.children else node.reward
        rewards[node] = (after - node.parent.V) / 2
    return rewards


def mix_with_outcome(rollout: Rollout, rewards: Rewards, share: float) -> Rewards:
    """Return (1 - share) * reward + share * outcome, so that the final answer still counts."""
    mixed: Rewards = {}
    for node, outcome in outcome_rewards(rollout).items():
        reward = rewards[node]
        mixed[node] = None if reward is None else (1 - share) * reward + share * outcome
    return mixed


def shuffle_within_agents(rewards: Rewards, rng) -> Rewards:
    """Return the same rewards, each given to a random message of the same agent: a control."""
    nodes_of_agent = defaultdict(list)
    for node in rewards:
        nodes_of_agent[node.message.agent].append(node)
    shuffled = {}
    for nodes in nodes_of_agent.values():
        numbers = [rewards[node] for node in nodes]
        rng.shuffle(numbers)
        shuffled |= zip(nodes, numbers, strict=True)
    return shuffled


REWARDS: dict[str, Callable[[Rollout], Rewards]] = {
    "outcome": outcome_rewards,
    "search": search_rewards,
    "value": value_rewards,
    "value-delta": value_delta_rewards,
    "random": outcome_rewards,  # Training.train_step shuffles them
}
VALUE_REWARDS = ("value", "value-delta")  # those that read V

# ---- From rewards to advantages ------------------------------------------------------------------


def returns(rollout: Rollout, rewards: Rewards) -> Rewards:
    """Return the reward of each message plus those of the messages after it (--credit return).

    Where a state has several continuations, their mean counts. Only for rewards that are changes
    (`value_delta_rewards`): sums of other rewards grow with the number of agents that still speak,
    and would pay the Verifier of `refine` for calling the Refiner.
    """
    totals: Rewards = {}
    for node in reversed(rollout.nodes):
        later = [totals[child] for child in node.children or []]
        totals[node] = rewards[node] + (statistics.fmean(later) if later else 0.0)
    return totals


def is_trainable(node: Node, credit: float | None) -> bool:
    """Return whether a message has a credit and was not cut at its token limit."""
    return credit is not None and not node.candidate.truncated


# Credits of an agent that differ by less than this are the same.
SMALLEST_SPREAD = 1e-4


def advantages(credits: Rewards, baseline: str) -> dict[Node, float]:
    """Return the advantage of each message that is trained on: (credit - baseline) / spread.

    The spread is the standard deviation of the credits of the agent's messages in the batch, for
    both baselines. A message is left out of training and of all means if it was cut at its limit or
    has no credit. It is not trained on either if there is nothing to compare it with: if the
    credits of its agent are all equal or, with "siblings", if it has no siblings.

    Args:
        baseline: "agent", the mean credit of the agent's messages in the batch (MAPPA: agents see
            different inputs, so there is no group by question), or "siblings", the mean credit of
            the candidates of the same state: an agent is not rewarded for an easy question or for
            the luck of others.
    """
    # 1. The groups: all messages of an agent, and the candidates of a state.
    credits_of_agent, credits_of_state = defaultdict(list), defaultdict(list)
    for node, credit in credits.items():
        if is_trainable(node, credit):
            credits_of_agent[node.message.agent].append(credit)
            credits_of_state[node.parent].append(credit)

    # 2. Their means and spreads.
    spread_of_agent, mean_of_agent, mean_of_state = {}, {}, {}
    for agent, group in credits_of_agent.items():
        mean_of_agent[agent] = statistics.fmean(group)
        spread_of_agent[agent] = statistics.pstdev(group)
    for state, group in credits_of_state.items():
        mean_of_state[state] = statistics.fmean(group)

    # 3. Compare each message with its group.
    result = {}
    for node, credit in credits.items():
        if not is_trainable(node, credit):
            continue
        agent = node.message.agent
        has_siblings = len(credits_of_state[node.parent]) > 1
        if spread_of_agent[agent] <= SMALLEST_SPREAD:
            continue
        if baseline == "agent":
            result[node] = (credit - mean_of_agent[agent]) / spread_of_agent[agent]
        elif has_siblings:
            result[node] = (credit - mean_of_state[node.parent]) / spread_of_agent[agent]
    return result


# ---- The update ----------------------------------------------------------------------------------


@dataclass
class DistinctMessage:
    """A distinct (agent, prompt, message). However often it was sampled, it is read once.

    Attributes:
        agent: who said it.
        advantages: one per sample.
        old_logprobs, reference_logprobs: log-probability of each token of the message, before the
            update and by the reference policy: float32 [tokens of the message].
    """

    agent: str
    prompt_ids: list[int]
    token_ids: list[int]
    advantages: list[float] = field(default_factory=list)
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples of the message."""
        return len(self.token_ids) * len(self.advantages)


def distinct_messages(
    rollouts: list[Rollout], advantage_of: dict[Node, float]
) -> list[DistinctMessage]:
    """Group the samples that have an advantage by (agent, prompt, message), in order."""
    messages: dict[Any, DistinctMessage] = {}
    for rollout in rollouts:
        for node in rollout.nodes:
            if node not in advantage_of:
                continue
            agent = node.message.agent
            prompt_ids, token_ids = rollout.tokens[node.path]
            key = (agent, tuple(prompt_ids), tuple(token_ids))
            message = messages.setdefault(key, DistinctMessage(agent, prompt_ids, token_ids))
            message.advantages.append(advantage_of[node])
    return list(messages.values())


class CannotGoOnError(InputError):
    """A step of training is not possible."""


class Learner:
    """Makes messages with a positive advantage more likely, and those with a negative one less.

    The objective is PPO's clipped one per token, with a penalty on the KL divergence from the
    reference policy (the base, without adapters), as in MAPPA. The log-probabilities before the
    update come from this model's own forward, not from the sampler, so that their ratio is 1 at
    the start, up to rounding.

    Args:
        temperature: of the sampled messages; the policy is the softmax of logits / temperature.
        lr: learning rate of AdamW, constant.
        clip: the ratio to the old policy is clipped to 1 - clip ... 1 + clip.
        kl_coef: weight of the KL divergence.
        num_minibatches: optimizer steps per `update`.
        batch_tokens: size of a batch that is read at once, rows x longest.
    """

    def __init__(
        self,
        adapters: AgentAdapters,
        *,
        pad_id: int,
        temperature: float,
        lr: float,
        clip: float,
        kl_coef: float,
        num_minibatches: int,
        batch_tokens: int,
    ):
        self.adapters = adapters
        self.model = adapters.model
        self.pad_id = pad_id
        self.temperature = temperature
        self.clip = clip
        self.kl_coef = kl_coef
        self.num_minibatches = num_minibatches
        self.batch_tokens = batch_tokens
        self.token_cost = token_cost_for(self.model.config)
        self.optimizer = torch.optim.AdamW(adapters.parameters().values(), lr=lr, weight_decay=0.0)

    def update(self, messages: list[DistinctMessage], rng) -> dict[str, float]:
        """Train one epoch on the messages. Returns the mean KL and the share of clipped tokens.

        Raises CannotGoOnError if a gradient is not finite.
        """
        # 1. Log-probabilities before the update, and those of the reference.
        with torch.no_grad():
            for batch in self._batches(messages):
                for index, logprobs in self.message_logprobs(messages, batch).items():
                    messages[index].old_logprobs = logprobs.clone()
                with self.adapters.off():
                    for index, logprobs in self.message_logprobs(messages, batch).items():
                        messages[index].reference_logprobs = logprobs.clone()

        # 2. One epoch. Every token of every sample has the same weight.
        num_tokens = max(1, sum(message.num_tokens for message in messages))
        kl, num_clipped = 0.0, 0
        for minibatch in self._minibatches(messages, rng):
            for batch in self._batches(minibatch):
                loss, batch_kl, batch_clipped = self.loss(minibatch, batch)
                # Divided by the mean number of tokens of a minibatch, not by its own number: every
                # token of every sample has the same weight.
                (loss * self.num_minibatches / num_tokens).backward()
                kl += batch_kl
                num_clipped += batch_clipped
            parameters = self.adapters.parameters().values()
            try:
                nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            except RuntimeError:
                message = "the gradient is not finite; lower --policy-lr"
                raise CannotGoOnError(message) from None
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"kl": kl / num_tokens, "clip_share": num_clipped / num_tokens}

    def _minibatches(self, messages: list[DistinctMessage], rng) -> list[list[DistinctMessage]]:
        """Distribute the prompts. Messages of one share a minibatch, so that it is read once."""
        messages_of_prompt = defaultdict(list)
        for message in messages:
            messages_of_prompt[message.agent, tuple(message.prompt_ids)].append(message)
        prompts = rng.sample(list(messages_of_prompt), len(messages_of_prompt))
        minibatches = [[] for _ in range(self.num_minibatches)]
        for index, prompt in enumerate(prompts):
            minibatches[index % self.num_minibatches] += messages_of_prompt[prompt]
        return minibatches

    def loss(
        self, messages: list[DistinctMessage], batch: Batch
    ) -> tuple[torch.Tensor, float, int]:
        """Return the summed loss of a batch, its summed KL, and how many tokens were clipped.

        Per token of a sample with advantage A, with ratio = pi / pi_old and r = pi_ref / pi:

            loss = -min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A) + kl_coef * (r - log r - 1)

        The last factor estimates KL(pi || pi_ref) and is never negative. A token is counted as
        clipped if the clipped term is the smaller one.
        """
        total = torch.zeros((), device=self.model.device)
        total_kl, num_clipped = 0.0, 0
        for index, logprobs in self.message_logprobs(messages, batch).items():
            message = messages[index]
            log_r = message.reference_logprobs - logprobs  # [tokens]
            kl = log_r.exp() - log_r - 1
            ratio = (logprobs - message.old_logprobs).exp()
            clipped_ratio = ratio.clamp(1 - self.clip, 1 + self.clip)
            advantage = torch.tensor(message.advantages, device=ratio.device)[:, None]
            gain, clipped_gain = ratio * advantage, clipped_ratio * advantage
            losses = self.kl_coef * kl - torch.minimum(gain, clipped_gain)  # [samples, tokens]
            total = total + losses.sum()
            total_kl += len(message.advantages) * kl.sum().item()
            num_clipped += (clipped_gain < gain).sum().item()
        return total, total_kl, num_clipped

    def message_logprobs(
        self, messages: list[DistinctMessage], batch: Batch
    ) -> dict[int, torch.Tensor]:
        """Return log pi of each token of each message in a batch.

        Args:
            batch: packed rows of messages of one adapter (`_batches`). Prompts are read once.

        Returns:
            Index of a message -> float32 [tokens of the message].
        """
        # 1. A token is predicted by the one before it on its path.
        predicted_by: dict[int, tuple[int, list[int]]] = {}  # message -> (packed row, columns)
        for index, (packed_index, columns) in sequence_columns(batch).items():
            start = len(messages[index].prompt_ids) - 1
            predicted_by[index] = (packed_index, columns[start:-1])
        # Logits of other columns are not needed, and would take memory.
        kept = set()
        for _, columns in predicted_by.values():
            kept.update(columns)
        kept = sorted(kept)
        kept_index = {column: position for position, column in enumerate(kept)}

        # 2. Read, and look up each token.
        device = self.model.device
        any_index = next(iter(predicted_by))
        self.adapters.use(messages[any_index].agent)
        inputs = collate(batch, self.pad_id, device)
        logits = self.model(**inputs, logits_to_keep=torch.tensor(kept, device=device)).logits
        logits = logits.float() / self.temperature  # [packed rows, kept columns, vocabulary]
        log_total = logits.logsumexp(-1)
        logprobs = {}
        for index, (packed_index, columns) in predicted_by.items():
            places = torch.tensor([kept_index[column] for column in columns], device=device)
            tokens = torch.tensor(messages[index].token_ids, device=device)
            chosen = logits[packed_index, places, tokens]
            logprobs[index] = chosen - log_total[packed_index, places]
        return logprobs

    def _batches(self, messages: list[DistinctMessage]) -> list[Batch]:
        """Pack messages into batches of one adapter each; those of one prompt stay together."""
        indices_of_adapter = defaultdict(list)
        for index, message in enumerate(messages):
            indices_of_adapter[self.adapters.name_for(message.agent)].append(index)
        sequences = [message.prompt_ids + message.token_ids for message in messages]
        batches = []
        for indices in indices_of_adapter.values():
            batches += packed_batches(
                sequences, self.batch_tokens, token_cost=self.token_cost, indices=indices
            )
        return batches


# ---- What is logged ------------------------------------------------------------------------------


def measure(rollouts: list[Rollout]) -> dict[str, dict]:
    """Return, per agent, how good its messages are, and how good V thinks they are.

    right: share of right final answers after its messages; None if they were not sampled.
    value: mean of (V + 1) / 2, which equals `right` if V is calibrated; None without V.
    value_auc: AUC of V against right and wrong states of the same problem, see `problem_aucs`.
    tokens, truncated: mean length, and the share of messages that were cut at their limit.
    """
    nodes_of_agent = defaultdict(list)
    for rollout in rollouts:
        outcomes = mean_outcomes(rollout)
        for node in rollout.nodes:
            nodes_of_agent[node.message.agent].append((rollout.problem, node, outcomes[node]))
    return {agent: _measure_agent(entries) for agent, entries in nodes_of_agent.items()}


def _measure_agent(entries: list[tuple[Problem, Node, float | None]]) -> dict:
    nodes = [node for _, node, _ in entries]
    report = {
        "messages": len(nodes),
        "tokens": statistics.fmean(node.candidate.tokens for node in nodes),
        "truncated": statistics.fmean(node.candidate.truncated for node in nodes),
        "right": None,
        "value": None,
        "value_auc": None,
    }
    is_graded = all(outcome is not None for _, _, outcome in entries)
    has_value = nodes[0].V is not None
    if is_graded:
        report["right"] = statistics.fmean((outcome + 1) / 2 for _, _, outcome in entries)
    if has_value:
        report["value"] = statistics.fmean((node.V + 1) / 2 for node in nodes)
    if is_graded and has_value:
        problem_ids = [problem.id for problem, _, _ in entries]
        outcomes = [outcome for _, _, outcome in entries]
        aucs = problem_aucs(problem_ids, outcomes, [node.V for node in nodes])
        report["value_auc"] = statistics.fmean(aucs) if aucs else None
    return report


def accuracy(rollouts: list[Rollout]) -> float:
    """Return the share of right final answers among all sampled transcripts."""
    outcomes = []
    for rollout in rollouts:
        outcomes += [node.reward == 1 for node in rollout.nodes if not node.children]
    return statistics.fmean(outcomes)


def mean_rewards(rewards: Rewards) -> dict[str, float | None]:
    """Return the mean reward of each agent's messages; None if none has a reward."""
    rewards_of_agent = defaultdict(list)
    for node, reward in rewards.items():
        known = rewards_of_agent[node.message.agent]
        if reward is not None:
            known.append(reward)
    means = {}
    for agent, numbers in rewards_of_agent.items():
        means[agent] = statistics.fmean(numbers) if numbers else None
    return means


def messages_record(
    step: int,
    rollouts: list[Rollout],
    rewards: Rewards,
    credits: Rewards,
    advantage_of: dict[Node, float],
) -> dict:
    """Return all messages of a step, to see what has been rewarded.

    credits: what is compared: the rewards after --credit, --outcome-share and the shuffling of
        --reward random.
    """
    messages = []
    for rollout in rollouts:
        outcomes = mean_outcomes(rollout)
        for node in rollout.nodes:
            message = {
                "problem": rollout.problem.id,
                "path": node.path,
                "agent": node.message.agent,
                "message": node.message.text,
                "outcome": outcomes[node],
                "V": node.V,
                "reward": rewards[node],
                "credit": credits[node],
                "advantage": advantage_of.get(node),
            }
            messages.append(message)
    return {"step": step, "messages": messages}


# ---- Training ------------------------------------------------------------------------------------


@dataclass
class Training:
    """Everything that a step needs.

    Attributes:
        num_candidates, num_agents: shape of a rollout, see `sample_tree`.
        dev_problems: held-out problems; the adapters with the best accuracy on them are kept.
        value_model: None if there is no V.
        reward: of one rollout, see REWARDS.
        step: how many steps are done.
        num_messages: how many messages these steps have sampled.
        best_step, best_accuracy, best_weights: of the adapters that are kept.
    """

    args: Any
    policy: Policy
    learner: Learner
    train_problems: list[Problem]
    dev_problems: list[Problem]
    num_candidates: tuple[int, ...]
    num_agents: int
    value_model: ValueModel | None
    reward: Callable[[Rollout], Rewards]
    step: int = 0
    num_messages: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def train_step(self) -> tuple[dict, dict]:
        """Take the next step. Returns its line of metrics.jsonl and its messages."""
        args = self.args
        self.step += 1

        # 1. Sample, grade, and let V read.
        rng = seeded(args.seed, "step", self.step)
        num_questions = min(args.num_questions, len(self.train_problems))
        rollouts = sample_rollouts(
            rng.sample(self.train_problems, num_questions),
            self.policy,
            num_candidates=self.num_candidates,
            num_agents=self.num_agents,
            seed=f"{args.seed}, step {self.step}",
            max_active=args.max_active,
            description=f"step {self.step}/{args.num_steps}",
        )
        self.read_values(rollouts)

        # 2. Reward: of the message alone. Credit: after --credit, --outcome-share and shuffling.
        #    Advantage: the credit compared with the baseline.
        rewards: Rewards = {}
        credits: Rewards = {}
        for rollout in rollouts:
            rollout_rewards = self.reward(rollout)
            rollout_credits = rollout_rewards
            if args.credit == "return":
                rollout_credits = returns(rollout, rollout_credits)
            if args.outcome_share > 0:
                rollout_credits = mix_with_outcome(rollout, rollout_credits, args.outcome_share)
            rewards |= rollout_rewards
            credits |= rollout_credits
        if args.reward == "random":
            credits = shuffle_within_agents(credits, rng)
        if not any(is_trainable(node, credit) for node, credit in credits.items()):
            raise CannotGoOnError(
                "no message of this step can be trained on: all were cut at their limit or have no "
                "reward; raise --max-new-tokens, or take another --reward"
            )
        advantage_of = advantages(credits, args.baseline)

        # 3. Update the adapters.
        messages = distinct_messages(rollouts, advantage_of)
        statistics_of_update = self.learner.update(messages, rng)
        self.num_messages += len(rewards)
        record = {
            "step": self.step,
            "messages": self.num_messages,
            "trained_on": len(advantage_of),
            "distinct": len(messages),
            "cut": sum(node.candidate.truncated for node in rewards),
            "without_reward": sum(reward is None for reward in rewards.values()),
            "reward": mean_rewards(rewards),
            **statistics_of_update,
            "rollouts": measure(rollouts),
        }
        return record, messages_record(self.step, rollouts, rewards, credits, advantage_of)

    def measure_dev(self) -> dict:
        """Measure the agents on the held-out problems, and keep the adapters if they are best.

        The same noise is used at every step, so that differences are due to the agents.
        """
        args = self.args
        num_agents = len(self.policy.mas.agents)
        rollouts = sample_rollouts(
            self.dev_problems,
            self.policy,
            num_candidates=_passes(args.num_dev_passes, num_agents),
            num_agents=num_agents,
            seed=f"{args.seed}, dev",
            max_active=args.max_active,
            description=f"dev, step {self.step}",
        )
        self.read_values(rollouts)
        dev_accuracy = accuracy(rollouts)
        if dev_accuracy > self.best_accuracy:
            self.best_step, self.best_accuracy = self.step, dev_accuracy
            self.best_weights = self.learner.adapters.weights()
        return {"accuracy": dev_accuracy, "agents": measure(rollouts)}

    def read_values(self, rollouts: list[Rollout]) -> None:
        if self.value_model is not None:
            read_values(rollouts, self.value_model, batch_tokens=self.args.batch_tokens)

    def save_checkpoint(self, path: Path) -> None:
        names = ("step", "num_messages", "best_step", "best_accuracy", "best_weights")
        state = {name: getattr(self, name) for name in names}
        state["weights"] = self.learner.adapters.weights()
        state["optimizer"] = self.learner.optimizer.state_dict()
        write_checkpoint(path, state)

    def load_checkpoint(self, path: Path) -> None:
        device = self.learner.model.device
        state = torch.load(path, map_location=device, weights_only=True)
        self.learner.adapters.set_weights(state.pop("weights"))
        self.learner.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)


def train(training: Training, folder: Path) -> None:
    """Take all steps that are left. Logs each step and its messages, and writes a checkpoint.

    If a step is not possible, which would be so again, training ends before it. Raises
    CannotGoOnError if there are no better adapters than those of the start by then.
    """
    args = training.args
    checkpoint = folder / "checkpoint.pt"
    with (
        open_to_append(folder / "metrics.jsonl") as metrics,
        open_to_append(folder / "messages.jsonl") as messages,
    ):
        if checkpoint.is_file():
            training.load_checkpoint(checkpoint)
            print(f"resuming after step {training.step}")
        else:
            record = {"step": 0, "messages": 0, "dev": training.measure_dev()}
            _log(training, metrics, record, checkpoint)
        while training.step < args.num_steps:
            step = training.step + 1
            try:
                record, step_messages = training.train_step()
            except CannotGoOnError as error:
                if training.best_step == 0:
                    raise
                print(f"training ends before step {step}: {error}", file=sys.stderr)
                return
            is_last = training.step == args.num_steps
            if is_last or training.step % args.dev_every == 0:
                record["dev"] = training.measure_dev()
            write_line(messages, training.step - 1, step_messages)
            _log(training, metrics, record, checkpoint)


def _log(training: Training, metrics, record: dict, checkpoint: Path) -> None:
    write_line(metrics, training.step, record)
    training.save_checkpoint(checkpoint)
    print(training_line(record), flush=True)


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    # the reward
    parser.add_argument(
        "--reward",
        choices=(*REWARDS, "coach"),
        default="value",
        help="of each message: V, its change, Q of the tree, the final answer, a coach, or random: "
        "final answers shuffled among the messages of each agent, a control",
    )
    add_value_argument(parser)
    parser.add_argument(
        "--coach", default=None, help="chat model that grades messages: folder or hub name"
    )
    parser.add_argument(
        "--outcome-share",
        type=unit_float,
        default=0.0,
        help="mix the credit with the outcome: (1 - share) * credit + share * outcome",
    )
    parser.add_argument(
        "--credit",
        choices=("own", "return"),
        default="own",
        help="a message earns its own reward, or also those after it (value-delta)",
    )
    parser.add_argument(
        "--baseline",
        choices=("agent", "siblings"),
        default="agent",
        help="a message is compared with all of its agent, or with those from the same state",
    )
    # the rollouts
    parser.add_argument(
        "--rollouts",
        choices=("passes", "tree"),
        default="passes",
        help="independent passes, or a tree with --num-candidates messages per state",
    )
    parser.add_argument(
        "--num-passes", type=positive_int, default=4, help="per question, for --rollouts passes"
    )
    parser.add_argument("--num-steps", type=positive_int, default=10, help="training steps")
    parser.add_argument("--num-questions", type=positive_int, default=64, help="questions per step")
    add_training_problems_arguments(parser)
    # the update
    parser.add_argument(
        "--adapters",
        choices=("shared", "per-agent"),
        default="shared",
        help="how many adapters are trained: one for all agents, or one for each",
    )
    add_lora_training_arguments(parser)
    parser.add_argument(
        "--policy-lr",
        type=positive_float,
        default=1e-3,
        help="learning rate of the agents; suits the tiny model, give 1e-5 or so for a real one",
    )
    parser.add_argument(
        "--clip", type=positive_float, default=0.2, help="of the ratio to the policy before a step"
    )
    parser.add_argument(
        "--kl-coef", type=non_negative_float, default=0.01, help="weight of the KL to the reference"
    )
    parser.add_argument(
        "--num-minibatches", type=positive_int, default=4, help="optimizer steps per step"
    )
    # the choice of the adapters
    parser.add_argument(
        "--num-dev-passes", type=positive_int, default=4, help="passes per held-out problem"
    )
    parser.add_argument(
        "--dev-every", type=positive_int, default=2, help="measure on held-out problems that often"
    )
    add_overwrite_argument(parser)
    return parser.parse_args(argv)


def main(args) -> None:
    # 1. Load the graph, the problems and the models.
    check_flags(args)
    mas = load_graph(args.graph)
    num_candidates = candidates_of_rollouts(args, mas)
    train_problems, dev_problems = load_train_and_dev(args)
    policy = make_policy(args, mas)
    if policy.adapters is None:
        torch.manual_seed(args.seed)
        policy.adapters = AgentAdapters.add(
            policy.decoder.model, mas, sharing=args.adapters, rank=args.lora_rank
        )
    else:
        check_start(args, policy.adapters, mas)
    training = Training(
        args=args,
        policy=policy,
        learner=make_learner(policy, args),
        train_problems=train_problems,
        dev_problems=dev_problems,
        num_candidates=num_candidates,
        num_agents=num_agents_of_rollouts(args, mas, num_candidates),
        value_model=load_value_model(args, mas),
        reward=load_reward(args, mas),
    )
    inherited = inherited_problems(args)

    # 2. Start the run folder, or resume it.
    folder = Path(args.run) / "agents"
    settings = training_settings(args, training)
    open_run(folder, settings, device=args.device, overwrite=args.overwrite)
    config = read_config(folder)
    if config.get("finished"):
        print(f"{folder} is finished already (--overwrite trains it again)")
        report_training(read_jsonl(folder / "metrics.jsonl"), config["best_step"])
        return
    print(describe_training(training, folder))

    # 3. Train.
    try:
        train(training, folder)
    except torch.OutOfMemoryError:
        raise InputError(
            "out of memory; lower --train-batch-tokens or --batch-tokens, the command resumes"
        ) from None

    # 4. Save the adapters that were best on held-out problems, and report.
    policy.adapters.set_weights(training.best_weights)
    policy.adapters.save(folder)
    with open(folder / "problems.jsonl", "wb") as file:
        save_problems(file, [vars(problem) for problem in train_problems + dev_problems])
        for row in inherited:
            append_jsonl(file, row)
    records = read_jsonl(folder / "metrics.jsonl")
    plot_training(records, training.best_step, folder / "curves.png")
    finished = {"finished": True, "best_step": training.best_step}
    write_config(folder, read_config(folder) | finished)
    (folder / "checkpoint.pt").unlink()
    report_training(records, training.best_step)
    print(f"\n{folder} holds the adapters, metrics.jsonl, messages.jsonl and curves.png")


def report_training(records: list[dict], best_step: int) -> None:
    """Print what training has done, and the signatures of failure that it triggers."""
    signatures = agents_signatures(records, best_step)
    print(with_warnings(training_table(records, best_step), signatures))


def inherited_problems(args) -> list[dict]:
    """Return the lines of problems.jsonl of the adapters to start from, and of a V that rewards.

    The agents learn from what these have seen, so evaluate.py must not test on it either.
    """
    folders = []
    if args.adapter is not None:
        folders.append(Path(args.adapter))
    if args.reward in VALUE_REWARDS:
        folders.append(model_folder(args, "value"))
    rows = []
    for folder in folders:
        rows += read_jsonl(folder / "problems.jsonl")
    return rows


def check_start(args, adapters: AgentAdapters, mas: MAS) -> None:
    """Raise InputError if the adapters to start from are not those that the flags describe."""
    if adapters.names != adapter_names(mas, args.adapters):
        raise InputError(f"--adapters {args.adapters}: those of --adapter are of the other kind")
    if adapters.rank != args.lora_rank:
        raise InputError(
            f"--lora-rank {args.lora_rank}: those of --adapter have rank {adapters.rank}"
        )
    if Path(args.adapter).resolve() == (Path(args.run) / "agents").resolve():
        raise InputError(
            f"--adapter {args.adapter}: this run would write where it reads; choose another --run"
        )


def check_flags(args) -> None:
    """Raise InputError for flags that do not go together."""
    if process_rank()[1] > 1:
        raise InputError("train_agents.py trains in one process; start it without a launcher")
    if args.top_k > 0 or args.top_p < 1:
        raise InputError(
            "--top-k and --top-p: the policy that is trained gives every token its own "
            "probability; leave them out"
        )
    if args.rollouts == "passes" and args.baseline == "siblings":
        raise InputError(
            "--baseline siblings compares the candidates of one state; passes have none, "
            "give --rollouts tree"
        )
    if args.rollouts == "passes" and args.reward == "search":
        raise InputError(
            "--reward search is Q of a tree; give --rollouts tree, or --reward outcome"
        )
    if args.credit == "return" and args.reward != "value-delta":
        raise InputError("--credit return adds up changes; give --reward value-delta")
    if args.outcome_share > 0 and args.reward in ("outcome", "search", "random"):
        raise InputError(f"--outcome-share: --reward {args.reward} is the outcome already")
    if (args.reward == "coach") != (args.coach is not None):
        raise InputError("--reward coach and --coach MODEL belong together; give both or neither")


def candidates_of_rollouts(args, mas: MAS) -> tuple[int, ...]:
    """Return the candidates per state, for each agent (see `sample_tree`)."""
    if args.rollouts == "passes":
        return _passes(args.num_passes, len(mas.agents))
    num_candidates = counts_per_agent(mas, args.num_candidates, "--num-candidates")
    if args.baseline == "siblings" and max(num_candidates) == 1:
        raise InputError(
            "--baseline siblings needs an agent with several candidates, "
            "for example --num-candidates 1.8.1.1"
        )
    return num_candidates


def _passes(num: int, num_agents: int) -> tuple[int, ...]:
    """Return the candidates per agent of a tree that consists of `num` passes."""
    return (num,) + (1,) * (num_agents - 1)


def num_agents_of_rollouts(args, mas: MAS, num_candidates: tuple[int, ...]) -> int:
    """Return how many agents have to speak.

    If a reward reads the message alone, and siblings are compared, nothing is learnt from agents
    after the last one with several candidates: their messages have no siblings.
    """
    reads_message_alone = args.reward in ("value", "coach")
    reads_outcome = args.outcome_share > 0
    if not reads_message_alone or reads_outcome or args.baseline != "siblings":
        return len(mas.agents)
    return 1 + max(index for index, num in enumerate(num_candidates) if num > 1)


def load_train_and_dev(args) -> tuple[list[Problem], list[Problem]]:
    """Load the training problems, and the held-out ones on which the adapters are chosen."""
    problems = {"train": [], "heldout": []}
    for problem in load_training_problems(args):
        problems[problem.split].append(problem)
    for split, of_split in problems.items():
        if not of_split:
            raise InputError(f"{args.data or args.task}: no {split} problems")
    return problems["train"], problems["heldout"]


def make_learner(policy: Policy, args) -> Learner:
    return Learner(
        policy.adapters,
        pad_id=policy.decoder.pad_id,
        temperature=args.temperature,
        lr=args.policy_lr,
        clip=args.clip,
        kl_coef=args.kl_coef,
        num_minibatches=args.num_minibatches,
        batch_tokens=args.train_batch_tokens,
    )


def load_value_model(args, mas: MAS) -> ValueModel | None:
    """Load V. Without a V that can be used, a reward that does not need it does without."""
    try:
        return load_model(args, mas, "value")
    except InputError as error:
        if args.value is not None or args.reward in VALUE_REWARDS:
            raise
        print(f"V's reading is not logged: {error}")
        return None


def load_reward(args, mas: MAS) -> Callable[[Rollout], Rewards]:
    if args.reward != "coach":
        return REWARDS[args.reward]
    return Coach(
        args.coach,
        mas,
        seed=args.seed,
        batch_tokens=args.batch_tokens,
        template_kwargs=args.chat_template_kwargs,
        quantize=False,
        device=device_of_this_process(args.device),
        dtype=args.dtype,
    )


def training_settings(args, training: Training) -> dict:
    """Return the settings that determine the adapters, recorded for resuming."""
    names = ("reward", "outcome_share", "credit", "baseline", "rollouts", "num_steps")
    names += ("num_questions", "max_new_tokens", "adapters", "lora_rank", "policy_lr", "clip")
    names += ("kl_coef", "num_minibatches", "num_dev_passes", "dev_every")
    settings = training.policy.settings | {name: getattr(args, name) for name in names}
    problems = training.train_problems + training.dev_problems
    settings |= {
        "graph": asdict(training.policy.mas),
        "num_candidates": training.num_candidates,
        "value": None,
        "coach": None,
        "problems": fingerprint([vars(problem) for problem in problems]),
        **source(args.task, args.data),
    }
    if training.value_model is not None:  # its reading is logged, whatever the reward is
        folder = model_folder(args, "value")
        settings["value"] = {"name": str(folder), "fingerprint": weights_fingerprint(folder)}
    if args.coach is not None:
        model = training.reward.model
        settings["coach"] = {
            "name": args.coach,
            "fingerprint": checkpoint_fingerprint(args.coach, model),
        }
    return settings


def describe_training(training: Training, folder: Path) -> str:
    parameters = training.learner.adapters.parameters().values()
    num_trained = sum(parameter.numel() for parameter in parameters)
    candidates = ".".join(map(str, training.num_candidates[: training.num_agents]))
    args = training.args
    return (
        f"{args.num_steps} steps of {min(args.num_questions, len(training.train_problems))} "
        f"questions, {candidates} messages per state; {num_trained:,} trained parameters\n"
        f"reward {args.reward}, credit {args.credit}, baseline {args.baseline} -> {folder}"
    )


if __name__ == "__main__":
    cli(parse_args, main)
