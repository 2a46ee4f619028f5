"""Stage 5: finetune the agents on a reward for each of their messages (MAPPA, arXiv 2601.23228).

Each step samples messages for some training questions with the agents as they are now, gives each
message a reward, and makes messages that did better than expected more likely.

    python train_agents.py                            # reward V -> runs/tiny/agents
    python train_agents.py --rollouts tree-1.8.1.1    # eight plans per question, compared
    python evaluate.py --run runs/after --adapter runs/tiny/agents --value runs/tiny/value

Differs from MAPPA: the reward is V, which was trained on final answers only, without a human or a
stronger model (MAPPA's coach is `--reward coach:MODEL`); agents are LoRA adapters on one frozen
base, which is also the reference; the adapters that are best on held-out problems are kept.
"""

import random
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from llm.adapters import AgentAdapters, add_lora_argument
from llm.coach import Coach
from llm.policy import add_agent_arguments, make_policy, run_settings
from mas import MAS, load_graph
from support.flags import InputError, cli, positive_float, positive_int, stage_parser
from support.progress import Progress
from support.records import errors_name, open_to_append, read_jsonl, write_line
from support.runs import fingerprint, open_run, read_config, seeded, write_checkpoint, write_config
from support.statistics import agent_measures, by_agent, mean_of_known
from tasks.problems import Problem, add_problem_arguments, load_training_problems, save_problems
from tree import Node, Sample, TooLong, grade_terminals, run_searches, sample_tree
from value import ValueModel, add_value_arguments

# A variant changes these here.
CLIP = 0.2  # the ratio to the policy before a step is clipped to 1 - CLIP ... 1 + CLIP
KL_COEF = 0.01  # weight of the KL divergence from the reference
NUM_MINIBATCHES = 4  # optimizer steps per step
NUM_DEV_PASSES = 4  # per held-out problem
DEV_EVERY = 2  # steps from one measurement on held-out problems to the next
TRAIN_BATCH_TOKENS = 2048  # size of what is read at once: packed rows x longest
SMALLEST_SPREAD = 1e-4  # rewards of an agent that differ by less are the same


# ---- Rewards: one number per message, None if it has none ----------------------------------------
# The gold answer is read by search, outcome and random, and by the last change of V.

Rollouts = dict[Node, Problem]  # all messages of a step, parents before their children
Rewards = dict[Node, float | None]


def value_rewards(rollouts: Rollouts) -> Rewards:
    """Return (V(s_{i+1}) + 1) / 2, in [0, 1]; s_{i+1} is the state that the message leads to."""
    return {node: (node.V + 1) / 2 for node in rollouts}


def value_delta_rewards(rollouts: Rollouts) -> Rewards:
    """Return (V(s_{i+1}) - V(s_i)) / 2, in [-1, 1]: how much the message changes V.

    After the last message, the outcome z takes the place of V(s_{i+1}). So the rewards from s_i to
    the end of a pass sum to (z - V(s_i)) / 2, whatever V is.
    """
    rewards: Rewards = {}
    for node in rollouts:
        after = node.V if node.outcome is None else node.outcome
        rewards[node] = (after - node.parent.V) / 2
    return rewards


def search_rewards(rollouts: Rollouts) -> Rewards:
    """Return Q(s, a): the mean outcome below each message; None if nobody has answered there."""
    rewards: Rewards = {}
    for node in reversed(rollouts):
        below = [rewards[child] for child in node.children or []]
        rewards[node] = mean_of_known(below) if below else node.outcome
    return {node: rewards[node] for node in rollouts}


def outcome_rewards(rollouts: Rollouts) -> Rewards:
    """Return the share of right final answers below each message: (Q + 1) / 2, in [0, 1]."""
    return {node: (q + 1) / 2 for node, q in search_rewards(rollouts).items()}


def random_rewards(rollouts: Rollouts) -> Rewards:
    """Return the outcome rewards, each given to a random message of the same agent: a control."""
    rewards = outcome_rewards(rollouts)
    rng = seeded("random", *(node.message.text for node in rollouts))
    for nodes in by_agent(rollouts).values():
        numbers = [rewards[node] for node in rng.sample(nodes, len(nodes))]
        rewards |= zip(nodes, numbers, strict=True)
    return rewards


