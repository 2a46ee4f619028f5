"""What the records of a run say about where it failed: signatures of failure, and blame.

A signature is a number beside the limit at which it usually means trouble. Each stage prints those
that it triggers; the report of a run (report.py) shows all. Blame says which agent's message lost a
problem. Plain records only: no model, no search.
"""

from collections import Counter, defaultdict
from statistics import fmean
from typing import NamedTuple

from tables import reading_of_v

# ---- Signatures of failure -----------------------------------------------------------------------


class Signature(NamedTuple):
    """A number that usually means trouble on one side of its limit.

    Attributes:
        trouble: what is wrong if it is triggered.
        number: None if nothing was there to measure.
        limit: the last number that is no trouble.
        is_triggered: whether the number is beyond its limit.
        measure: what the number is.
        remedy: what usually helps.
    """

    trouble: str
    number: float | None
    limit: float
    is_triggered: bool
    measure: str
    remedy: str


def _above(*, number: float | None, limit: float, **texts: str) -> Signature:
    """Return a signature that is triggered by a number above its limit."""
    is_triggered = number is not None and number > limit
    return Signature(number=number, limit=limit, is_triggered=is_triggered, **texts)


def _below(*, number: float | None, limit: float, **texts: str) -> Signature:
    """Return a signature that is triggered by a number below its limit."""
    is_triggered = number is not None and number < limit
    return Signature(number=number, limit=limit, is_triggered=is_triggered, **texts)


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def warnings(signatures: list[Signature]) -> str:
    """Return two lines for each signature that is triggered; "" if there is none."""
    paragraphs = []
    for signature in signatures:
        if signature.is_triggered:
            paragraphs.append(
                f"\n! {signature.trouble}: {evidence(signature)}\n  {signature.remedy}"
            )
    return "".join(paragraphs)


def evidence(signature: Signature) -> str:
    """Return what was measured, and the limit: "message cut 0.20 (limit 0.05)"."""
    if signature.number is None:
        return f"{signature.measure}: nothing to measure"
    return f"{signature.measure} {signature.number:.2f} (limit {signature.limit:.2f})"


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
        _below(
            trouble="labels are nearly all right or nearly all wrong",
            number=_share(num_mixed, len(trees)),
            limit=0.25,
            measure="trees with right and wrong answers: share",
            remedy="Take easier or harder problems, or another --temperature",
        ),
        _below(
            trouble="candidates are nearly all duplicates",
            number=max(shares, default=None),
            limit=0.5,
            measure="distinct candidates of the agent with most of them: share",
            remedy="A search has nothing to choose from: raise --temperature",
        ),
        _above(
            trouble="messages are cut",
            number=_share(num_cut, num_messages),
            limit=0.05,
            measure="messages that ran into their token limit: share",
            remedy="Raise --max-new-tokens",
        ),
    ]


# ---- Stage 2: V ----------------------------------------------------------------------------------


