"""Tests of the four scripts: in order on the tiny agents, after kills, and on bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace

import pytest
from conftest import exit_code_of, start_in_fork
from safetensors.torch import load_file, save_file

import evaluate
import generate_rollouts
import search
import train_value
from llm.decoding import Decoder
from mas import REFINE
from support.flags import HERE, cli
from support.records import open_to_append
from tasks.grading import extract_answer

ROLLOUTS = ["--num-train", 10, "--num-heldout", 4, "--num-simulations", 6]
ROLLOUTS += ["--num-candidates", 2, "--max-active", 5]
VALUE = ["--epochs", 2, "--lora-rank", 4]
METHODS = [
    "greedy",
    "vote-3",
    "best_of-3-value",
    "sbs-2x1.2.1.1-policy",
    "mcts-3x1.3.1.1-value",
    "mcts-3x1.3.1.1-policy",
]
EVALUATE = ["--num-problems", 6, "--methods", *METHODS]

# ---- Running a script ----------------------------------------------------------------------------


def script_argv(argv) -> list[str]:
    # One thread: a fork can hang after torch has started more.
    return [*map(str, argv), "--num-threads", "1"]


def run_script(module, *argv) -> tuple[int, str, str]:
    """Run a script in this process. Returns (exit code, stdout, stderr)."""
    parse_args = partial(module.parse_args, script_argv(argv))
    out, err = StringIO(), StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli(parse_args, module.main)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def output_of(module, *argv) -> str:
    """Run a script that must succeed. Returns its stdout."""
    code, out, err = run_script(module, *argv)
    assert code == 0, err
    return out


def error_of(module, *argv) -> str:
    """Run a script that must refuse its input: one line, exit code 2. Returns the line."""
    code, _, err = run_script(module, *argv)
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]


# ---- Reading what a script has written -----------------------------------------------------------

# What depends on the clock or on rounding.
VOLATILE = ("seconds", "cost", "logprob", "V")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_shards(path) -> dict[str, dict]:
    """Read the records of all shards of a file: id -> record without VOLATILE entries."""
    records = {}
    for shard in path.parent.glob(f"{path.stem}*jsonl"):
        for record in read_lines(shard):
            assert record["id"] not in records
            records[record["id"]] = without_volatile(record)
    return records


def without_volatile(value):
    if isinstance(value, dict):
        return {key: without_volatile(value[key]) for key in value if key not in VOLATILE}
    if isinstance(value, list):
        return [without_volatile(element) for element in value]
    return value


def contents(folder, pattern) -> dict:
    """Return the bytes of every file in a folder and the folders in it."""
    return {path: path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


# ---- The four stages in order --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with all stages finished, and what each printed. Tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "r"
    printed = {
        "rollouts": output_of(generate_rollouts, "--run", run, *ROLLOUTS),
        "value": output_of(train_value, "--run", run, *VALUE),
        "orm": output_of(train_value, "--run", run, *VALUE, "--epochs", 1, "--target", "outcome"),
        "eval": output_of(evaluate, "--run", run, *EVALUATE),
    }
    return SimpleNamespace(run=run, printed=printed)


FILES = [
    "rollouts/config.json",
    "rollouts/trees.jsonl",
    "value/config.json",
    "value/metrics.jsonl",
    "value/head.safetensors",
    "value/adapter/adapter_model.safetensors",
    "orm/head.safetensors",
    "eval/config.json",
    "eval/greedy.jsonl",
    "eval/mcts-3x1.3.1.1-value.jsonl",
    "eval/summary.json",
    "eval/table.md",
    "eval/em_vs_calls.png",
]


def test_the_stages_run_in_order_and_leave_what_they_promise(finished):
    run = finished.run
    for name in FILES:
        assert (run / name).stat().st_size > 0, name
    assert len(read_shards(run / "rollouts" / "trees.jsonl")) == 14
    assert "Planner" in finished.printed["rollouts"]
    assert "top-1" in finished.printed["value"]
    for method in METHODS:
        assert method in finished.printed["eval"]
    config = json.loads((run / "rollouts" / "config.json").read_text())
    assert {"command", "commit", "versions", "device", "settings"} <= config.keys()
    assert config["settings"]["graph"]["name"] == "chain"


RECORD_KEYS = {"id", "question", "gold", "answer", "correct", "agent_calls", "prompt_tokens"}
RECORD_KEYS |= {"generated_tokens", "scored_tokens", "seconds"}


def test_evaluation_records_hold_answer_and_cost(finished):
    calls_of_method = {"greedy": 4, "vote-3": 12, "best_of-3-value": 12}
    paths = list((finished.run / "eval").glob("*.jsonl"))
    assert {path.stem for path in paths} >= set(METHODS)
    for path in paths:
        records = read_lines(path)
        assert len(records) == 6
        for record in records:
            assert record.keys() >= RECORD_KEYS
            assert record["correct"] == (record["answer"] == record["gold"])
            last_message = record["transcript"][-1]["message"]
            assert extract_answer(last_message, "number") == (record["answer"], record["rung"])
            assert record["prompt_tokens"] > 0
            assert record["generated_tokens"] > 0
            assert len(record["transcript"]) == 4
            assert (record["scored_tokens"] > 0) == ("value" in path.stem)
            if path.stem in calls_of_method:
                assert record["agent_calls"] == calls_of_method[path.stem]


@pytest.fixture
def copied_run(finished, tmp_path):
    """A copy of the finished run, for tests that change it."""
    return shutil.copytree(finished.run, tmp_path / "copy")


def test_running_again_changes_nothing_and_more_methods_or_problems_add(copied_run):
    run = copied_run
    before = contents(run, "*.jsonl")
    output_of(generate_rollouts, "--run", run, *ROLLOUTS)
    assert "finished already" in output_of(train_value, "--run", run, *VALUE)
    assert "not in this table" not in output_of(evaluate, "--run", run, *EVALUATE)
    assert contents(run, "*.jsonl") == before

    output = output_of(evaluate, "--run", run, "--num-problems", 7, "--methods", "greedy", "vote-2")
    others = sorted(set(METHODS) - {"greedy", "vote-2"})
    assert f"recorded, but not in this table: {', '.join(others)}; --methods" in output
    assert len(read_shards(run / "eval" / "greedy.jsonl")) == 7
    assert len(read_shards(run / "eval" / "vote-2.jsonl")) == 7


def test_the_orm_answers_if_a_method_asks_for_it(copied_run):
    methods = ["best_of-2-outcome", "mcts-2x2-value", "mcts-2x2-value-lam0.5"]
    output_of(evaluate, "--run", copied_run, "--num-problems", 3, "--methods", *methods)
    records = read_lines(copied_run / "eval" / "mcts-2x2-value-lam0.5.jsonl")
    assert len(records) == 3
    for record in records:
        assert "outcome#" in record["scorer"]
        assert "value#" in record["scorer"]
    # The ORM reads terminal states in addition to V.
    records_without_orm = read_lines(copied_run / "eval" / "mcts-2x2-value.jsonl")
    tokens_without_orm = sum(record["scored_tokens"] for record in records_without_orm)
    assert sum(record["scored_tokens"] for record in records) > tokens_without_orm


def test_search_prints_transcript_tree_and_cost(finished):
    out = output_of(search, "--run", finished.run, "--method", "mcts-3x1.3.1.1-value")
    for agent in ("Reader:", "Planner:", "Solver:", "Verifier:"):
        assert agent in out
    for part in ("V = ", "Answer:", "gold", "N ", "Q ", "agent calls", "scored"):
        assert part in out


def test_search_answers_a_question_of_the_user(finished):
    question = "Tom packs 9 boxes. How many?"
    flags = ["--method", "greedy", "--question", question]
    out = output_of(search, "--run", finished.run, *flags)
    assert f"Question: {question}" in out
    assert "gold" not in out


# ---- Runs side by side ---------------------------------------------------------------------------


def flip_verdicts(path, num_in_first_shard):
    """Flip every verdict of a records file, and divide its records among two shards."""
    lines = []
    for record in read_lines(path):
        record["correct"] = not record["correct"]
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines[:num_in_first_shard]))
    other_shard = path.with_suffix(".1of2.jsonl")
    other_shard.write_text("".join(lines[num_in_first_shard:]))


def table_rows(text, first_cell) -> list[list[str]]:
    """Return the cells of the table rows whose first cell is this."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] == first_cell:
            rows.append(cells)
    return rows


