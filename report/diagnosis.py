"""What the records of a run say about where it failed: signatures of failure, and blame.

A signature is a number beside the limit at which it usually means trouble. Stages 1, 2, 4 and 5
print those that they trigger; the report of a run (report.py) shows all. Blame says which agent's
message lost a problem. Plain records only: no model, no search.
"""

import math
from collections import Counter, defaultdict
from statistics import fmean
from typing import NamedTuple

from report.tables import reading_of_v

# ---- Signatures of failure -----------------------------------------------------------------------


class Signature(NamedTuple):
    """A number that usually means trouble on one side of its limit.

    Attributes:
        trouble: what is wrong if it is triggered.
        measure: what the number is.
        number: None if nothing was there to measure.
        demand: "at most" or "at least" the limit is fine.
        remedy: what usually helps.
    """

    trouble: str
    measure: str
    number: float | None
    demand: str
    limit: float
    remedy: str

    @property
    def is_triggered(self) -> bool:
        """Whether the number is on the wrong side. A NaN always is."""
        if self.number is None:
            return False
        if self.demand == "at most":
            return not self.number <= self.limit
        return not self.number >= self.limit


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def _cut_messages(num_cut: int, num_messages: int) -> Signature:
    return Signature(
        trouble="messages are cut",
        measure="share of messages that ran into their token limit",
        number=_share(num_cut, num_messages),
        demand="at most",
        limit=0.05,
        remedy="Raise --max-new-tokens",
    )


def warning_text(signatures: list[Signature]) -> str:
    """Return two lines for each signature that is triggered; "" if there is none."""
    lines = []
    for signature in signatures:
        if signature.is_triggered:
            lines += [f"! {signature.trouble}: {evidence(signature)}", f"  {signature.remedy}"]
    return "\n".join(lines)


def with_warnings(text: str, signatures: list[Signature]) -> str:
    """Return a text with the warnings below it, if there are any."""
    return "\n".join([text, warning_text(signatures)]).rstrip()


def evidence(signature: Signature) -> str:
    """Return what was measured, and what would be fine."""
    if signature.number is None:
        return f"{signature.measure}: nothing to measure"
    demand = f"should be {signature.demand} {signature.limit:g}"
    return f"{signature.measure}: {signature.number:.3f}, {demand}"


# ---- Stage 1: labels -----------------------------------------------------------------------------


def label_signatures(
    trees: list[dict], agents: list[str], num_candidates: list[int]
) -> list[Signature]:
    """Return the signatures of labelled trees.

    Args:
        trees: lines of trees.jsonl.
        agents: names of all agents.
        num_candidates: how many candidates each of them was asked for.
    """
    num_mixed, num_messages, num_cut = 0, 0, 0
    num_distinct, num_expanded = Counter(), Counter()
    for tree in trees:
        rewards = {node["reward"] for node in tree["nodes"] if "reward" in node}
        num_mixed += len(rewards) == 2
        expanded = {}  # node -> the agent that spoke there
        for node in tree["nodes"][1:]:
            num_messages += 1
            num_cut += node["truncated"]
            num_distinct[node["agent"]] += 1
            expanded[node["parent"]] = node["agent"]
        num_expanded += Counter(expanded.values())
    shares = []
    for agent, num in zip(agents, num_candidates, strict=True):
        if num > 1 and num_expanded[agent] > 0:
            shares.append(num_distinct[agent] / (num * num_expanded[agent]))
    return [
        Signature(
            trouble="most problems are always solved, or never",
            measure="share of trees with both right and wrong answers",
            number=_share(num_mixed, len(trees)),
            demand="at least",
            limit=0.25,
            remedy="Take easier or harder problems, or another --temperature",
        ),
        Signature(
            trouble="candidates are nearly all duplicates",
            measure="share of distinct candidates, of the agent with most of them",
            number=max(shares, default=None),
            demand="at least",
            limit=0.5,
            remedy="A search has nothing to choose from: raise --temperature",
        ),
        _cut_messages(num_cut, num_messages),
    ]


# ---- Stage 2: V ----------------------------------------------------------------------------------


