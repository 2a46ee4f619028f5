"""All four stages in order on the tiny agents; resuming after kills; what bad input says; the numbers of stage 4."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest

import evaluate
import generate_rollouts
import search
import train_value
from mas import GRAPHS, Parser, cli
from search import parse_method

ROLLOUTS = "--num-train 10 --num-heldout 4 --num-simulations 6 --num-candidates 2 --max-active 5".split()
VALUE = "--epochs 2 --lora-rank 4".split()
METHODS = "--num-problems 6 --methods greedy vote-3 best_of-3-value sbs-2x1.2.1.1-policy mcts-3x1.3.1.1-value mcts-3x1.3.1.1-policy".split()


def script(module, *argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script, run in this process on one thread: a fork after torch has started more can hang."""
    argv = [*argv, "--num-threads", "1"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli(lambda: module.parse_args([str(a) for a in argv]), module.main)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def ok(module, *argv) -> str:
    code, out, err = script(module, *argv)
    assert code == 0, err
    return out


def rows(path, volatile=("seconds", "cost", "logprob", "V")):
    """Records by id, without what depends on the clock or on rounding; that is compared apart."""
    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in volatile}
        return [strip(v) for v in value] if isinstance(value, list) else value
    records = [json.loads(line) for shard in sorted(path.parent.glob(f"{path.stem}*jsonl")) for line in shard.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: strip(record) for record in records}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with all stages done, and what each printed."""
    run = tmp_path_factory.mktemp("runs") / "r"
    printed = [ok(generate_rollouts, "--run", run, *ROLLOUTS), ok(train_value, "--run", run, *VALUE),
               ok(train_value, "--run", run, *VALUE, "--target", "outcome"), ok(evaluate, "--run", run, *METHODS)]
    return SimpleNamespace(run=run, printed=printed)


def test_the_stages_run_in_order_and_leave_what_they_promise(finished):
    run = finished.run
    for name in ("rollouts/config.json", "rollouts/trees.jsonl", "value/config.json", "value/metrics.jsonl", "value/head.safetensors",
                 "value/adapter/adapter_model.safetensors", "orm/head.safetensors", "eval/config.json", "eval/greedy.jsonl",
                 "eval/mcts-3x1.3.1.1-value.jsonl", "eval/summary.json", "eval/table.md", "eval/em_vs_calls.png"):
        assert (run / name).stat().st_size > 0, name
    assert len(rows(run / "rollouts" / "trees.jsonl")) == 14 and "Planner" in finished.printed[0] and "top-1" in finished.printed[1]
    config = json.loads((run / "rollouts" / "config.json").read_text())
    assert {"command", "commit", "versions", "device", "settings"} <= config.keys() and config["settings"]["graph"]["name"] == "chain"


def test_evaluation_records_hold_answer_and_cost(finished):
    needed = {"id", "question", "gold", "answer", "correct", "agent_calls", "prompt_tokens", "generated_tokens", "scored_tokens", "seconds"}
    calls = {"greedy": 4, "vote-3": 12, "best_of-3-value": 12}
    for path in (finished.run / "eval").glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(records) == 6 and all(needed <= record.keys() for record in records)
        for record in records:
            assert record["correct"] == (record["answer"] == record["gold"]) and record["prompt_tokens"] > 0 < record["generated_tokens"]
            assert record["agent_calls"] == calls.get(path.stem, record["agent_calls"]) and len(record["transcript"]) == 4
            assert (record["scored_tokens"] > 0) == ("value" in path.stem)


def test_a_summary_can_be_derived_again_from_the_records(finished, chain):
    folder = finished.run / "eval"
    methods = [parse_method(name, chain, num_candidates="3", lam=0.0) for name in METHODS[3:]]
    records = {m.name: [json.loads(line) for line in (folder / f"{m.name}.jsonl").read_text().splitlines()] for m in methods}
    again = evaluate.summarise(methods, {name: sorted(own, key=lambda r: r["id"]) for name, own in records.items()})
    assert json.loads(json.dumps(again)) == json.loads((folder / "summary.json").read_text())
    assert evaluate.table(again) + "\n" == (folder / "table.md").read_text()


def test_running_again_changes_nothing_and_more_methods_or_problems_add(finished):
    before = {path: path.read_bytes() for path in finished.run.rglob("*.jsonl")}
    ok(generate_rollouts, "--run", finished.run, *ROLLOUTS)
    assert "finished already" in ok(train_value, "--run", finished.run, *VALUE)
    ok(evaluate, "--run", finished.run, *METHODS)
    assert all(path.read_bytes() == content for path, content in before.items())
    ok(evaluate, "--run", finished.run, "--num-problems", 7, "--methods", "greedy", "vote-2")
    assert len(rows(finished.run / "eval" / "greedy.jsonl")) == 7 and len(rows(finished.run / "eval" / "vote-2.jsonl")) == 7


def test_the_orm_answers_where_it_is_asked(finished):
    ok(evaluate, "--run", finished.run, "--num-problems", 3, "--methods", "best_of-2-outcome", "mcts-2x2-value-lam0.5")
    lines = (finished.run / "eval" / "mcts-2x2-value-lam0.5.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all("outcome#" in json.loads(line)["scorer"] and "value#" in json.loads(line)["scorer"] for line in lines)


def test_runs_are_compared_from_their_records(finished, tmp_path):
    import shutil
    shutil.copytree(finished.run, tmp_path / "other")
    path = tmp_path / "other" / "eval" / "vote-3.jsonl"
    lines = path.read_text().splitlines()
    flipped = [json.dumps(record | {"correct": not record["correct"]}) for record in map(json.loads, lines)]
    path.write_text("\n".join(flipped[:2]) + "\n")                                       # two records in the one file,
    (path.parent / "vote-3.1of2.jsonl").write_text("\n".join(flipped[2:]) + "\n")        # the others in another process's
    out = ok(evaluate, "--compare", finished.run, tmp_path / "other")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| vote-3")]
    right = sum(json.loads(line)["correct"] for line in lines)
    assert [float(row[3]) for row in rows] == [pytest.approx(100 * right / 6, abs=0.1), pytest.approx(100 - 100 * right / 6, abs=0.1)]
    assert rows[0][6] == "" and float(rows[1][6]) == pytest.approx(100 - 200 * right / 6, abs=0.1) and "| Planner |" in out
    (tmp_path / "other" / "value" / "config.json").unlink()
    assert "no config.json" in complaint(evaluate, "--compare", tmp_path / "other")


def test_search_prints_transcript_tree_and_cost(finished):
    out = ok(search, "--run", finished.run, "--method", "mcts-3x1.3.1.1-value")
    for needle in ("Reader:", "Planner:", "Solver:", "Verifier:", "V = ", "Answer:", "gold", "N ", "Q ", "agent calls", "scored"):
        assert needle in out
    own = ok(search, "--run", finished.run, "--method", "greedy", "--question", "Tom packs 9 boxes. How many?")
    assert "Question: Tom packs 9 boxes. How many?" in own and "gold" not in own


def test_a_graph_from_a_file_with_a_conditional_agent_runs_through_all_stages(tmp_path):
    """The Refiner speaks only when the Verifier objects: transcripts of four and of five messages in labels, V and search."""
    toml = 'name = "mine"\n' + "".join(f"[[agents]]\nname = {json.dumps(a.name)}\nsees = {json.dumps(a.sees)}\nprompt = {json.dumps(a.prompt)}\n"
                                      f"max_new_tokens = {a.max_new_tokens}\n" + (f"when = {json.dumps(a.when)}\n" if a.when else "") for a in GRAPHS["refine"].agents)
    (tmp_path / "mine.toml").write_text(toml)
    graph = ["--run", tmp_path / "r", "--graph", tmp_path / "mine.toml"]
    ok(generate_rollouts, *graph, "--num-train", 6, "--num-heldout", 2, "--num-simulations", 8, "--num-candidates", "1.3.1.1.2")
    records = [json.loads(line) for line in (tmp_path / "r" / "rollouts" / "trees.jsonl").read_text().splitlines()]
    ends = {node["agent"] for record in records for node in record["nodes"] if "reward" in node}
    assert ends == {"Verifier", "Refiner"}
    for record in records:
        for at, node in enumerate(record["nodes"]):
            objects = node.get("agent") == "Verifier" and "check fails" in node["message"]
            children = {child["agent"] for child in record["nodes"] if child.get("parent") == at}
            assert children <= {"Refiner"} if objects else "Refiner" not in children
            assert not (objects and "reward" in node)
    for view in ("full", "local"):
        ok(train_value, "--run", tmp_path / "r" if view == "full" else tmp_path / view, "--rollouts", tmp_path / "r" / "rollouts", *VALUE, "--view", view)
    ok(evaluate, *graph, "--num-problems", 6, "--methods", "greedy", "vote-2", "sbs-2x1.3.1.1.2-value", "mcts-4x1.3.1.1.2-value", "mcts-4x2-policy")
    for path in (tmp_path / "r" / "eval").glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            said = [turn["agent"] for turn in record["transcript"]]
            assert said[:4] == ["Reader", "Planner", "Solver", "Verifier"] and (said[4:] == ["Refiner"]) == ("check fails" in record["transcript"][3]["message"])
    assert "--graph" in complaint(search, "--run", tmp_path / "r", "--method", "mcts-3-value")   # V of this graph, asked for another one


def killed_at(moments, module, *argv):
    """Run a script in forked children that are killed with SIGKILL, then let it finish."""
    for after in (*moments, None):
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                try:
                    module.main(module.parse_args([*map(str, argv), "--num-threads", "1"]))
                    os._exit(0)
                finally:
                    os._exit(1)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        deadline = time.time() + 120
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.time() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
        status = ended[1]
    assert os.waitstatus_to_exitcode(status) == 0


def test_rollouts_killed_and_resumed_equal_the_uninterrupted_run(finished, tmp_path):
    rng = random.Random(7)
    killed_at([rng.uniform(0.3, 2.5) for _ in range(4)], generate_rollouts, "--run", tmp_path, *ROLLOUTS)
    assert rows(tmp_path / "rollouts" / "trees.jsonl") == rows(finished.run / "rollouts" / "trees.jsonl")


def test_evaluation_killed_and_resumed_equals_the_uninterrupted_run(finished, tmp_path):
    rng = random.Random(8)
    shared = ["--value", finished.run / "value", *METHODS, "--max-active", 2]
    killed_at([rng.uniform(0.5, 3.0) for _ in range(2)], evaluate, "--run", tmp_path, *shared)
    for name in METHODS[3:]:
        done = rows(finished.run / "eval" / f"{name}.jsonl")
        assert rows(tmp_path / "eval" / f"{name}.jsonl") == {k: done[k] for k in sorted(done)[:6]}


def test_two_processes_give_the_trees_of_one_and_go_on_after_a_kill(finished, tmp_path):
    """By `accelerate launch`, as the README says (--multi_gpu: several processes, on a CPU, too); killed once on the way."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", generate_rollouts.__file__, "--run", str(tmp_path), *ROLLOUTS, "--num-threads", "1"]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.time() + 120
        while not list((tmp_path / "rollouts").glob("trees.*")) and time.time() < deadline:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    shards = [json.loads(line)["id"] for path in sorted((tmp_path / "rollouts").glob("trees.*of2.jsonl")) for line in path.read_text().splitlines()]
    assert len(shards) == 14 and not (tmp_path / "rollouts" / "trees.jsonl").exists() and "14 trees" in done.stdout
    assert rows(tmp_path / "rollouts" / "trees.jsonl") == rows(finished.run / "rollouts" / "trees.jsonl")