def test_runs_are_compared_from_their_records(finished, copied_run):
    path = copied_run / "eval" / "vote-3.jsonl"
    verdicts = [record["correct"] for record in read_lines(path)]
    em = 100 * sum(verdicts) / 6
    flip_verdicts(path, num_in_first_shard=2)

    out = output_of(evaluate, "--compare", finished.run, copied_run)
    first, other = table_rows(out, "vote-3")
    assert float(first[3]) == pytest.approx(em, abs=0.1)
    assert float(other[3]) == pytest.approx(100 - em, abs=0.1)
    assert first[6] == ""  # the first run is not compared with itself
    assert float(other[6]) == pytest.approx(100 - 2 * em, abs=0.1)
    assert "| Planner |" in out

    (copied_run / "value" / "config.json").unlink()
    assert "no config.json" in error_of(evaluate, "--compare", copied_run)


def test_only_runs_that_share_answers_can_be_compared(finished, copied_run, tmp_path):
    assert "it is not a run" in error_of(evaluate, "--compare", finished.run, tmp_path / "none")
    greedy = copied_run / "eval" / "greedy.jsonl"
    greedy.write_text(greedy.read_text().replace('"id": "', '"id": "another-'))
    error = error_of(evaluate, "--compare", finished.run, copied_run)
    assert "no problem was answered by greedy" in error
    config = copied_run / "value" / "config.json"
    config.write_text(config.read_text().replace('"finished": true', '"finished": false'))
    error = error_of(evaluate, "--compare", finished.run, copied_run)
    assert "its training is not finished" in error