def value_signatures(train_loss: float, heldout: list[dict], settings: dict) -> list[Signature]:
    """Return the signatures of a trained V.

    Args:
        train_loss: mean loss of its last epoch.
        heldout: lines of heldout.jsonl.
        settings: of the training: loss, huber_delta.
    """
    ratio = None
    explained = explained_share(heldout) if heldout else None
    if settings["loss"] in ("huber", "mse") and explained is not None and explained < 0.5:
        losses = []
        for edge in heldout:
            error = abs(edge["V"] - edge["y"])
            losses.append(regression_loss(error, settings["loss"], settings["huber_delta"]))
        ratio = fmean(losses) / train_loss
    return [
        _above(
            trouble="V fits its training problems, but not held-out ones",
            number=ratio,
            limit=2.0,
            measure="held-out / training loss, if V explains less than half of the held-out labels",
            remedy="Label more problems (--num-train), or train less (--epochs, --lora-rank)",
        ),
        _below(
            trouble="V explains few of the held-out labels",
            number=explained,
            limit=0.1,
            measure="explained share of the variance of held-out labels",
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
    num_simulations, num_terminals = 0, 0
    num_scored_by_both, num_disagreements = 0, 0
    for method, records_of_method in records.items():
        for record in records_of_method:
            tree = record.get("tree")
            if tree is None or not method.startswith("mcts-"):
                continue
            leaves = [leaves[-1] for leaves in tree["simulations"]]
            num_simulations += len(leaves)
            num_terminals += len(set(leaves))
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
        _above(
            trouble="answers had to be guessed",
            number=_share(num_weak, num_answers),
            limit=0.1,
            measure="final messages that name no answer, so that their last number counts: share",
            remedy="Tell the last agent how to name its answer, or raise --max-new-tokens",
        ),
        _above(
            trouble="messages are cut",
            number=_share(num_cut, num_messages),
            limit=0.05,
            measure="messages that ran into their token limit: share",
            remedy="Raise --max-new-tokens",
        ),
        _below(
            trouble="MCTS spends its simulations on few final answers",
            number=_share(num_terminals, num_simulations),
            limit=0.2,
            measure="distinct terminal states per simulation",
            remedy="Raise --c-uct, or give fewer simulations",
        ),
        _above(
            trouble="V and the ORM disagree",
            number=_share(num_disagreements, num_scored_by_both),
            limit=0.2,
            measure="final states that one of them takes for right and the other for wrong: share",
            remedy="Find out which one is wrong before you mix them (--lam)",
        ),
        _below(
            trouble="V ranks worse than the policy's likelihood",
            number=min(highest, default=None),
            limit=0.0,
            measure="EM by V minus EM by the policy, same search, upper end of the interval",
            remedy="V does not fit this task or these agents: train it on their labels",
        ),
    ]


# ---- Stage 5: the agents -------------------------------------------------------------------------


def agents_signatures(records: list[dict], best_step: int) -> list[Signature]:
    """Return the signatures of finetuned agents. records: lines of metrics.jsonl."""
    [kept] = [record for record in records if record["step"] == best_step and "dev" in record]
    excess, _ = reading_of_v(kept["dev"])
    return [
        _above(
            trouble="the agents please V more than they are right",
            number=excess,
            limit=0.1,
            measure="mean (V + 1) / 2 minus the share of right answers, worst agent, adapters kept",
            remedy="Label with the new agents and train a fresh V, or mix in the outcome",
        )
    ]


# ---- Blame ---------------------------------------------------------------------------------------


class Loss(NamedTuple):
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


def blame(edges: list[dict], *, by: str, below: str) -> list[Loss]:
    """Say for each wrong final state of the trees which message lost the problem.

    It is the message with the largest drop; of equal drops, the first one.

    Args:
        edges: lines of heldout.jsonl.
        by: "V", or "y" for the labels themselves.
        below: what a message falls below. "siblings": their mean, as the other candidates in the
            same state show what could be expected there; a message without siblings has no drop.
            "before": the state before it; the first message falls below the mean of its siblings.
    """
    edge_of = {(edge["id"], edge["node"]): edge for edge in edges}
    siblings = defaultdict(list)
    for edge in edges:
        siblings[edge["id"], edge["parent"]].append(edge[by])
    losses = []
    for edge in edges:
        is_final = (edge["id"], edge["node"]) not in siblings
        if not is_final or edge["y"] > 0:
            continue
        agent, largest_drop = None, 0.0
        for message in reversed(_path_to_root(edge, edge_of)):
            before = edge_of.get((message["id"], message["parent"]))
            if below == "siblings" or before is None:
                expected = fmean(siblings[message["id"], message["parent"]])
            else:
                expected = before[by]
            drop = expected - message[by]
            if drop > largest_drop:
                agent, largest_drop = message["agent"], drop
        losses.append(Loss(edge["id"], edge["node"], agent, largest_drop))
    return losses


def _path_to_root(edge: dict, edge_of: dict[tuple[str, int], dict]) -> list[dict]:
    """Return the edges from this one up to the root."""
    path = []
    while edge is not None:
        path.append(edge)
        edge = edge_of.get((edge["id"], edge["parent"]))
    return path