# Bad input: one line, exit code 2, nothing lost


def complaint(module, *argv) -> str:
    code, _, err = script(module, *argv)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize("module, argv, needle", [
    (generate_rollouts, ["--graph", "star"], "--graph star: unknown; it is one of chain"),
    (generate_rollouts, ["--task", "chess"], "--task chess: unknown; it is one of tiny"),
    (generate_rollouts, ["--num-simulations", "0"], "--num-simulations: '0' is not a whole number of at least 1"),
    (generate_rollouts, ["--num-train", "-5"], "--num-train: '-5' is not a whole number of at least 1"),
    (generate_rollouts, ["--num-candidates", "0"], "--num-candidates 0"),
    (generate_rollouts, ["--num-candidates", "Plumber=2"], "no agent Plumber in graph chain; it has Reader"),
    (generate_rollouts, ["--temperature", "0"], "--temperature: '0' is not a number above 0"),
    (generate_rollouts, ["--c-uct", "-1"], "--c-uct: '-1' is not a number at least 0"),
    (generate_rollouts, ["--top-k", "-1"], "--top-k: '-1' is not a whole number"),
    (generate_rollouts, ["--top-p", "0"], "--top-p: '0' is not a number above 0 and at most 1"),
    (generate_rollouts, ["--graph", "none.toml"], "--graph none.toml: no such file"),
    (generate_rollouts, ["--data", "none.jsonl"], "none.jsonl: no such file"),
    (generate_rollouts, ["--model", "no/such/model"], "--model no/such/model: cannot be loaded"),
    (generate_rollouts, ["--simulations", "3"], "unrecognized arguments"),
    (search, ["--question", "  "], "--question is empty"),
    (search, ["--lam", "1.5"], "--lam: '1.5' is not a number at least 0 and at most 1"),
    (search, ["--lam", "nan"], "--lam: 'nan' is not a number"),
    (search, ["--method", "beam-3"], "method beam-3: not one of greedy"),
    (search, ["--index", "0"], "--index"),
    (evaluate, ["--methods", "mcts-5-value-lam2"], "lam2"),
    (evaluate, ["--num-problems", "0"], "--num-problems"),
])
def test_bad_flags_are_one_clear_line(tmp_path, module, argv, needle):
    assert needle in complaint(module, "--run", tmp_path, *argv)