def labels_per_agent(run) -> dict[str, int]:
    """Return the number of held-out labels that V was measured on."""
    last_epoch = read_lines(run / "value" / "metrics.jsonl")[-1]
    return {agent: metrics["n"] for agent, metrics in last_epoch["heldout"].items()}


def test_values_of_several_runs_meet_the_same_held_out_labels(finished, tmp_path):
    """--heldout-rollouts: train V on the labels of one folder, measure it on those of another."""
    few, shared = tmp_path / "few", finished.run / "rollouts"
    output_of(generate_rollouts, "--run", few, *ROLLOUTS, "--num-simulations", 2)
    output_of(train_value, "--run", few, "--heldout-rollouts", shared, *VALUE, "--epochs", 1)
    assert labels_per_agent(few) == labels_per_agent(finished.run)

    labels_of_few = Counter()
    for tree in read_lines(few / "rollouts" / "trees.jsonl"):
        if tree["split"] == "heldout":
            labels_of_few += Counter(node["agent"] for node in tree["nodes"][1:] if node["N"] > 0)
    assert 0 < labels_of_few.total() < sum(labels_per_agent(few).values())


def test_held_out_labels_of_another_graph_are_refused(finished, tmp_path):
    graph = ["--graph", "single", "--num-candidates", 2]
    output_of(generate_rollouts, "--run", tmp_path / "single", *ROLLOUTS, *graph)
    flags = ["--rollouts", finished.run / "rollouts"]
    flags += ["--heldout-rollouts", tmp_path / "single" / "rollouts"]
    assert "another graph" in error_of(train_value, "--run", tmp_path / "x", *flags, *VALUE)


def test_held_out_questions_that_v_is_trained_on_are_refused(finished, tmp_path):
    rollouts = finished.run / "rollouts"
    shutil.copytree(rollouts, tmp_path / "heldout")
    trees = tmp_path / "heldout" / "trees.jsonl"
    trees.write_text(trees.read_text().replace('"split": "train"', '"split": "heldout"'))
    flags = ["--rollouts", rollouts, "--heldout-rollouts", tmp_path / "heldout"]
    error = error_of(train_value, "--run", tmp_path / "x", *flags, *VALUE)
    assert "have questions that V would be trained on" in error


# ---- A graph from a file, with a conditional agent -----------------------------------------------


def write_toml(mas, path):
    """Write the agents of a graph as a user would."""
    lines = ['name = "mine"']
    for agent in mas.agents:
        lines.append("[[agents]]")
        for key in ("name", "sees", "prompt", "max_new_tokens", "when"):
            value = getattr(agent, key)
            if value is not None:
                lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")


def assert_refiner_answers_objections(nodes):
    """The Refiner speaks after a Verifier that objects, and only then."""
    for index, node in enumerate(nodes):
        children = {child["agent"] for child in nodes if child.get("parent") == index}
        if node.get("agent") == "Verifier" and "check fails" in node["message"]:
            assert children <= {"Refiner"}
            assert "reward" not in node
        else:
            assert "Refiner" not in children


