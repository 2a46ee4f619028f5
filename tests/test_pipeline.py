"""Tests of the scripts in order, on the tiny agents: what they leave, after kills, on bad input."""

import json
import math
import resource
import shutil
from functools import partial

import pytest
from conftest import error_of, exit_code_of, kill_when, output_of, read_lines, start_in_fork
from safetensors.torch import load_file, save_file

import evaluate
import generate_rollouts
import search
import train_agents
import train_value
from support.records import read_records
from tasks.grading import extract_answer
from tasks.problems import EMBEDDED

ROLLOUTS = ["--num-train", 5, "--num-heldout", 2, "--num-simulations", 4]
ROLLOUTS += ["--num-candidates", 2, "--max-active", 4]
VALUE = ["--epochs", 1, "--lora-rank", 4]
CALLS = {  # method -> messages per problem, where its name says it
    "greedy": 4,
    "vote-3": 12,
    "best_of-3-value": 12,
    "sbs-2x1.2.1.1-policy": None,
    "mcts-3x1.3.1.1-value": None,
}
EVALUATE = ["--num-problems", 3, "--methods", *CALLS]

VOLATILE = ("seconds", "cost", "logprob")  # of the clock, or of rounding
VOLATILE_BY_V = (*VOLATILE, "V", "W", "value")


def records_of(run, name, volatile=()) -> list[dict]:
    """Return the records of a stage, without `volatile` entries at any depth."""

    def without_volatile(entry):
        if isinstance(entry, dict):
            return {key: without_volatile(entry[key]) for key in entry if key not in volatile}
        return [without_volatile(e) for e in entry] if isinstance(entry, list) else entry

    return without_volatile(list(read_records(run / f"{name}.jsonl").values()))