def test_missing_stages_are_named(tmp_path):
    assert "rollouts: no config.json here" in complaint(train_value, "--run", tmp_path)
    assert "value: no trained value model there; train_value.py makes it" in complaint(search, "--run", tmp_path)
    assert "orm: no trained outcome model there" in complaint(search, "--run", tmp_path, "--method", "mcts-3-policy", "--lam", "0.5")


def test_values_of_several_runs_meet_the_same_held_out_labels(finished, tmp_path):
    """--heldout-rollouts: trained on one folder's labels, measured on another's; never where they share a question or not the graph."""
    ok(generate_rollouts, "--run", tmp_path / "few", *ROLLOUTS, "--num-simulations", 2)
    shared = finished.run / "rollouts"
    ok(train_value, "--run", tmp_path / "few", "--heldout-rollouts", shared, *VALUE)
    n = lambda run: {agent: m["n"] for agent, m in json.loads((run / "value" / "metrics.jsonl").read_text().splitlines()[-1])["heldout"].items()}
    assert n(tmp_path / "few") == n(finished.run)
    ok(train_value, "--run", tmp_path / "own", "--rollouts", tmp_path / "few" / "rollouts", *VALUE)
    assert n(tmp_path / "own") != n(finished.run)
    ok(generate_rollouts, "--run", tmp_path / "other", *ROLLOUTS, "--graph", "single", "--num-candidates", 2)
    assert "another graph" in complaint(train_value, "--run", tmp_path / "few", "--heldout-rollouts", tmp_path / "other" / "rollouts", *VALUE)
    trees = tmp_path / "few" / "rollouts" / "trees.jsonl"
    trees.write_text(trees.read_text().replace('"split": "train"', '"split": "heldout"'))
    assert "ask what V would be trained on" in complaint(train_value, "--run", tmp_path / "x", "--rollouts", shared, "--heldout-rollouts", trees.parent, *VALUE)