def test_a_graph_from_a_file_with_a_conditional_agent_runs_through_all_stages(tmp_path):
    """Labels, V and search see transcripts of four messages, and of five with the Refiner."""
    run = tmp_path / "r"
    write_toml(REFINE, tmp_path / "mine.toml")
    graph = ["--run", run, "--graph", tmp_path / "mine.toml"]

    # 1. labels
    rollouts = ["--num-train", 4, "--num-heldout", 1, "--num-simulations", 6]
    rollouts += ["--num-candidates", "1.3.1.1.2"]
    output_of(generate_rollouts, *graph, *rollouts)
    last_agents = set()
    for record in read_lines(run / "rollouts" / "trees.jsonl"):
        assert_refiner_answers_objections(record["nodes"])
        leaves = [node for node in record["nodes"] if "reward" in node]
        last_agents |= {leaf["agent"] for leaf in leaves}
    assert last_agents == {"Verifier", "Refiner"}

    # 2. V, in both views
    output_of(train_value, "--run", run, *VALUE, "--epochs", 1, "--view", "full")
    labels = ["--rollouts", run / "rollouts"]
    output_of(
        train_value, "--run", tmp_path / "local", *labels, *VALUE, "--epochs", 1, "--view", "local"
    )

    # 3. search
    methods = ["greedy", "vote-2", "sbs-2x1.3.1.1.2-value", "mcts-4x1.3.1.1.2-value"]
    methods.append("mcts-4x2-policy")
    output_of(evaluate, *graph, "--num-problems", 3, "--methods", *methods)
    paths = list((run / "eval").glob("*.jsonl"))
    assert len(paths) == 5
    for path in paths:
        for record in read_lines(path):
            speakers = [turn["agent"] for turn in record["transcript"]]
            assert speakers[:4] == ["Reader", "Planner", "Solver", "Verifier"]
            objects = "check fails" in record["transcript"][3]["message"]
            assert speakers[4:] == (["Refiner"] if objects else [])

    # 4. this V does not fit the default graph
    assert "--graph" in error_of(search, "--run", run, "--method", "mcts-3-value")


# ---- Kills ---------------------------------------------------------------------------------------


def start_script(module, argv, **environment) -> int:
    """Run a script in a forked child, silently. Returns its process id."""

    def script():
        os.environ.update(environment)
        module.main(module.parse_args(script_argv(argv)))

    return start_in_fork(script)


def run_with_kills(kill_times, module, *argv):
    """Run a script, kill it after each of these seconds with SIGKILL, then let it finish."""
    for seconds in kill_times:
        child = start_script(module, argv)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        exit_code_of(child)
    assert exit_code_of(start_script(module, argv)) == 0


def test_rollouts_killed_and_resumed_equal_the_uninterrupted_run(finished, tmp_path):
    rng = random.Random(7)
    kill_times = [rng.uniform(0.3, 2.5) for _ in range(2)]
    run_with_kills(kill_times, generate_rollouts, "--run", tmp_path, *ROLLOUTS)
    resumed = read_shards(tmp_path / "rollouts" / "trees.jsonl")
    assert resumed == read_shards(finished.run / "rollouts" / "trees.jsonl")