REWARDS = {
    "value": value_rewards,
    "value-delta": value_delta_rewards,
    "value-return": value_delta_rewards,  # `returns` are compared
    "search": search_rewards,
    "outcome": outcome_rewards,
    "random": random_rewards,
}
VALUE_REWARDS = ("value", "value-delta", "value-return")  # those that read V


def returns(rewards: Rewards) -> Rewards:
    """Return the reward of each message plus those after it; of several continuations, their mean.

    Only for rewards that are changes: sums of others would pay an agent for calling others.
    """
    totals: Rewards = {}
    for node in reversed(rewards):
        later = [totals[child] for child in node.children or []]
        totals[node] = rewards[node] + (statistics.fmean(later) if later else 0.0)
    return {node: totals[node] for node in rewards}


def advantages(credits: Rewards, baseline: str) -> dict[Node, float]:
    """Return (reward - baseline) / spread for each message that is trained on.

    The spread is the standard deviation of the rewards of the agent's messages. A message that was
    cut at its limit or has no reward is left out, also of all means. Nor is a message trained on
    that cannot be compared: the rewards of its agent are equal, or it has no siblings.

    Args:
        credits: the reward, or the return, of each message of a step.
        baseline: "agent", the mean of the agent's messages (MAPPA: agents see different inputs, so
            there is no group by question), or "siblings", the mean of the candidates of the same
            state: an agent is not rewarded for an easy question or for the luck of others.
    """
    nodes, of_agent, of_state = [], defaultdict(list), defaultdict(list)
    for node, reward in credits.items():
        if reward is not None and not node.candidate.truncated:
            nodes.append(node)
            of_agent[node.message.agent].append(reward)
            of_state[node.parent].append(reward)
    spread_of = {agent: statistics.pstdev(rewards) for agent, rewards in of_agent.items()}
    result = {}
    for node in nodes:
        agent = node.message.agent
        group = of_agent[agent] if baseline == "agent" else of_state[node.parent]
        if spread_of[agent] > SMALLEST_SPREAD and len(group) > 1:
            result[node] = (credits[node] - statistics.fmean(group)) / spread_of[agent]
    return result


# ---- The update ----------------------------------------------------------------------------------


@dataclass
class TrainedMessage:
    """One sample of a message. Log-probabilities: of each of its tokens, float32 [tokens]."""

    agent: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    advantage: float
    old_logprobs: torch.Tensor | None = None  # before the update
    reference_logprobs: torch.Tensor | None = None  # by the base