def test_another_configuration_is_refused_and_nothing_is_lost(finished):
    before = {path: path.read_bytes() for path in finished.run.rglob("*") if path.is_file()}
    assert "seed (there 0, now 1)" in complaint(generate_rollouts, "--run", finished.run, *ROLLOUTS, "--seed", 1)
    assert "num_simulations (there 6, now 7)" in complaint(generate_rollouts, "--run", finished.run, *ROLLOUTS, "--num-simulations", 7)
    assert "graph (there chain#" in complaint(generate_rollouts, "--run", finished.run, *ROLLOUTS, "--graph", "single", "--num-candidates", "2")
    assert "lora_rank (there 4, now 8)" in complaint(train_value, "--run", finished.run, *VALUE, "--lora-rank", 8)
    assert "temperature (there 1.0, now 0.5)" in complaint(evaluate, "--run", finished.run, *METHODS, "--temperature", 0.5)
    assert "graph 'chain', now it is 'single'" in complaint(search, "--run", finished.run, "--graph", "single", "--method", "mcts-3-value")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_torn_files_are_named(finished, tmp_path):
    import shutil
    shutil.copytree(finished.run, tmp_path / "r")
    trees = tmp_path / "r" / "rollouts" / "trees.jsonl"
    lines = trees.read_text().splitlines()
    trees.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
    assert "trees.jsonl, line 2: not JSON" in complaint(train_value, "--run", tmp_path / "r", *VALUE)
    (tmp_path / "r" / "rollouts" / "config.json").write_text('{"sett')
    assert "config.json: not JSON" in complaint(generate_rollouts, "--run", tmp_path / "r", *ROLLOUTS)
    (tmp_path / "r" / "value" / "head.safetensors").unlink()
    assert "head.safetensors is missing" in complaint(search, "--run", tmp_path / "r", "--method", "best_of-2-value")


