"""Labels: Eq. 2, backup, MAS-MCTS and the driver, on trees that can be worked out by hand."""

import json
import math
import random

import pytest
from conftest import NoProgress, ScriptedPolicy, drive

from generate_rollouts import (Candidate, Cost, Sample, Score, append_jsonl, backup, expand, label_tree, make_root, mine, open_run, own_shard,
                              resume_jsonl, run,
                               select, tree_record, uniforms)
from mas import InputError, Problem, seeded

PROBLEM = Problem("p", "train", "q", "1", "number")


def node_with(duo, stats):
    """A root whose children have the given (N, W)."""
    root = make_root("q")
    expand(duo, root, [Candidate(f"m{i}", 1, 0.0, False) for i in range(len(stats))])
    for child, (child.N, child.W) in zip(root.children, stats):
        pass
    return root


def test_select_is_equation_2(duo):
    root = node_with(duo, [(3, 1.5), (1, 0.2), (0, 0.0)])
    c, total = 1.3, math.log(1 + 4)
    by_hand = [0.5 + c * math.sqrt(total / 4), 0.2 + c * math.sqrt(total / 2), 0.0 + c * math.sqrt(total / 1)]
    assert select(root, c) is root.children[by_hand.index(max(by_hand))] is root.children[2]
    assert select(root, 0.0) is root.children[0]          # without exploration: the largest Q


def test_select_changes_where_the_formula_says(duo):
    root = node_with(duo, [(4, 2.0), (1, 0.0)])           # 0.5 + c*sqrt(ln6/5) against 0 + c*sqrt(ln6/2)
    switch = 0.5 / (math.sqrt(math.log(6) / 2) - math.sqrt(math.log(6) / 5))
    assert select(root, switch - 1e-6) is root.children[0] and select(root, switch + 1e-6) is root.children[1]


def test_ties_go_to_the_first(duo):
    root = node_with(duo, [(2, 1.0), (2, 1.0), (2, 1.0)])
    assert select(root, 1.0) is root.children[0]


def test_backup_reaches_every_edge_undiscounted(duo):
    root = make_root("q")
    [a] = expand(duo, root, [Candidate("x", 1, 0.0, False)])
    [b] = expand(duo, a, [Candidate("y", 1, 0.0, False)])
    backup(b, 1.0)
    backup(b, -1.0)
    backup(a, 1.0)
    assert [(n.N, n.W) for n in (root, a, b)] == [(3, 1.0), (3, 1.0), (2, 0.0)] and a.Q == pytest.approx(1 / 3) and b.Q == 0


def test_identical_texts_are_one_action(duo):
    root = make_root("q")
    expand(duo, root, [Candidate(text, i, 0.0, False) for i, text in enumerate("abacb")])
    assert [(n.state.messages[-1].text, n.candidate.tokens, n.path) for n in root.children] == [("a", 0, (0,)), ("b", 1, (1,)), ("c", 3, (3,))]


class First:
    """A generator that always picks the first."""

    def choice(self, options):
        return options[0]


def test_a_labelled_tree_by_hand(duo):
    """C = 2, N = 2; B's answer is right (1) exactly on path (1, 0).

    Simulation 1 expands the root (picks a0), expands a0 into two terminals, both wrong: both counted once.
    Then Q(a0) = -1, N = 2; a1 unvisited: Q = 0. Simulation 2 selects a1, expands: b0 right (+1), b1 wrong (-1, sibling).
    """
    say = lambda path: f"a{path[0]}" if len(path) == 1 else f"Final answer: {1 if path == (1, 0) else 7 + path[1]}"
    root = drive(label_tree(PROBLEM, duo, num_simulations=2, num_candidates=(2, 2), c_uct=1.0, rng=First()), {Sample: ScriptedPolicy(say)})
    a0, a1 = root.children
    assert [(n.N, n.W) for n in (root, a0, a1)] == [(4, -2.0), (2, -2.0), (2, 0.0)]
    assert [(n.N, n.W, n.reward) for n in a0.children + a1.children] == [(1, -1.0, -1.0), (1, -1.0, -1.0), (1, 1.0, 1.0), (1, -1.0, -1.0)]