def contents(folder) -> dict:
    """Return the bytes of every file in a folder and the folders in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- The stages in order -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with stages 1 to 4 finished. Tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "r"
    output_of(generate_rollouts, "--run", run, *ROLLOUTS)
    output_of(train_value, "--run", run, *VALUE)
    output_of(train_value, "--run", run, *VALUE, "--target", "outcome")
    output_of(evaluate, "--run", run, *EVALUATE)
    return run


RECORD_KEYS = {"id", "question", "gold", "answer", "correct", "agent_calls", "prompt_tokens"}
RECORD_KEYS |= {"generated_tokens", "scored_tokens", "seconds"}


def test_the_stages_run_in_order_and_their_records_hold_answer_and_cost(finished):
    table = (finished / "eval" / "table.md").read_text()
    for name, calls in CALLS.items():
        records = records_of(finished, f"eval/{name}")
        assert len(records) == 3
        for record in records:
            assert record.keys() >= RECORD_KEYS
            assert record["correct"] == (record["answer"] == record["gold"])
            last_message = record["transcript"][-1]["message"]
            assert extract_answer(last_message, "number").value == record["answer"]
            assert len(record["transcript"]) == 4
            assert record["prompt_tokens"] > 0 and record["generated_tokens"] > 0
            assert (record["scored_tokens"] > 0) == ("value" in name)
            assert calls in (None, record["agent_calls"])
        row, *_ = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
        assert f"{100 * sum(record['correct'] for record in records) / 3:.1f}" in row
    for file in ("rollouts/config.json", "value/metrics.jsonl", "value/head.safetensors"):
        assert (finished / file).stat().st_size > 0
    # Methods share messages, and each is charged what it would have cost alone.
    for cost in ("agent_calls", "prompt_tokens", "generated_tokens"):
        vote = records_of(finished, "eval/vote-3")
        best_of = records_of(finished, "eval/best_of-3-value")
        assert [record[cost] for record in vote] == [record[cost] for record in best_of]


def test_running_again_changes_no_record_and_more_methods_or_problems_add(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "copy")
    before = contents(run)
    output_of(generate_rollouts, "--run", run, *ROLLOUTS)
    output_of(train_value, "--run", run, *VALUE)
    output_of(evaluate, "--run", run, *EVALUATE)
    after = contents(run)
    for path in before:
        if path.suffix in (".jsonl", ".safetensors") or path.name == "config.json":
            assert after[path] == before[path], path

    more = ["--num-problems", 4, "--methods", "greedy", "mcts-2x2-value-lam0.5"]
    output_of(evaluate, "--run", run, *more)
    assert len(records_of(run, "eval/greedy")) == 4
    for record in records_of(run, "eval/mcts-2x2-value-lam0.5"):
        assert any("orm" in node for node in record["tree"]["nodes"])
        assert "orm#" in record["scorer"] and "value#" in record["scorer"]


def test_a_graph_with_a_conditional_agent_runs_through_all_stages(tmp_path):
    """Transcripts have four messages, and a fifth if the Verifier objects."""
    graph = ["--run", tmp_path, "--graph", "refine"]
    rollouts = ["--num-train", 4, "--num-heldout", 1, "--num-simulations", 6]
    output_of(generate_rollouts, *graph, *rollouts, "--num-candidates", "1.3.1.1.2")
    last_agents = set()
    for record in records_of(tmp_path, "rollouts/trees"):
        for node in record["nodes"]:
            if node.get("agent") == "Verifier":
                assert ("reward" in node) == ("check fails" not in node["message"])
            if "reward" in node:
                last_agents.add(node["agent"])
    assert last_agents == {"Verifier", "Refiner"}

    output_of(train_value, "--run", tmp_path, *VALUE, "--view", "local")
    methods = ["vote-2", "sbs-2x1.3.1.1.2-value", "mcts-4x1.3.1.1.2-value"]
    output_of(evaluate, *graph, "--num-problems", 2, "--methods", *methods)
    for name in methods:
        for record in records_of(tmp_path, f"eval/{name}"):
            speakers = [turn["agent"] for turn in record["transcript"]]
            objects = "check fails" in record["transcript"][3]["message"]
            expected = ["Reader", "Planner", "Solver", "Verifier", *["Refiner"] * objects]
            assert speakers == expected
    # This V does not fit the default graph.
    assert "--graph" in error_of(search, "--run", tmp_path, "--method", "mcts-3-value")


# ---- Kills ---------------------------------------------------------------------------------------


def test_rollouts_killed_at_three_moments_lose_no_message_and_give_the_same_trees(
    finished, tmp_path
):
    """Most trees finish together at the end: what is not lost is in the journal."""
    flags = [*ROLLOUTS, "--max-active", 512]
    for num in (5, 25, 60):
        num_kept = kill_when(tmp_path, "messages/*.jsonl", num, generate_rollouts, *flags)
    printed = output_of(generate_rollouts, "--run", tmp_path, *flags)
    trees = records_of(finished, "rollouts/trees", VOLATILE)
    assert records_of(tmp_path, "rollouts/trees", VOLATILE) == trees

    num_needed = 0
    for tree in records_of(finished, "rollouts/trees"):
        num_needed += tree["cost"]["agent_calls"]
    assert num_kept >= 60
    assert f"{num_needed - num_kept} messages generated" in printed
    [journal] = (tmp_path / "messages").glob("*.jsonl")
    assert len(read_lines(journal)) == num_needed


def test_an_evaluation_killed_and_resumed_equals_the_uninterrupted_one(finished, tmp_path):
    flags = ["--value", finished / "value", *EVALUATE, "--max-active", 2]
    for num in (3, 11):
        kill_when(tmp_path, "eval/*.jsonl", num, evaluate, *flags)
    output_of(evaluate, "--run", tmp_path, *flags)
    for name in CALLS:
        expected = records_of(finished, f"eval/{name}", VOLATILE_BY_V)
        assert records_of(tmp_path, f"eval/{name}", VOLATILE_BY_V) == expected


# ---- One bad item does not stop the rest, one bad file is one line -------------------------------


def test_a_problem_that_is_too_long_is_refused_in_every_stage_and_the_others_go_on(
    tmp_path, copied_agents
):
    """Four are too long for the agents, and the last states of some others for V."""
    config, run = copied_agents / "config.json", tmp_path / "run"
    config.write_text(config.read_text().replace("1024", "270"))
    rows = read_lines(EMBEDDED["tiny"])[4:18]
    for row in (rows[0], rows[1], rows[8], rows[9]):
        row["question"] *= 9
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    agents = ["--run", run, "--model", copied_agents, "--data"]

    flags = [*agents, tmp_path / "train", "--num-train", 8, "--num-heldout", 2]
    printed = output_of(generate_rollouts, *flags, "--num-simulations", 3, "--num-candidates", 2)
    trees = records_of(run, "rollouts/trees")
    unlabelled = {tree["id"] for tree in trees if len(tree["nodes"]) == 1}
    assert unlabelled == {rows[0]["id"], rows[1]["id"]} and "2 problems were refused" in printed
    printed = output_of(train_value, "--run", run, "--backbone", copied_agents, *VALUE)
    assert "states are too long" in printed

    methods = ["greedy", "best_of-2-value"]
    output_of(evaluate, *agents, tmp_path / "test", "--num-problems", 6, "--methods", *methods)
    refused = {}
    for method in methods:
        records = records_of(run, f"eval/{method}")
        refused[method] = {record["id"] for record in records if record["rung"] == "refused"}
        assert len(records) == 6
        assert not any(record["correct"] for record in records if record["rung"] == "refused")
    assert refused["greedy"] == {rows[8]["id"], rows[9]["id"]} < refused["best_of-2-value"]
    assert "refused 2" in (run / "eval" / "table.md").read_text()

    args = train_agents.parse_args([*map(str, flags), "--device", "cpu"])
    learner = train_agents.Learner(args)
    rollouts = learner.sample(learner.problems, (1, 1, 1, 1), name="step 1")
    assert {problem.id for problem in rollouts.values()} < {row["id"] for row in rows[2:8]}


DAMAGED = [  # file of a run, what it holds (None: it is missing), script and flags
    ("rollouts/config.json", "{", train_value, []),
    ("rollouts/trees.jsonl", '{"id": "p"}\n', generate_rollouts, ROLLOUTS),
    ("value/config.json", '{"architectures": []}', search, []),
    ("value/metrics.jsonl", "", train_value, VALUE),
    ("value/head.safetensors", "version https://git-lfs", search, []),
    ("value/head.safetensors", None, search, []),
    ("value/adapter/adapter_config.json", "{}", search, []),
    ("value/problems.jsonl", None, evaluate, EVALUATE),
    ("eval/greedy.jsonl", '{"question": "?"}\n', evaluate, EVALUATE),
]


@pytest.mark.parametrize("file, content, module, flags", DAMAGED)
def test_a_damaged_file_of_a_run_is_one_line_that_names_it(
    finished, tmp_path, file, content, module, flags
):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    error = error_of(module, "--run", run, *flags)
    assert str(run / file) in error or f"{run}/value: the saved V" in error


@pytest.mark.parametrize("num_bytes", [0, 5_000, 30_000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(finished, tmp_path, num_bytes):
    """A process may write so much into each file: no config.json, few messages, no checkpoint."""
    shutil.copytree(finished / "rollouts", tmp_path / "rollouts")
    module, argv = train_value, ["--run", tmp_path, *VALUE]
    if num_bytes < 30_000:
        module, argv = generate_rollouts, ["--run", tmp_path / "new", *ROLLOUTS]

    def script():
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        error = error_of(module, *argv)
        assert "File too large" in error or "is the disk full?" in error

    assert exit_code_of(start_in_fork(script)) == 0
    output_of(module, *argv)


# ---- Bad input -----------------------------------------------------------------------------------

BAD_FLAGS = [  # script, flags, and what the line names
    (generate_rollouts, "--graph star", "star"),
    (generate_rollouts, "--task chess", "chess"),
    (generate_rollouts, "--model no/such/model", "no/such/model"),
    (train_value, "", "rollouts"),
    (search, "--index 99999999", "178"),
    (evaluate, "--methods mcts-3-value", "value"),
    (train_agents, "--reward value", "value"),
]


@pytest.mark.parametrize("module, flags, culprit", BAD_FLAGS)
def test_bad_flags_are_one_line_that_names_the_culprit(tmp_path, module, flags, culprit):
    assert culprit in error_of(module, "--run", tmp_path, *flags.split())


NO_NUMBERS = [  # script, flags, the file that gets a weight that is NaN, and what the line names
    (generate_rollouts, "--model {}", "model.safetensors", "--model"),
    (train_value, "--rollouts {}/r/rollouts --backbone {}", "model.safetensors", "--backbone"),
    (train_value, "--rollouts {}/r/rollouts --lr 1e30 --loss dist", None, "gradient"),
    (search, "--value {}/r/value", "r/value/head.safetensors", "r/value"),
]


@pytest.mark.parametrize("module, flags, file, culprit", NO_NUMBERS)
def test_numbers_that_are_not_finite_end_a_run(
    finished, copied_agents, module, flags, file, culprit
):
    """Else agents would say nothing, and V would be NaN, for as long as the run takes."""
    shutil.copytree(finished, copied_agents / "r")
    if file is not None:
        weights = load_file(copied_agents / file)
        weights[max(weights)].view(-1)[0] = math.nan  # of the final norm, or of the head
        save_file(weights, copied_agents / file, metadata={"format": "pt"})
    flags = flags.replace("{}", str(copied_agents)).split()
    assert culprit in error_of(module, "--run", copied_agents / "run", *flags)


def test_another_configuration_is_refused_and_nothing_is_lost(finished, copied_agents):
    """Another chat template is another model, whatever the folder is called."""
    run = ["--run", finished]
    before = contents(finished)
    rollouts = partial(error_of, generate_rollouts, *run, *ROLLOUTS)
    assert "seed (there 0, now 1)" in rollouts("--seed", 1)
    assert "c_uct (there 1.0, now 2.0), num_simulations (there 4, now 7)" in rollouts(
        "--num-simulations", 7, "--c-uct", 2
    )
    assert "graph (there chain" in rollouts("--graph", "single")
    [template] = copied_agents.glob("*.jinja")
    template.write_text(template.read_text() + " ")
    assert "model (there" in rollouts("--model", copied_agents)
    assert "lora_rank (there 4, now 8)" in error_of(train_value, *run, *VALUE, "--lora-rank", 8)
    evaluation = partial(error_of, evaluate, *run, *EVALUATE)
    assert "temperature (there 1.0, now 0.5)" in evaluation("--temperature", 0.5)
    assert "c_uct (there 1.0, now 2.0)" in evaluation("--c-uct", 2)
    assert "model (there" in evaluation("--model", copied_agents)
    assert contents(finished) == before