class Learner:
    """Makes messages with a positive advantage more likely, and those with a negative one less.

    The objective is PPO's clipped one per token, with a penalty on the KL divergence from the
    reference policy (the base, without adapters), as in MAPPA. The log-probabilities before the
    update come from this model's own forward (`read`), not from the sampler, so that their ratio
    is 1 at the start, up to rounding.

    state: the last step, messages so far; step, accuracy and weights of the adapters that are kept.
    """

    def __init__(self, args):
        self.args = args
        mas = load_graph(args.graph)
        self.num_candidates, self.baseline = shape_of_rollouts(args, mas)
        self.reward = REWARDS.get(args.reward)
        if args.reward.startswith("coach:"):
            self.reward = Coach(args.reward.removeprefix("coach:"), mas, args)
        if self.reward is None:
            raise InputError(f"--reward {args.reward}: none of {', '.join(REWARDS)}, coach:MODEL")
        self.problems = load_training_problems(args)
        self.policy = make_policy(args, mas, progress=Progress(shown=True))
        if self.policy.adapters is None:
            torch.manual_seed(args.seed)
            model = self.policy.decoder.model
            adapters = AgentAdapters.add(model, mas, sharing=args.adapters, rank=args.lora_rank)
            self.policy = replace(self.policy, adapters=adapters)
        self.adapters = self.policy.adapters
        self.read = partial(self.policy.message_logprobs, batch_tokens=TRAIN_BATCH_TOKENS)
        self.parameters = list(self.adapters.parameters().values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.policy_lr, weight_decay=0.0)
        self.value_model = None  # rewards that do not need V do without its reading
        self.value_folder = Path(args.value or f"{args.run}/value")
        if args.reward in VALUE_REWARDS or args.value or self.value_folder.is_dir():
            self.value_model = ValueModel.load(self.value_folder, mas, args, must_be_finished=True)
        given = [args.adapter, self.value_folder if args.reward in VALUE_REWARDS else None]
        # Problems that the given agents and V have seen, as JSON lines.
        self.seen_before = b"".join(Path(f, "problems.jsonl").read_bytes() for f in given if f)
        self.state = {"step": -1, "messages": 0, "best_step": 0, "best_accuracy": -1.0}

    def sample(self, problems: list[Problem], num_candidates: tuple, *, name: str) -> Rollouts:
        """Sample a tree of messages for each problem, grade the final answers, and let V read.

        V was not trained on questions alone. V(question) serves as a baseline only, and a baseline
        that does not depend on the message adds no bias to the policy gradient. Problems that are
        too long for the agents or for V have no messages.

        name: seeds the policy. Every step needs its own, or its noise would repeat.
        """
        mas, progress, v = self.policy.mas, self.policy.progress, self.value_model
        policy = replace(self.policy, seed=f"{self.args.seed}, {name}")
        searches = []
        for problem in problems:
            search = sample_tree(problem.question, mas, num_candidates, greedy=False)
            searches.append((problem, search))
        rollouts: Rollouts = {}
        with progress.over(name, len(problems), unit="questions"):
            for problem, nodes, _ in run_searches(
                searches, {Sample: policy}, max_active=len(problems), progress=progress
            ):
                if isinstance(nodes, TooLong):
                    continue
                reads_v = self.args.reward in VALUE_REWARDS
                if reads_v and not all(v.fits(node.state) for node in nodes):
                    continue
                grade_terminals(problem, mas, nodes)
                rollouts |= dict.fromkeys(nodes, problem)
        if not rollouts and name == "dev":
            raise InputError("no held-out problem is there, or none that is short enough")
        if v is not None:
            nodes = dict.fromkeys([*(node.parent for node in rollouts), *rollouts])
            read = [node for node in nodes if v.fits(node.state)]
            values = v.score([node.state for node in read], batch_tokens=self.args.batch_tokens)
            for node, value in zip(read, values, strict=True):
                node.V = value
        # The order in which searches finish depends on how many are active at once.
        return dict(sorted(rollouts.items(), key=lambda entry: entry[1].id))

    def update(self, messages: list[TrainedMessage], rng: random.Random) -> dict[str, float]:
        """Train one epoch on the messages. Returns the mean KL and the share of clipped tokens.

        Raises InputError if a gradient is not finite.
        """
        # 1. Log-probabilities before the update, and those of the reference.
        with torch.no_grad():
            for message, logprobs in chain(*self.read(messages)):
                message.old_logprobs = logprobs
            with self.adapters.off():
                for message, logprobs in chain(*self.read(messages)):
                    message.reference_logprobs = logprobs

        # 2. One epoch, in which every token has the same weight. Messages of one prompt share a
        #    minibatch, so that it is read once.
        num_tokens = max(1, sum(len(message.token_ids) for message in messages))
        prompts = list(dict.fromkeys(message.prompt_ids for message in messages))
        prompts = rng.sample(prompts, len(prompts))
        sum_kl, num_clipped = 0.0, 0
        for index in range(NUM_MINIBATCHES):
            chosen = set(prompts[index::NUM_MINIBATCHES])
            minibatch = [message for message in messages if message.prompt_ids in chosen]
            for batch in self.read(minibatch):
                loss, batch_kl, batch_clipped = self.loss(batch)
                (loss * NUM_MINIBATCHES / num_tokens).backward()
                sum_kl += batch_kl
                num_clipped += batch_clipped
            if not nn.utils.clip_grad_norm_(self.parameters, 1.0).isfinite():
                raise InputError("the gradient is not finite; lower --policy-lr")
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"kl": sum_kl / num_tokens, "clip_share": num_clipped / num_tokens}

    def loss(self, batch: list[tuple]) -> tuple[torch.Tensor, float, int]:
        """Return the summed loss of a batch of `read`, its summed KL, and the clipped tokens.

        Per token of a message with advantage A, with ratio = pi / pi_old and r = pi_ref / pi:

            loss = -min(ratio * A, clamp(ratio, 1 - CLIP, 1 + CLIP) * A) + KL_COEF * (r - log r - 1)

        The last factor estimates KL(pi || pi_ref) and is never negative. A token is counted as
        clipped if the clipped term is the smaller one.
        """
        sum_loss, sum_kl, num_clipped = 0.0, 0.0, 0
        for message, logprobs in batch:
            log_r = message.reference_logprobs - logprobs  # [tokens]
            kl = log_r.exp() - log_r - 1
            ratio = (logprobs - message.old_logprobs).exp()
            gain = ratio * message.advantage
            clipped_gain = ratio.clamp(1 - CLIP, 1 + CLIP) * message.advantage
            sum_loss += (KL_COEF * kl - torch.minimum(gain, clipped_gain)).sum()
            sum_kl += kl.sum().item()
            num_clipped += (clipped_gain < gain).sum().item()
        return sum_loss, sum_kl, num_clipped

    def take_step(self, step: int) -> tuple[dict, dict]:
        """Take a step. Returns its lines of metrics.jsonl and of messages.jsonl."""
        # 1. Sample and reward.
        rng = seeded(self.args.seed, "step", step)
        problems = [problem for problem in self.problems if problem.split == "train"]
        problems = rng.sample(problems, min(self.args.num_questions, len(problems)))
        rollouts = self.sample(problems, self.num_candidates, name=f"step {step}")
        rewards = self.reward(rollouts)
        compared = returns(rewards) if self.args.reward == "value-return" else rewards
        advantage_of = advantages(compared, self.baseline)

        # 2. Update the adapters.
        messages = []
        for node, advantage in advantage_of.items():
            prompt_ids = self.policy.prompt_ids(node.parent.state, rollouts[node].answer_type)
            agent, token_ids = node.message.agent, node.candidate.token_ids
            messages.append(TrainedMessage(agent, tuple(prompt_ids), token_ids, advantage))
        update = self.update(messages, rng)

        # 3. Log.
        self.state["messages"] += len(rollouts)
        outcomes = search_rewards(rollouts)
        lines = []
        for node, problem in rollouts.items():
            line = {"problem": problem.id, "path": node.path, "agent": node.message.agent}
            line |= {"message": node.message.text, "outcome": outcomes[node], "V": node.V}
            line |= {"reward": rewards[node], "advantage": advantage_of.get(node)}
            if compared is not rewards:
                line["return"] = compared[node]
            lines.append(line)
        record = {"step": step, "messages": self.state["messages"], "trained_on": len(messages)}
        record["refused"] = sorted({p.id for p in problems} - {p.id for p in rollouts.values()})
        record["cut"] = sum(node.candidate.truncated for node in rollouts)
        record["without_reward"] = list(rewards.values()).count(None)
        record["reward"] = {}
        for agent, nodes in by_agent(rewards).items():
            record["reward"][agent] = mean_of_known(map(rewards.get, nodes))
        record |= update | {"rollouts": agent_measures(rollouts, outcomes)}
        return record, {"step": step, "messages": lines}

    def measure_dev(self, step: int) -> dict:
        """Measure the agents on the held-out problems, and keep the adapters if they are best.

        The same noise is used at every step, so that differences are due to the agents.
        """
        problems = [problem for problem in self.problems if problem.split == "heldout"]
        num_candidates = (NUM_DEV_PASSES,) + (1,) * (len(self.policy.mas.agents) - 1)
        rollouts = self.sample(problems, num_candidates, name="dev")
        outcomes = [node.outcome for node in rollouts if node.outcome is not None]
        accuracy = outcomes.count(1.0) / (NUM_DEV_PASSES * len(problems))
        if accuracy > self.state["best_accuracy"]:
            self.state |= {"best_step": step, "best_accuracy": accuracy}
            self.state["best_weights"] = self.adapters.weights()
        return {"accuracy": accuracy, "agents": agent_measures(rollouts, search_rewards(rollouts))}

    def settings(self) -> dict:
        """Return what determines the adapters, recorded for resuming."""
        names = ("reward", "rollouts", "num_steps", "num_questions", "policy_lr")
        settings = run_settings(self.args, self.policy)
        settings |= {name: getattr(self.args, name) for name in names}
        settings["problems"] = fingerprint([vars(problem) for problem in self.problems])
        settings["adapters"] = self.adapters.sharing
        settings["lora_rank"] = self.adapters.rank
        settings["constants"] = [CLIP, KL_COEF, NUM_MINIBATCHES, NUM_DEV_PASSES, DEV_EVERY]
        if isinstance(self.reward, Coach):
            settings["reward"] = self.reward.setting
        if self.value_model is not None:
            name, fingerprint_of_v = str(self.value_folder), self.value_model.fingerprint
            settings["value"] = {"name": name, "fingerprint": fingerprint_of_v}
        return settings


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = stage_parser(__doc__, writes=True)
    add_problem_arguments(parser, training=True)
    add_agent_arguments(parser)
    add_value_arguments(parser)
    # The policy that is trained gives every token its own probability.
    parser.set_defaults(top_k=0, top_p=1.0, quantize_policy=False)
    rewards = ", ".join([*REWARDS, "coach:MODEL"])
    add = parser.add_argument
    add("--reward", default="value", help=f"of a message: {rewards}")
    shapes = "passes-K, compared with all of an agent; or tree-1.8.1.1, compared with siblings"
    add("--rollouts", default="passes-4", help=shapes)
    add("--num-steps", type=positive_int, default=10, help="training steps")
    add("--num-questions", type=positive_int, default=64, help="questions per step")
    sharing = ("shared", "per-agent")
    add("--adapters", choices=sharing, default="shared", help="one for all, or one for each")
    add_lora_argument(parser)
    add("--policy-lr", type=positive_float, default=1e-3, help="learning rate; real models: 1e-5")
    return parser.parse_args(argv)