def test_siblings_of_a_fresh_terminal_are_counted_once_and_revisits_again(duo):
    root = drive(label_tree(PROBLEM, duo, num_simulations=5, num_candidates=(1, 2), c_uct=0.0, rng=First()),
                 {Sample: ScriptedPolicy(lambda path: "a" if len(path) == 1 else f"Final answer: {path[1]}")})
    [a] = root.children
    wrong, right = a.children
    assert (wrong.N, wrong.W, right.N, right.W) == (1, -1.0, 5, 5.0)   # one fresh pair, then four visits to the better one
    assert (a.N, root.N) == (6, 6)


def test_every_simulation_ends_in_a_terminal_state(chain):
    for seed in range(5):
        say = lambda path: f"Final answer: {hash((seed, path)) % 5}"
        root = drive(label_tree(PROBLEM, chain, num_simulations=15, num_candidates=(2, 3, 2, 2), c_uct=1.0, rng=random.Random(seed)),
                     {Sample: ScriptedPolicy(say)})
        stack = [root]
        while stack:
            node = stack.pop()
            if chain.is_terminal(node.state):
                assert node.reward in (1.0, -1.0) and node.W == node.N * node.reward
            elif node.N:
                assert node.children and node.N == sum(child.N for child in node.children)  # the walk never stops inside
                stack += node.children


def test_labels_find_the_planted_path(chain):
    """Only Planner candidate 2 can lead to the right answer: its edges get the best Q at every Planner turn."""
    say = lambda path: f"Final answer: {1 if path[1:2] == (2,) else 100 + len(path)} {path}" if len(path) == 4 else f"{path}"
    root = drive(label_tree(PROBLEM, chain, num_simulations=40, num_candidates=(3,) * 4, c_uct=1.0, rng=random.Random(0)), {Sample: ScriptedPolicy(say)})
    planned = [reader.children for reader in root.children if reader.children]
    assert planned and all(max(children, key=lambda n: n.Q).path[1] == 2 for children in planned if all(n.N for n in children))


def searches(chain, count, **settings):
    settings = dict(num_simulations=12, num_candidates=(2, 2, 2, 2), c_uct=1.0) | settings
    for i in range(count):
        problem = Problem(f"p{i}", "train", f"question {i}", str(i % 3), "number")
        yield problem, label_tree(problem, chain, rng=seeded(0, problem.id), **settings)


def by_problem(requests_to_text):
    """A scripted policy whose texts depend on the problem, too."""

    class Policy(ScriptedPolicy):
        def __call__(self, requests):
            replies = []
            for problem, request in requests:
                self.say = lambda path, problem=problem: requests_to_text(problem.id, path)
                replies += super().__call__([(problem, request)])
            return replies
    return Policy(None)


def trees(chain, max_active):
    text = lambda problem_id, path: f"Final answer: {int(uniforms(1, problem_id, path)[0] * 3)}"
    found = run(searches(chain, 20), {Sample: by_problem(text)}, max_active=max_active, progress=NoProgress())
    return {problem.id: tree_record(problem, root, cost) for problem, root, cost in found}


def test_interleaved_equals_one_by_one(chain):
    alone, some, all_together = trees(chain, 1), trees(chain, 7), trees(chain, 100)
    assert alone == some == all_together and len(alone) == 20


def test_the_driver_batches_all_waiting_requests_of_one_kind(duo):
    policy = ScriptedPolicy(lambda path: "Final answer: 1")
    list(run(searches(duo, 10, num_candidates=(1, 1), num_simulations=1), {Sample: policy}, max_active=4, progress=NoProgress()))
    assert policy.batches == [4, 4, 4, 4, 2, 2]


def test_cheap_kinds_are_answered_first(duo):
    order = []

    def search(i):
        if i % 2:
            yield Score([])
        yield Sample([], 1)

    def handler(kind):
        def answer(requests):
            order.append((kind, len(requests)))
            return [([], Cost()) for _ in requests]
        return answer
    list(run(((PROBLEM, search(i)) for i in range(6)), {Score: handler("score"), Sample: handler("sample")}, max_active=6, progress=NoProgress()))
    assert order == [("score", 3), ("sample", 6)]  # those that were scored wait with the others: one large batch