def assert_equal_up_to_rounding(found, expected):
    """V depends in its last bits on which other states are read in its row."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal_up_to_rounding(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_up_to_rounding(one, other)
    else:
        assert found == expected


def test_evaluation_killed_and_resumed_equals_the_uninterrupted_run(finished, tmp_path):
    rng = random.Random(8)
    kill_times = [rng.uniform(0.5, 3.0) for _ in range(2)]
    flags = ["--value", finished.run / "value", *EVALUATE, "--max-active", 2]
    run_with_kills(kill_times, evaluate, "--run", tmp_path, *flags)
    for name in METHODS:
        resumed = read_shards(tmp_path / "eval" / f"{name}.jsonl")
        assert_equal_up_to_rounding(resumed, read_shards(finished.run / "eval" / f"{name}.jsonl"))


def count_messages(monkeypatch, path):
    """Write a line to a file for every message that has ended, in forked children as well."""
    decode = Decoder.decode

    def counted_decode(*args, on_message, **options):
        def count(*message):
            with open(path, "a") as file:
                file.write("ended\n")
            on_message(*message)

        return decode(*args, on_message=count, **options)

    monkeypatch.setattr(Decoder, "decode", counted_decode)


def test_a_kill_with_everything_in_flight_loses_no_message_that_has_ended(
    finished, tmp_path, monkeypatch
):
    # With all problems in flight no tree is finished before the end; only the journal helps.
    in_flight = [*ROLLOUTS, "--max-active", 512, "--batch-tokens", 8000]
    path = tmp_path / "ended.txt"
    path.touch()
    count_messages(monkeypatch, path)
    kill_times = [1.0, 2.0]
    run_with_kills(kill_times, generate_rollouts, "--run", tmp_path, *in_flight)
    trees = read_shards(tmp_path / "rollouts" / "trees.jsonl")
    assert trees == read_shards(finished.run / "rollouts" / "trees.jsonl")

    # The uninterrupted run's messages, each of them once.
    num_needed = messages_of_labels(finished.run)
    assert messages_of_labels(tmp_path) == num_needed
    num_ended = len(path.read_text().split())
    assert num_needed <= num_ended <= num_needed + len(kill_times)  # killed between two lines


def messages_of_labels(run) -> int:
    """Count the messages in the journal that belong to labelled problems."""
    num_messages = 0
    for path in (run / "messages").glob("*.jsonl"):
        for entry in read_lines(path):
            num_messages += "-train-" in entry["problem"] or "-heldout-" in entry["problem"]
    return num_messages


def test_the_methods_of_an_evaluation_share_their_messages(finished):
    # vote-3 and best_of-3 draw the same passes; the others share what they can.
    [line] = [line for line in finished.printed["eval"].splitlines() if "from the journal" in line]
    num_generated, num_recalled = [int(word) for word in line.split() if word.isdigit()]
    calls = 0
    for name in METHODS:
        for record in read_lines(finished.run / "eval" / f"{name}.jsonl"):
            calls += record["agent_calls"]
    assert num_generated + num_recalled == calls
    vote = read_lines(finished.run / "eval" / "vote-3.jsonl")
    best_of = read_lines(finished.run / "eval" / "best_of-3-value.jsonl")
    assert num_recalled > sum(record["agent_calls"] for record in best_of)
    # Each method is charged what it would have cost alone.
    for record, other in zip(vote, best_of, strict=True):
        for cost in ("agent_calls", "prompt_tokens", "generated_tokens"):
            assert record[cost] == other[cost]


# As the README says. --multi_gpu starts several processes on a CPU as well.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]


def kill_when_labelling_has_started(children, run):
    """Kill these processes as soon as the run has a shard of trees."""
    deadline = time.time() + 120
    while not list(run.glob("rollouts/trees.*")) and time.time() < deadline:
        time.sleep(0.05)
    for child in children:
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL
    assert list(run.glob("rollouts/trees.*"))


def test_two_processes_give_the_trees_of_one_and_resume_after_a_kill(finished, tmp_path):
    argv = ["--run", tmp_path, *ROLLOUTS]
    children = []
    for rank in ("0", "1"):
        children.append(start_script(generate_rollouts, argv, RANK=rank, WORLD_SIZE="2"))
    kill_when_labelling_has_started(children, tmp_path)
    command = [sys.executable, *LAUNCH, generate_rollouts.__file__, *script_argv(argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr

    trees = tmp_path / "rollouts" / "trees.jsonl"
    num_trees = 0
    for shard in trees.parent.glob("trees.*of2.jsonl"):
        num_trees += len(read_lines(shard))
    assert num_trees == 14
    assert not trees.exists()
    assert "14 trees" in done.stdout
    assert read_shards(trees) == read_shards(finished.run / "rollouts" / "trees.jsonl")


# ---- Bad flags -----------------------------------------------------------------------------------

BAD_FLAGS = [
    (generate_rollouts, "--graph star", "--graph star: unknown; it is one of chain"),
    (generate_rollouts, "--task chess", "--task chess: unknown; it is one of tiny"),
    (
        generate_rollouts,
        "--num-simulations 0",
        "--num-simulations: '0' is not a whole number of at least 1",
    ),
    (
        generate_rollouts,
        "--num-train -5",
        "--num-train: '-5' is not a whole number of at least 1",
    ),
    (generate_rollouts, "--num-candidates 0", "--num-candidates 0"),
    (
        generate_rollouts,
        "--num-candidates Plumber=2",
        "no agent Plumber in graph chain; it has Reader",
    ),
    (generate_rollouts, "--temperature 0", "--temperature: '0' is not a number above 0"),
    (generate_rollouts, "--c-uct -1", "--c-uct: '-1' is not a number at least 0"),
    (generate_rollouts, "--top-k -1", "--top-k: '-1' is not a whole number of at least 0"),
    (generate_rollouts, "--top-p 0", "--top-p: '0' is not a number above 0 and at most 1"),
    (generate_rollouts, "--graph none.toml", "--graph none.toml: no such file"),
    (generate_rollouts, "--data none.jsonl", "none.jsonl: no such file"),
    (generate_rollouts, "--model no/such/model", "--model no/such/model: cannot be loaded"),
    (generate_rollouts, "--simulations 3", "unrecognized arguments"),
    (search, "--lam 1.5", "--lam: '1.5' is not a number at least 0 and at most 1"),
    (search, "--lam nan", "--lam: 'nan' is not a number"),
    (search, "--method beam-3", "method beam-3: not one of greedy"),
    (search, "--index 0", "--index"),
    (search, "--question why --index 7", "--question and --index: give one of them"),
    (search, "--index 99999999", "--index 99999999: --task tiny has 178 test problems"),
    (search, "--task chess --question How?", "--task chess: unknown; it is one of tiny"),
    (evaluate, "--methods mcts-5-value-lam2", "lam2"),
    (evaluate, "--num-problems 0", "--num-problems"),
]


@pytest.mark.parametrize("module, flags, message", BAD_FLAGS)
def test_bad_flags_are_one_clear_line(tmp_path, module, flags, message):
    assert message in error_of(module, "--run", tmp_path, *flags.split())


def test_an_empty_question_is_one_clear_line(tmp_path):
    assert "--question is empty" in error_of(search, "--run", tmp_path, "--question", "  ")


# ---- Bad run folders -----------------------------------------------------------------------------


def test_missing_stages_are_named(tmp_path):
    run = ["--run", tmp_path]
    assert "rollouts: no config.json here" in error_of(train_value, *run)
    message = "value: no trained value model there; train_value.py makes it"
    assert message in error_of(search, *run)
    flags = ["--method", "mcts-3-policy", "--lam", "0.5"]
    assert "orm: no trained outcome model there" in error_of(search, *run, *flags)


def test_another_configuration_is_refused_and_nothing_is_lost(finished):
    run = ["--run", finished.run]
    before = contents(finished.run, "*")

    rollouts = partial(error_of, generate_rollouts, *run, *ROLLOUTS)
    assert "seed (there 0, now 1)" in rollouts("--seed", 1)
    assert "num_simulations (there 6, now 7)" in rollouts("--num-simulations", 7)
    assert "graph (there chain#" in rollouts("--graph", "single", "--num-candidates", "2")

    error = error_of(train_value, *run, *VALUE, "--lora-rank", 8)
    assert "lora_rank (there 4, now 8)" in error
    error = error_of(evaluate, *run, *EVALUATE, "--temperature", 0.5)
    assert "temperature (there 1.0, now 0.5)" in error
    error = error_of(search, *run, "--graph", "single", "--method", "mcts-3-value")
    assert "graph 'chain', now it is 'single'" in error
    assert contents(finished.run, "*") == before


def run_on_own_data(folder, rows, agents):
    """Start a run on a data file and a copy of the agents. Returns its flags."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--run", folder / "r", "--data", data, "--model", agents]
    return [*flags, "--max-new-tokens", 8, "--num-candidates", 1]