def shape_of_rollouts(args, mas: MAS) -> tuple[tuple[int, ...], str]:
    """Return the candidates per agent (`sample_tree`), and the baseline (`advantages`)."""
    shape, _, counts = args.rollouts.partition("-")
    if shape == "passes":
        return mas.counts_per_agent(f"{mas.agents[0].name}={counts}", "--rollouts"), "agent"
    num_candidates = mas.counts_per_agent(counts, "--rollouts") if shape == "tree" else ()
    branching = [index for index, num in enumerate(num_candidates) if num > 1]
    if not branching:
        raise InputError(f"--rollouts {args.rollouts}: give passes-4, or a tree as tree-1.8.1.1")
    # V and the coach read a message alone, and one without siblings is not trained on: nobody has
    # to speak after the last agent with several candidates.
    if args.reward == "value" or args.reward.startswith("coach:"):
        num_candidates = num_candidates[: branching[-1] + 1]
    return num_candidates, "siblings"


def main(args) -> None:
    from report.pictures import plot_training
    from report.tables import text_table, training_line, training_table
    from report.warnings import agents_warnings

    # 1. Load everything, and start the run folder, or resume it.
    learner = Learner(args)
    folder = Path(args.run) / "agents"
    open_run(folder, learner.settings(), device=args.device, overwrite=args.overwrite)
    if read_config(folder).get("finished"):
        print(f"{folder} is finished already (--overwrite trains it again)")
        return
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        with errors_name(f"{checkpoint} (delete it to start over)"):
            saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        learner.state = saved["state"]
        learner.adapters.set_weights(saved["weights"])
        learner.optimizer.load_state_dict(saved["optimizer"])

    # 2. Train. Step 0 measures the agents as they are.
    with (
        open_to_append(folder / "metrics.jsonl") as metrics,
        open_to_append(folder / "messages.jsonl") as messages,
    ):
        for step in range(learner.state["step"] + 1, args.num_steps + 1):
            record = {"step": 0, "messages": 0}
            if step > 0:
                record, messages_of_step = learner.take_step(step)
                write_line(messages, step - 1, messages_of_step)
            if step % DEV_EVERY == 0 or step == args.num_steps:
                record["dev"] = learner.measure_dev(step)
            write_line(metrics, step, record)
            learner.state["step"] = step
            saved = {"state": learner.state, "weights": learner.adapters.weights()}
            write_checkpoint(checkpoint, saved | {"optimizer": learner.optimizer.state_dict()})
            print(training_line(record), flush=True)

    # 3. Save the adapters that were best on held-out problems, and what they have seen.
    best_step = learner.state["best_step"]
    learner.adapters.set_weights(learner.state["best_weights"])
    learner.adapters.save(folder)
    with open(folder / "problems.jsonl", "wb") as file:
        save_problems(file, [vars(problem) for problem in learner.problems])
        file.write(learner.seen_before)
    records = read_jsonl(folder / "metrics.jsonl")
    plot_training({"agents": [records]}).savefig(folder / "curves.png")
    write_config(folder, read_config(folder) | {"finished": True, "best_step": best_step})
    checkpoint.unlink()
    print(text_table(training_table([(records, best_step)])))
    for line in agents_warnings(records):
        print(line)
    print(f"{folder} holds the adapters, metrics.jsonl, messages.jsonl and curves.png")


if __name__ == "__main__":
    cli(parse_args, main)