def value_signatures(train_loss: float, heldout: list[dict], settings: dict) -> list[Signature]:
    """Return the signatures of a trained V.

    Args:
        train_loss: mean loss of its last epoch.
        heldout: lines of heldout.jsonl.
        settings: of the training: target, loss, huber_delta, label_weights.
    """
    model = "V" if settings["target"] == "search" else "the ORM"
    # The values of the loss "rank" have no scale.
    explained = None
    if heldout and settings["loss"] != "rank":
        explained = explained_share(heldout)

    # A weighted training loss cannot be compared, nor can one that is no regression.
    is_comparable = settings["loss"] in ("huber", "mse") and settings["label_weights"] == "equal"
    ratio = None
    if is_comparable and explained is not None and explained < 0.5:
        losses = []
        for edge in heldout:
            error = abs(edge["V"] - edge["y"])
            losses.append(regression_loss(error, settings["loss"], settings["huber_delta"]))
        ratio = fmean(losses) / train_loss if train_loss > 0 else math.inf
    return [
        Signature(
            trouble=f"{model} fits its training problems, but not held-out ones",
            measure="held-out / training loss, if less than half of the labels is explained",
            number=ratio,
            demand="at most",
            limit=2.0,
            remedy="Label more problems (--num-train), or train less (--epochs, --lora-rank)",
        ),
        Signature(
            trouble=f"{model} explains little of the held-out labels",
            measure="share of the variance of held-out labels that it explains",
            number=explained,
            demand="at least",
            limit=0.1,
            remedy="Label more problems (--num-train), or train longer (--epochs, --lr)",
        ),
    ]


def regression_loss(error: float, loss: str, huber_delta: float) -> float:
    """Return the Huber loss or the squared error of one label, as in training."""
    if loss == "mse":
        return error**2
    if error <= huber_delta:
        return error**2 / 2
    return huber_delta * (error - huber_delta / 2)


def explained_share(heldout: list[dict]) -> float | None:
    """Return 1 - MSE / variance of the labels; None if they do not vary."""
    mean = fmean(edge["y"] for edge in heldout)
    variance = fmean((edge["y"] - mean) ** 2 for edge in heldout)
    if variance == 0:
        return None
    return 1 - fmean((edge["V"] - edge["y"]) ** 2 for edge in heldout) / variance


# ---- Stage 4: answers ----------------------------------------------------------------------------

WEAK_RUNGS = ("number", "none")  # the message names no answer (extraction.py)


def answer_signatures(records: dict[str, list[dict]], comparisons: list[dict]) -> list[Signature]:
    """Return the signatures of an evaluation.

    Args:
        records: method -> its records, with their trees if they were kept.
        comparisons: of summary.json.
    """
    # 1. How answers were read, and how many messages were cut.
    num_answers, num_weak, num_messages, num_cut = 0, 0, 0, 0
    for records_of_method in records.values():
        for record in records_of_method:
            num_answers += 1
            num_weak += record["rung"] in WEAK_RUNGS
            num_messages += record["agent_calls"]
            num_cut += sum(record["truncated"].values())

    # 2. What the searches have looked at.
    num_possible, num_terminals = 0, 0
    num_scored_by_both, num_disagreements = 0, 0
    for method, records_of_method in records.items():
        for record in records_of_method:
            tree = record.get("tree")
            if tree is None or not is_guided_mcts(method):
                continue
            ends = [leaves[-1] for leaves in tree["simulations"]]
            most = most_final_states(method, num_turns=len(record["transcript"]))
            num_possible += min(len(ends), most)
            num_terminals += len(set(ends))
            for node in tree["nodes"]:
                if "outcome" in node:
                    num_scored_by_both += 1
                    num_disagreements += (node["outcome"] > 0) != (node["V"] > 0)

    # 3. V against the policy's likelihood, in the same search.
    highest = []
    for row in comparisons:
        if row["why"] == "same, by policy" and "-value" in row["method"]:
            highest.append(row["high"])
    return [
        Signature(
            trouble="answers had to be guessed",
            measure="share of final messages that name no answer",
            number=_share(num_weak, num_answers),
            demand="at most",
            limit=0.1,
            remedy="Tell the last agent how to name its answer, or raise --max-new-tokens",
        ),
        _cut_messages(num_cut, num_messages),
        Signature(
            trouble="MCTS spends its simulations on few final answers",
            measure="distinct final states per simulation, of those that there can be",
            number=_share(num_terminals, num_possible),
            demand="at least",
            limit=0.2,
            remedy="Raise --c-uct, or give fewer simulations",
        ),
        Signature(
            trouble="V and the ORM disagree",
            measure="share of final states that only one of them takes for right",
            number=_share(num_disagreements, num_scored_by_both),
            demand="at most",
            limit=0.2,
            remedy="Find out which one is wrong before you mix them (--lam)",
        ),
        Signature(
            trouble="V guides worse than the policy's likelihood",
            measure="EM by V minus EM by the likelihood, same search, upper end of the interval",
            number=min(highest, default=None),
            demand="at least",
            limit=0.0,
            remedy="V does not fit this task or these agents: train it on their labels",
        ),
    ]