def test_costs_go_to_the_search_that_caused_them(duo):
    def search(calls):
        for _ in range(calls):
            yield Sample([], 1)
    found = run([(Problem(str(n), "train", "", "", ""), search(n)) for n in (1, 3)],
                {Sample: lambda requests: [([], Cost(agent_calls=1, seconds=0.5)) for _ in requests]}, max_active=9, progress=NoProgress())
    assert {problem.id: (cost.agent_calls, cost.seconds) for problem, _, cost in found} == {"1": (1, 0.5), "3": (3, 1.5)}


def test_uniforms_are_streams_of_their_own():
    a = uniforms(1000, 0, "p", (0, 1), 2)
    assert (a == uniforms(1000, 0, "p", (0, 1), 2)).all() and (a[:10] == uniforms(10, 0, "p", (0, 1), 2)).all()
    for key in ((1, "p", (0, 1), 2), (0, "q", (0, 1), 2), (0, "p", (1, 0), 2), (0, "p", (0, 1), 3)):
        assert abs(float((a * uniforms(1000, *key)).mean()) - 0.25) < 0.05 and (a != uniforms(1000, *key)).all()
    assert 0 <= a.min() and a.max() < 1 and abs(a.mean() - 0.5) < 0.05


def test_a_tree_record_holds_all_that_is_needed_to_label_again(chain):
    [(problem, root, cost)] = list(run(searches(chain, 1), {Sample: by_problem(lambda _, path: f"Final answer: {sum(path)}")}, max_active=1, progress=NoProgress()))
    record = json.loads(json.dumps(tree_record(problem, root, cost)))
    assert record["nodes"][0]["parent"] is None and all(node["parent"] < i for i, node in enumerate(record["nodes"]) if i)
    fields = {"parent", "agent", "message", "tokens", "logprob", "truncated", "N", "W"}
    assert all(fields <= node.keys() for node in record["nodes"][1:])
    leaves = [node for node in record["nodes"] if node.get("agent") == "Verifier"]
    assert leaves and all(node["reward"] == (1.0 if node["answer"] == record["gold"] else -1.0) for node in leaves)


# The run folder


def test_a_torn_last_line_is_cut_and_a_torn_middle_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    with open(path, "w") as file:
        append_jsonl(file, {"id": 1})
        file.write('{"id": 2, "que')
    assert resume_jsonl(path) == {1: {"id": 1}} and path.read_text() == '{"id": 1}\n'
    path.write_text('{"id": 1}\n{"id": 2, \n{"id": 3}\n')
    with pytest.raises(InputError, match="x.jsonl, line 2"):
        resume_jsonl(path)


def test_processes_share_the_problems_and_see_each_others_records(tmp_path, monkeypatch):
    problems, path = [Problem(f"p{i}", "train", "q", "1", "number") for i in range(40)], tmp_path / "x.jsonl"
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append({p.id for p in mine(problems)})
        assert own_shard(path).name == f"x.{rank}of3.jsonl" and mine(problems[::-1]) == mine(problems)[::-1]
        with open(own_shard(path), "w") as file:
            append_jsonl(file, {"id": f"by {rank}"})
            file.write('{"torn')
    assert set.union(*shares) == {p.id for p in problems} and sum(map(len, shares)) == 40 and min(map(len, shares)) > 5
    assert list(resume_jsonl(path)) == ["by 0", "by 1", "by 2"]
    assert own_shard(path).read_text() == '{"id": "by 2"}\n' and (tmp_path / "x.0of3.jsonl").read_text().endswith("torn")   # only its own is cut
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert own_shard(path) == path and mine(problems) == problems and len(resume_jsonl(path)) == 3


def test_another_configuration_is_refused_by_name_unless_overwritten(tmp_path):
    open_run(tmp_path, {"seed": 0, "c_uct": 1.0}, overwrite=False)
    (tmp_path / "trees.jsonl").write_text("{}\n")
    open_run(tmp_path, {"seed": 0, "c_uct": 1.0}, overwrite=False)
    with pytest.raises(InputError, match=r"seed \(there 0, now 1\).*--overwrite"):
        open_run(tmp_path, {"seed": 1, "c_uct": 1.0}, overwrite=False)
    assert (tmp_path / "trees.jsonl").exists()
    open_run(tmp_path, {"seed": 1, "c_uct": 1.0}, overwrite=True)
    assert not (tmp_path / "trees.jsonl").exists()