def test_a_test_question_that_was_trained_on_is_refused(finished, tmp_path):
    question = json.loads((finished.run / "rollouts" / "trees.jsonl").read_text().splitlines()[0])["question"]
    (tmp_path / "leak.jsonl").write_text(json.dumps({"id": "mine", "question": question.upper() + " ", "answer": "3"}) + "\n")
    said = complaint(evaluate, "--run", tmp_path, "--value", finished.run / "value", "--data", tmp_path / "leak.jsonl", "--methods", "best_of-2-value")
    assert "test problem mine has the question of" in said


def test_answers_by_another_value_model_are_not_mixed_in(finished, tmp_path):
    import shutil
    shutil.copytree(finished.run, tmp_path / "r")
    shutil.copytree(finished.run / "orm", tmp_path / "other")   # any other trained model will do
    assert "made with the scorer value#" in complaint(evaluate, "--run", tmp_path / "r", *METHODS, "--value", tmp_path / "other")


# Numbers


def test_wilson_and_paired_by_hand():
    low, high = evaluate.wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    result = evaluate.paired([True] * 8 + [False] * 2, [True] * 4 + [False] * 5 + [True])
    assert (result["wins"], result["losses"], result["difference"]) == (4, 1, pytest.approx(0.3)) and result["p"] == pytest.approx(0.375)
    p, q, n = 5 / 12, 2 / 12, 12
    half = 1.959964 * ((p + q - (p - q) ** 2) / n) ** 0.5
    assert (result["low"], result["high"]) == (pytest.approx(p - q - half), pytest.approx(p - q + half))
    assert evaluate.paired([True], [True])["p"] == 1.0


def test_opponents_are_the_nearest_in_calls(chain):
    names = ["greedy", "vote-3", "vote-8", "best_of-3-value", "best_of-8-value", "mcts-4-value", "mcts-4-policy", "mcts-4-random", "mcts-9-policy"]
    methods = [parse_method(name, chain, num_candidates="3", lam=0.0) for name in names]
    calls = dict(zip((m.name for m in methods), (4, 12, 32, 12, 32, 29, 29, 29, 50)))
    found = evaluate.opponents(methods[5], methods, {name: {"agent_calls": n} for name, n in calls.items()})
    assert [(other.name, why) for other, why in found] == [
        ("greedy", "greedy"), ("vote-8", "nearest vote"), ("best_of-8-value", "nearest best-of-N"),
        ("mcts-4x3-policy", "same, by policy"), ("mcts-4x3-random", "same, by random")]


# The house rules


def test_files_import_only_upwards():
    import ast
    from pathlib import Path
    order = ["mas", "generate_rollouts", "train_value", "search", "evaluate"]
    for at, name in enumerate(order):
        tree = ast.parse((Path(evaluate.__file__).parent / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & set(order[at:]), name
    assert "torch" not in {node.names[0].name for node in ast.walk(ast.parse((Path(evaluate.__file__).parent / "mas.py").read_text())) if isinstance(node, ast.Import)}


def test_the_same_flag_means_the_same_in_every_script(monkeypatch):
    flags = {}
    remember = Parser.add_argument

    def add_argument(self, *names, **options):
        action = remember(self, *names, **options)
        flags.setdefault(names[0], set()).add((str(action.type), str(action.default), str(action.choices)))
        return action
    monkeypatch.setattr(Parser, "add_argument", add_argument)
    for module in (generate_rollouts, train_value, search, evaluate):
        module.parse_args([])
    assert len(flags) > 20 and {flag: kinds for flag, kinds in flags.items() if len(kinds) > 1} == {}


def test_functions_and_tests_that_the_readme_names_exist():
    import re
    from pathlib import Path
    root = Path(evaluate.__file__).parent
    readme = (root / "README.md").read_text()
    tests = "".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", readme))
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named), [n for n in named if f"def {n}(" not in tests]
    for file, name in re.findall(r"`(mas|generate_rollouts|train_value|search|evaluate)\.([\w.]+)`", readme):
        if name != "py":
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (root / f"{file}.py").read_text()), f"{file}.{name}"