def test_records_of_other_data_or_other_weights_are_refused(tmp_path):
    # 1. Label and answer problems of one file.
    agents = shutil.copytree(HERE / "tiny" / "agents", tmp_path / "agents")
    rows = []
    for number in range(12):
        rows.append({"id": f"p{number}", "question": f"What is {number} + 1?", "answer": "5"})
    label = ["--num-simulations", 1]
    answer = ["--methods", "greedy"]
    flags = run_on_own_data(tmp_path, rows, agents)
    output_of(generate_rollouts, *flags, *label)
    output_of(evaluate, *flags, *answer)
    before = contents(tmp_path / "r", "*")

    # 2. Other golds, then other questions, under the same path and ids.
    other_golds = [row | {"answer": "6"} for row in rows]
    other_questions = [row | {"question": row["question"] + "?"} for row in rows]
    for changed_rows, change in (
        (other_golds, r"gold of problem p\d+ has changed \(there '5', now '6'\)"),
        (other_questions, r"question of problem p\d+ has changed \(there 'What is"),
    ):
        run_on_own_data(tmp_path, changed_rows, agents)
        assert re.search(change, error_of(generate_rollouts, *flags, *label))
        assert re.search(change, error_of(evaluate, *flags, *answer))
    run_on_own_data(tmp_path, rows, agents)

    # 3. Other weights, then another chat template, in the same folder.
    weights = load_file(agents / "model.safetensors")
    first = min(weights)
    save_file(weights | {first: weights[first] + 1}, agents / "model.safetensors", {"format": "pt"})
    for module, own in ((generate_rollouts, label), (evaluate, answer)):
        assert "another configuration: model (there" in error_of(module, *flags, *own)
    save_file(weights, agents / "model.safetensors", {"format": "pt"})
    [template] = agents.glob("*.jinja")
    template.write_text(template.read_text() + " ")
    assert "another configuration: model (there" in error_of(evaluate, *flags, *answer)
    assert contents(tmp_path / "r", "*") == before