def is_guided_mcts(method: str) -> bool:
    """Return whether a method is an MCTS that is guided by V or by the ORM."""
    return method.startswith("mcts-") and ("-value" in method or "-outcome" in method)


def most_final_states(method: str, *, num_turns: int) -> int:
    """Return how many final states a tree can have: 8 for the method "mcts-64x1.8.1.1-value".

    num_turns: how many agents speak, if the name has one number of candidates for all of them.
    """
    _, _, candidates = method.split("-")[1].partition("x")
    counts = [int(num) for num in candidates.split(".")]
    if len(counts) == 1:
        counts *= num_turns
    return math.prod(counts)


# ---- Stage 5: the agents -------------------------------------------------------------------------


def agents_signatures(records: list[dict], best_step: int) -> list[Signature]:
    """Return the signatures of finetuned agents.

    Args:
        records: lines of metrics.jsonl.
        best_step: whose adapters were kept; 0 if training has not helped.
    """
    excess = None
    for record in records:
        if record["step"] == best_step > 0 and "dev" in record:
            excess, _ = reading_of_v(record["dev"])
    return [
        Signature(
            trouble="V thinks better of the agents than they are",
            measure="mean (V + 1) / 2 minus the share of right answers, worst agent",
            number=excess,
            demand="at most",
            limit=0.1,
            remedy="Label with the new agents and train a fresh V, or mix in the outcome",
        )
    ]


# ---- Blame ---------------------------------------------------------------------------------------


class LostAnswer(NamedTuple):
    """A wrong final state, and the message that lost the problem.

    Attributes:
        problem_id, node: the final state, an index of its tree.
        agent: who is blamed; None if there is no drop.
        drop: how far V falls with its message.
    """

    problem_id: str
    node: int
    agent: str | None
    drop: float


def blame(edges: list[dict], *, by: str, below: str) -> list[LostAnswer]:
    """Say for each wrong final state of the trees which message lost the problem.

    It is the message with the largest drop; of equal drops, the first one.

    Args:
        edges: lines of heldout.jsonl.
        by: "V", or "y" for the labels themselves.
        below: what a message falls below. "siblings": their mean, as the other candidates in the
            same state show what could be expected there. Only visited ones have labels and count; a
            message without them has no drop. "before": the state before it; the first message falls
            below the mean of its siblings.
    """
    edge_of = {(edge["id"], edge["node"]): edge for edge in edges}
    candidates = defaultdict(list)  # state -> its labelled messages
    for edge in edges:
        candidates[edge["id"], edge["parent"]].append(edge)
    lost = []
    for edge in edges:
        is_final = (edge["id"], edge["node"]) not in candidates
        if not is_final or edge["y"] > 0:
            continue
        agent, largest_drop = None, 0.0
        for message in reversed(_path_to_root(edge, edge_of)):
            before = edge_of.get((message["id"], message["parent"]))
            if below == "siblings" or before is None:
                others = []
                for candidate in candidates[message["id"], message["parent"]]:
                    if candidate is not message:
                        others.append(candidate[by])
                expected = fmean(others) if others else message[by]
            else:
                expected = before[by]
            drop = expected - message[by]
            if drop > largest_drop:
                agent, largest_drop = message["agent"], drop
        lost.append(LostAnswer(edge["id"], edge["node"], agent, largest_drop))
    return lost


def _path_to_root(edge: dict, edge_of: dict[tuple[str, int], dict]) -> list[dict]:
    """Return the edges from this one up to the root."""
    path = []
    while edge is not None:
        path.append(edge)
        edge = edge_of.get((edge["id"], edge["parent"]))
    return path