def test_a_second_writer_is_refused_and_a_reader_beside_a_writer_is_harmless(copied_run):
    run = ["--run", copied_run]
    trees = copied_run / "rollouts" / "trees.jsonl"
    with open_to_append(trees) as file, open_to_append(copied_run / "eval" / "greedy.jsonl"):
        file.write(b'{"id": "half a')
        file.flush()
        in_use = "another process is writing this file"
        assert in_use in error_of(generate_rollouts, *run, *ROLLOUTS)
        assert in_use in error_of(generate_rollouts, *run, *ROLLOUTS, "--overwrite")
        assert in_use in error_of(evaluate, *run, *EVALUATE)
        assert "is finished already" in output_of(train_value, *run, *VALUE)
        assert "vote-3" in output_of(evaluate, "--compare", copied_run, copied_run)
        file.write(b' tree"}\n')
    assert read_lines(trees)[-1] == {"id": "half a tree"}


def test_training_is_not_resumed_by_another_number_of_processes(copied_run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = error_of(train_value, "--run", copied_run, *VALUE)
    assert "processes (there 1, now 2)" in error


def test_torn_files_are_named(copied_run):
    run = copied_run
    trees = run / "rollouts" / "trees.jsonl"
    lines = trees.read_text().splitlines()
    lines[1] = lines[1][:50]
    trees.write_text("\n".join(lines) + "\n")
    error = error_of(train_value, "--run", run, *VALUE)
    assert "trees.jsonl, line 2: not JSON" in error

    (run / "rollouts" / "config.json").write_text('{"sett')
    error = error_of(generate_rollouts, "--run", run, *ROLLOUTS)
    assert "config.json: not JSON" in error

    (run / "value" / "head.safetensors").unlink()
    error = error_of(search, "--run", run, "--method", "best_of-2-value")
    assert "head.safetensors is missing" in error


def test_a_test_question_that_was_trained_on_is_refused(finished, tmp_path):
    trees = read_lines(finished.run / "rollouts" / "trees.jsonl")
    question = trees[0]["question"].upper() + " "
    problem = {"id": "mine", "question": question, "answer": "3"}
    data = tmp_path / "leak.jsonl"
    data.write_text(json.dumps(problem) + "\n")
    flags = ["--value", finished.run / "value", "--data", data, "--methods", "best_of-2-value"]
    error = error_of(evaluate, "--run", tmp_path, *flags)
    assert "test problem mine has the question of" in error


def test_answers_by_another_value_model_are_not_mixed_in(finished):
    other_value = finished.run / "other"  # beside V, as its backbone is found from there
    shutil.copytree(finished.run / "orm", other_value)
    config = (other_value / "config.json").read_text()
    changed = config.replace('"target": "outcome"', '"target": "search"')
    assert changed != config
    (other_value / "config.json").write_text(changed)
    try:
        error = error_of(evaluate, "--run", finished.run, *EVALUATE, "--value", other_value)
    finally:
        shutil.rmtree(other_value)
    assert "made with the scorer value#" in error
