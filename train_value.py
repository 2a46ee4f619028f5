"""Stage 2: train V (the process reward model) on search labels, or an outcome model (ORM).

V(s) = tanh(w.h + b) is a causal language model with QLoRA and a scalar head (value.py). The loss
is Huber between V(next(s, a)) and y = Q(s, a), in tanh space (paper section 4.2). Paper:
Qwen2.5-1.5B, rank 256, 5 epochs.

    python train_value.py                     # runs/tiny/rollouts -> runs/tiny/value
    python train_value.py --target outcome    # an ORM -> runs/tiny/orm: terminal states, +1 or -1
    python train_value.py --no-quantize       # LoRA on full-precision weights, no bitsandbytes
    python train_value.py --loss rank         # not in the paper: mse, rank, dist
    python train_value.py --label-weights visits    # not in the paper: weights N(s, a)
    accelerate launch --num_processes 2 train_value.py    # data-parallel

One forward over a root-to-leaf path gives V of every state on it. Training rows are therefore
paths, and each edge of the tree is labelled in exactly one of them.
"""

import argparse
import datetime
import math
import os
import random
import resource
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn
from tqdm import tqdm

from llm.adapters import add_lora
from llm.loading import resolve_dtype
from llm.packing import (
    Batch,
    PackedRow,
    cut_into_batches,
    num_distinct_tokens,
    pack,
    sequences_of,
    width_of,
)
from mas import MAS, State
from report.diagnosis import value_signatures, with_warnings
from report.tables import value_table
from support.flags import (
    HERE,
    InputError,
    Parser,
    add_overwrite_argument,
    add_run_arguments,
    cli,
    positive_float,
    positive_int,
)
from support.progress import Progress, ignore
from support.records import (
    append_jsonl,
    device_of_this_process,
    open_to_append,
    process_rank,
    read_finished_lines,
    read_jsonl,
    read_records,
    write_line,
)
from support.runs import fingerprint, open_run, read_config, seeded, write_config
from support.statistics import value_metrics
from tasks.problems import question_key
from tree import Edge, tree_paths
from value import (
    Row,
    ValueModel,
    backbone_setting,
    label_places,
    load_backbone,
    rendering_fingerprint,
)

# ---- Batches -------------------------------------------------------------------------------------

PackedTree = list[PackedRow]  # all transcripts of a tree, in which shared prefixes are read once
Step = list[Batch]  # one for each process; the last step of an epoch can have fewer


def make_rows(paths: list[list[Edge]], model: ValueModel) -> list[Row]:
    """Encode paths: one row per path in the full view, one row per edge in the local view.

    In the local view a state's text is not a prefix of its children's, so a path is not one row.
    """
    rows = []
    for path in paths:
        if path and model.view == "full":
            ids, ends = model.encode(path[-1].state)
            # Segment 0 is the question, segment i the i-th message.
            positions = [ends[len(edge.state.messages)] for edge in path]
            rows.append(_make_row(path, ids, positions))
        elif model.view == "local":
            for edge in path:
                ids, ends = model.encode(edge.state)
                rows.append(_make_row([edge], ids, [ends[-1]]))
    return rows


def _make_row(edges: list[Edge], ids: list[int], positions: list[int]) -> Row:
    return Row(
        ids,
        positions,
        targets=[edge.y for edge in edges],
        groups=[(edge.problem_id, edge.agent) for edge in edges],
        visits=[edge.visits for edge in edges],
        weights=[1.0] * len(edges),
    )


def training_rows(paths: list[list[Edge]], model: ValueModel, label_weights: str) -> list[Row]:
    """Return the rows to train on, with the weights of their labels: "equal" or "visits".

    Raises InputError for weights of the `rank` loss, which compares pairs of labels.
    """
    rows = make_rows(paths, model)
    if label_weights == "equal":
        return rows
    if model.loss == "rank":
        raise InputError("--label-weights visits: --loss rank compares pairs, give another --loss")
    return weigh_by_visits(rows)


def weigh_by_visits(rows: list[Row]) -> list[Row]:
    """Return the rows with the weight of each label proportional to N(s, a), with mean 1.

    Not in the paper, where all labels count the same. y is a mean of N(s, a) rewards, and most
    labels are of a single one. But the search returns to right answers, so N grows with y, and
    these weights raise V everywhere (RESULTS.md, section 12).
    """
    num_labels = sum(len(row.visits) for row in rows)
    mean_visits = sum(sum(row.visits) for row in rows) / num_labels
    weighted = []
    for row in rows:
        weights = [visits / mean_visits for visits in row.visits]
        weighted.append(replace(row, weights=weights))
    return weighted


def pack_trees(rows: list[Row], batch_tokens: int, *, token_cost: float | None) -> list[PackedTree]:
    """Pack the transcripts of each tree (see `pack`).

    A row takes half a batch at most, so that a batch holds more than one tree.
    """
    indices_of_tree = defaultdict(list)
    for index, row in enumerate(rows):
        problem_id, _ = row.groups[0]
        indices_of_tree[problem_id].append(index)
    sequences = [row.ids for row in rows]
    trees = []
    for indices in indices_of_tree.values():
        trees.append(
            pack(sequences, token_cost=token_cost, max_width=batch_tokens // 2, indices=indices)
        )
    return trees


POOL = 64  # packed rows that are sorted by width together


def epoch_batches(
    trees: list[PackedTree], batch_tokens: int, rng: random.Random, *, whole_trees: bool
) -> list[Batch]:
    """Return the batches of one epoch, in random order.

    Packed rows are shuffled, sorted by width within pools to reduce padding, cut into batches, and
    the batches are shuffled. So a batch holds parts of several trees.

    Args:
        whole_trees: keep the rows of a tree in one batch instead, because the `rank` loss compares
            them. Only a tree that is larger than a batch is cut.
    """
    if whole_trees:
        batches = whole_tree_batches(rng.sample(trees, len(trees)), batch_tokens)
    else:
        packed = [row for tree in trees for row in tree]
        shuffled = rng.sample(packed, len(packed))
        by_width = []
        for start in range(0, len(shuffled), POOL):
            by_width += sorted(shuffled[start : start + POOL], key=width_of)
        batches = cut_into_batches(by_width, batch_tokens)
    rng.shuffle(batches)
    return batches


def whole_tree_batches(trees: list[PackedTree], batch_tokens: int) -> list[Batch]:
    """Return batches of whole trees in this order, each as large as `batch_tokens` allows."""
    # 1. Put trees together while they fit.
    together: list[Batch] = [[]]
    for tree in trees:
        joined = together[-1] + tree
        if size_of(joined) <= batch_tokens:
            together[-1] = joined
        else:
            together.append(tree)

    # 2. Cut a tree that does not fit alone.
    batches = []
    for batch in together:
        batches += cut_into_batches(batch, batch_tokens)
    return batches


def size_of(batch: Batch) -> int:
    """Return the padded size of a batch: packed rows x columns of the widest."""
    return len(batch) * max(map(width_of, batch))


# ---- The training loop ---------------------------------------------------------------------------


def learning_rate_factor(step: int, total_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0.

    Linear warm-up over the first 5 % of the steps, then cosine decay to 0.
    """
    warmup_steps = total_steps // 20
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2


def training_loss(
    model: ValueModel,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    groups: list[tuple[str, str]],
    *,
    huber_delta: float,
) -> torch.Tensor:
    """Return the weighted sum of the losses of the labels in a batch; for `rank`, of the pairs.

    It is a sum, because a mean would make a label count more in a smaller batch. With e = V - y, in
    tanh space (section 4.2), the Huber loss of a label is

        e^2 / 2 if |e| <= delta, else delta * (|e| - delta / 2).

    Args:
        outputs: [n, outputs of the head].
        targets: y, [n].
        weights: [n], unused by `rank`.
        groups: (problem, agent) per label, for the `rank` loss.
    """
    if model.loss == "rank":
        return ranking_loss(outputs[:, 0], targets, groups)
    if model.loss == "huber":
        values = model.value(outputs)
        losses = nn.functional.huber_loss(values, targets, delta=huber_delta, reduction="none")
    elif model.loss == "mse":
        losses = (model.value(outputs) - targets) ** 2
    else:
        losses = distributional_losses(outputs, targets)
    return (weights * losses).sum()


def distributional_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy over bins per label, [n].

    y is split between its two nearest bins, so that their mean is y.
    """
    num_bins = outputs.shape[-1]
    fractional_bin = (targets + 1) / 2 * (num_bins - 1)
    lower_bin = fractional_bin.floor().long().clamp(max=num_bins - 2)
    upper_weight = fractional_bin - lower_bin
    logprobs = outputs.log_softmax(-1)
    lower_logprob = logprobs.gather(1, lower_bin[:, None])[:, 0]
    upper_logprob = logprobs.gather(1, lower_bin[:, None] + 1)[:, 0]
    return -((1 - upper_weight) * lower_logprob + upper_weight * upper_logprob)


def ranking_loss(
    logits: torch.Tensor, targets: torch.Tensor, groups: list[tuple[str, str]]
) -> torch.Tensor:
    """Bradley-Terry: the sum over pairs of -log sigmoid(difference of w.h + b).

    Every pair counts the same, as in the likelihood of all comparisons.
    """
    better, worse = comparable_pairs(targets, groups)
    return nn.functional.softplus(logits[worse] - logits[better]).sum()


def comparable_pairs(
    targets: torch.Tensor, groups: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices (better, worse) of all pairs with different y in one group.

    A group is the states of one agent in one tree. Siblings are among its pairs; siblings alone
    would leave out an agent whose candidates are always equally good.
    """
    index_of_group = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    group_ids = torch.tensor([index_of_group[group] for group in groups], device=targets.device)
    same_group = group_ids[:, None] == group_ids
    is_better = targets[:, None] > targets
    better, worse = (same_group & is_better).nonzero(as_tuple=True)
    return better, worse


def num_terms(rows: list[Row], loss: str) -> int:
    """Return how many terms the loss of these rows sums: labels, or pairs for `rank`."""
    targets, groups = [], []
    for row in rows:
        targets += row.targets
        groups += row.groups
    if loss != "rank":
        return len(targets)
    better, _ = comparable_pairs(torch.tensor(targets), groups)
    return len(better)


def train(
    model: ValueModel,
    rows: list[Row],
    packed_trees: list[PackedTree],
    *,
    epochs: int,
    lr: float,
    batch_tokens: int,
    huber_delta: float,
    seed: int,
    checkpoint: Path,
    after_epoch: Callable[[int, float], None],
) -> None:
    """Train with AdamW, warm-up and cosine decay. Every label counts once per epoch.

    The weight of a label does not depend on its batch, apart from gradient clipping.
    For the `rank` loss this holds for pairs.

    With several processes, each takes one batch of every step. The order of an epoch is a function
    of (seed, epoch), so a run that was killed resumes after its last whole epoch.

    Args:
        packed_trees: the rows, see `pack_trees`.
        lr: peak learning rate, see `learning_rate_factor`.
        batch_tokens: padded size of a batch of packed rows, see `token_batches`.
        checkpoint: file that is written after every epoch.
        after_epoch: called on the first process with the epoch and the mean training loss of that
            process's batches.

    Raises InputError if the `rank` loss has nothing to compare.
    """
    rank, world_size = process_rank()

    # 1. Schedule: the batches of every step of every epoch.
    schedule = []
    for epoch in range(epochs):
        rng = seeded(seed, "epoch", epoch)
        batches = epoch_batches(packed_trees, batch_tokens, rng, whole_trees=model.loss == "rank")
        starts = range(0, len(batches), world_size)
        schedule.append([batches[start : start + world_size] for start in starts])
    total_steps = sum(map(len, schedule))

    # 2. Optimizer and learning rate, as they were when the last epoch ended.
    trained = model.trained_parameters()
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(learning_rate_factor, total_steps=total_steps)
    )
    first_epoch = 0
    if checkpoint.is_file():
        first_epoch = load_checkpoint(checkpoint, model, optimizer, scheduler) + 1
        print(f"resuming after epoch {first_epoch}")

    # 3. Compute the gradients of the largest batch, for nothing: memory runs out now or never.
    model.train()
    batches = [batch for steps in schedule for step in steps for batch in step]
    largest = max(batches, key=size_of)
    training_step(model, rows, [largest] * world_size, 1.0, huber_delta=huber_delta)
    optimizer.zero_grad()

    # 4. Train epoch by epoch.
    for epoch in range(first_epoch, epochs):
        model.train()
        terms_per_step = mean_terms_per_step(rows, schedule[epoch], model.loss)
        epoch_loss, epoch_terms = 0.0, 0
        description = f"epoch {epoch + 1}/{epochs}"
        progress = Progress(len(schedule[epoch]), description=description, shown=rank == 0)
        with progress:
            for batches in schedule[epoch]:
                loss, terms = training_step(
                    model, rows, batches, terms_per_step, huber_delta=huber_delta
                )
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                epoch_loss += loss
                epoch_terms += terms
                progress.advance(1, f"loss {loss / max(1, terms):.3f}")
        if rank == 0:
            after_epoch(epoch, epoch_loss / max(1, epoch_terms))
            save_checkpoint(checkpoint, epoch, model, optimizer, scheduler)


def mean_terms_per_step(rows: list[Row], steps: list[Step], loss: str) -> float:
    """Return how many terms a step of an epoch has on average (see `num_terms`).

    The summed loss of every step is divided by this constant, not by the step's own number.
    Raises InputError if there is no term at all.
    """
    total = 0
    for batches in steps:
        for batch in batches:
            total += num_terms([rows[index] for index in sequences_of(batch)], loss)
    if total == 0:
        raise InputError(
            "--loss rank: no two states of one agent in one tree have different labels; "
            "label more problems, or take another --loss"
        )
    return total / len(steps)


def training_step(
    model: ValueModel,
    rows: list[Row],
    batches: Step,
    terms_per_step: float,
    *,
    huber_delta: float,
) -> tuple[float, int]:
    """Compute the gradients of one step, each of whose batches belongs to one process.

    terms_per_step: see `mean_terms_per_step`.

    Returns the summed loss of this process's batch, and its number of terms.
    """
    rank, world_size = process_rank()
    loss = torch.zeros(())
    terms = 0
    # The last step of an epoch may have fewer batches than there are processes.
    if rank < len(batches):
        batch = batches[rank]
        batch_rows = [rows[index] for index in sequences_of(batch)]
        targets, weights, groups = [], [], []
        for row in batch_rows:
            targets += row.targets
            weights += row.weights
            groups += row.groups
        outputs = model.outputs(batch, label_places(batch, rows))
        targets = torch.tensor(targets, device=outputs.device)
        weights = torch.tensor(weights, device=outputs.device)
        loss = training_loss(model, outputs, targets, weights, groups, huber_delta=huber_delta)
        (loss / terms_per_step).backward()
        terms = num_terms(batch_rows, model.loss)
    if world_size > 1:
        sum_gradients(model.trained_parameters())
    return loss.item(), terms


def sum_gradients(trained: dict[str, nn.Parameter]) -> None:
    """Sum the gradients of all processes. LoRA and head are small enough for one all-reduce."""
    gradients = []
    for parameter in trained.values():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(gradient.flatten())
    flat = torch.cat(gradients)
    torch.distributed.all_reduce(flat)
    sizes = [parameter.numel() for parameter in trained.values()]
    for parameter, gradient in zip(trained.values(), flat.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def save_checkpoint(path: Path, epoch: int, model: ValueModel, optimizer, scheduler) -> None:
    trained = {}
    for name, parameter in model.trained_parameters().items():
        trained[name] = parameter.detach().clone()
    state = {
        "epoch": epoch,
        "trained": trained,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    write_checkpoint(path, state)


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically: a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: ValueModel, optimizer, scheduler) -> int:
    """Load a checkpoint into model, optimizer and scheduler. Returns its epoch."""
    state = torch.load(path, map_location=model.backbone.device, weights_only=True)
    for name, parameter in model.trained_parameters().items():
        parameter.data.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["epoch"]


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_run_arguments(parser)
    # labels
    parser.add_argument(
        "--rollouts", default=None, help="folder of the labels (default: RUN/rollouts)"
    )
    parser.add_argument(
        "--heldout-rollouts",
        default=None,
        help="folder of the held-out labels, to measure several V on the same ones "
        "(default: as --rollouts)",
    )
    parser.add_argument(
        "--target",
        choices=("search", "outcome"),
        default="search",
        help="search: V on every visited edge; outcome: an ORM on terminal states",
    )
    # the value model
    parser.add_argument(
        "--backbone",
        default=os.path.relpath(HERE / "tiny" / "agents"),
        help="causal language model: folder or hub name (paper: Qwen2.5-1.5B)",
    )
    parser.add_argument(
        "--view",
        choices=("full", "local"),
        default="full",
        help="what V reads: the whole transcript, or what the speaker saw and said",
    )
    parser.add_argument(
        "--quantize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="QLoRA, with NF4 weights under the adapter (default), or LoRA on full-precision ones",
    )
    # training
    add_lora_training_arguments(parser)
    parser.add_argument(
        "--lr",
        type=positive_float,
        default=1e-3,
        help="peak learning rate; suits the tiny model, give 1e-4 or so for a real one",
    )
    parser.add_argument("--epochs", type=positive_int, default=2, help="paper: 5")
    parser.add_argument(
        "--loss",
        choices=("huber", "mse", "rank", "dist"),
        default="huber",
        help="huber (paper), squared error, Bradley-Terry ranking, or a distribution over bins",
    )
    parser.add_argument(
        "--label-weights",
        choices=("equal", "visits"),
        default="equal",
        help="equal (paper), or proportional to N(s, a): see weigh_by_visits",
    )
    parser.add_argument(
        "--huber-delta",
        type=positive_float,
        default=1.0,
        help="error at which the Huber loss becomes linear",
    )
    add_overwrite_argument(parser)
    return parser.parse_args(argv)


def add_lora_training_arguments(parser: Parser) -> None:
    """Add the flags of the scripts that train an adapter."""
    parser.add_argument(
        "--lora-rank", type=positive_int, default=16, help="rank of an adapter (paper, for V: 256)"
    )
    parser.add_argument(
        "--train-batch-tokens",
        type=positive_int,
        default=2048,
        help="size of one training batch: packed rows x tokens of the longest",
    )


def main(args) -> None:
    # 1. Load the labels.
    torch.set_num_threads(args.num_threads)
    labels = load_labels(args)

    # 2. Start the run folder, or resume it.
    rank, world_size = process_rank()
    device = device_of_this_process(args.device)
    folder = Path(args.run) / ("value" if args.target == "search" else "orm")
    checkpoint = folder / "checkpoint.pt"
    model = make_value_model(args, labels.mas, device)
    settings = value_settings(args, labels, model, folder)
    open_run(folder, settings, device=args.device, overwrite=args.overwrite)
    if read_config(folder).get("finished"):
        print(f"{folder} is finished already (--overwrite trains it again)")
        report_last_epoch(folder)
        return
    log = open_to_append(folder / "metrics.jsonl") if rank == 0 else None

    # 3. Build the training rows.
    if world_size > 1:
        start_data_parallel(device)
    rows = training_rows(labels.paths["train"], model, args.label_weights)
    packed_trees = pack_trees(rows, args.train_batch_tokens, token_cost=model.token_cost)
    heldout_rows = make_rows(labels.paths["heldout"], model)
    heldout_edges = [edge for path in labels.paths["heldout"] for edge in path]
    if rank == 0:
        print(describe_training(model, rows, packed_trees, labels, heldout_edges))

    # 4. Train, and measure V on held-out problems after each epoch.
    def after_epoch(epoch: int, train_loss: float) -> None:
        values = heldout_values(model, heldout_rows, batch_tokens=args.batch_tokens)
        write_heldout(folder / "heldout.jsonl", heldout_edges, values)
        log_epoch(log, epoch, train_loss, value_metrics(heldout_edges, values))

    try:
        train(
            model,
            rows,
            packed_trees,
            epochs=args.epochs,
            lr=args.lr,
            batch_tokens=args.train_batch_tokens,
            huber_delta=args.huber_delta,
            seed=args.seed,
            checkpoint=checkpoint,
            after_epoch=after_epoch,
        )
    except torch.OutOfMemoryError:
        remedy = "lower --train-batch-tokens or --lora-rank, with --overwrite"
        raise InputError(f"out of memory; {remedy}") from None
    if world_size > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return

    # 5. Save, load again to compare, and report.
    print(f"peak memory: {peak_memory(device)}")
    with open(folder / "problems.jsonl", "wb") as file:
        save_problems(file, labels.records["train"] + labels.records["heldout"])
    model.save(folder)
    states = [edge.state for edge in heldout_edges[:64]]
    verify_saved(
        model,
        folder,
        states,
        device=device,
        dtype=args.dtype,
        batch_tokens=args.batch_tokens,
    )
    checkpoint.unlink()
    report_last_epoch(folder)


@dataclass
class Labels:
    """The labels of a run. All fields but `mas` have one entry per split, "train" and "heldout"."""

    mas: MAS
    settings: dict[str, dict]  # of the rollouts
    records: dict[str, list[dict]]
    paths: dict[str, list[list[Edge]]]


def load_labels(args) -> Labels:
    """Load the trees of both splits.

    Raises InputError if a split is empty, if the two were labelled with different graphs, or if
    they share a question.
    """
    train_folder = Path(args.rollouts or f"{args.run}/rollouts")
    heldout_folder = Path(args.heldout_rollouts or train_folder)
    folders = {"train": train_folder, "heldout": heldout_folder}

    # 1. The graph they were labelled with.
    settings = {split: read_config(folder)["settings"] for split, folder in folders.items()}
    if settings["train"]["graph"] != settings["heldout"]["graph"]:
        raise InputError(f"{heldout_folder} was labelled with another graph than {train_folder}")
    mas = MAS.from_dict(settings["train"]["graph"])

    # 2. The trees of each split.
    records = {}
    for split, folder in folders.items():
        trees = read_records(folder / "trees.jsonl").values()
        records[split] = [tree for tree in trees if tree["split"] == split]
    _refuse_shared_questions(records, heldout_folder)

    # 3. Their labelled edges.
    paths = {}
    for split, folder in folders.items():
        paths[split] = []
        for record in records[split]:
            paths[split] += tree_paths(record, mas, args.target)
        if not any(paths[split]):
            raise InputError(
                f"{folder / 'trees.jsonl'}: no {split} problems; "
                f"generate_rollouts.py --num-{split} N labels some"
            )
    return Labels(mas, settings, records, paths)


def _refuse_shared_questions(records: dict[str, list[dict]], heldout_folder: Path) -> None:
    """Raise InputError if a held-out problem has the question of a training problem."""
    trained_on = {question_key(record["question"]) for record in records["train"]}
    shared = []
    for record in records["heldout"]:
        if question_key(record["question"]) in trained_on:
            shared.append(record["id"])
    if shared:
        raise InputError(
            f"{heldout_folder}: {len(shared)} held-out problems have questions that V would be "
            f"trained on, for example {shared[0]}; label other ones"
        )


def value_settings(args, labels: Labels, model: ValueModel, folder: Path) -> dict:
    """Return the settings that determine the weights of V, recorded for resuming.

    folder: where V will be saved.
    """
    names = ("target", "view", "loss", "quantize", "lora_rank", "lr", "epochs")
    names += ("label_weights", "huber_delta", "train_batch_tokens", "seed")
    settings = {name: getattr(args, name) for name in names}
    settings["dtype"] = resolve_dtype(args.dtype, args.device)
    settings["backbone"] = backbone_setting(args.backbone, model.backbone, folder)
    settings["processes"] = process_rank()[1]  # each of them adds a batch to every step
    settings["graph"] = asdict(labels.mas)
    settings["rendering"] = rendering_fingerprint(labels.mas, args.view)
    settings["rollouts"] = labels.settings["train"]
    settings["heldout_rollouts"] = labels.settings["heldout"]
    settings["trees"] = trees_fingerprint(labels.records)
    return settings


def trees_fingerprint(records: dict[str, list[dict]]) -> str:
    """Fingerprint the trees of both splits, without their cost: equal trees take other seconds."""
    trees = []
    for split in sorted(records):
        for record in records[split]:
            trees.append({key: value for key, value in record.items() if key != "cost"})
    return fingerprint(trees)


def start_data_parallel(device: str) -> None:
    """Join the other processes. The first one measures and saves while they wait, so wait long."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))


def make_value_model(args, mas: MAS, device: str) -> ValueModel:
    """Build an untrained V: the backbone with LoRA on every linear layer, and a head."""
    backbone, tokenizer = load_backbone(
        args.backbone, quantize=args.quantize, device=device, dtype=args.dtype
    )
    torch.manual_seed(args.seed)  # the same LoRA on every process
    backbone = add_lora(backbone, rank=args.lora_rank)
    return ValueModel(backbone, tokenizer, mas, args.view, args.loss)


def describe_training(
    model: ValueModel,
    rows: list[Row],
    packed_trees: list[PackedTree],
    labels: Labels,
    heldout_edges: list[Edge],
) -> str:
    num_labels = sum(len(row.targets) for row in rows)
    packed = [row for tree in packed_trees for row in tree]
    num_tokens = sum(map(width_of, packed))
    repetition = num_tokens / num_distinct_tokens([row.ids for row in rows])
    num_trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    return (
        f"{num_labels} labelled states of {len(labels.records['train'])} problems "
        f"in {len(rows)} transcripts; {len(heldout_edges)} held-out states\n"
        f"{num_tokens:,} tokens in {len(packed)} packed rows an epoch "
        f"({repetition:.2f} times the distinct ones)\n"
        f"{num_trained:,} trained parameters"
    )


def heldout_values(model: ValueModel, rows: list[Row], *, batch_tokens: int) -> list[float]:
    """Return V of the labelled states of held-out problems, in the order of the rows."""
    values = []
    with Progress(len(rows), description="held-out") as progress:
        model.on_rows = progress.advance
        for row_values in model.predict(rows, batch_tokens=batch_tokens):
            values += row_values
        model.on_rows = ignore  # the bar ends here; V is asked again when it is verified
    return values


def write_heldout(path: Path, edges: list[Edge], values: list[float]) -> None:
    """Write V beside each held-out label, a line per labelled edge, in place of an older epoch's.

    The report of the run is made from it (report.py).
    """
    temporary = path.with_suffix(".part")
    with open(temporary, "wb") as file:
        for edge, value in zip(edges, values, strict=True):
            record = {
                "id": edge.problem_id,
                "node": edge.node,
                "parent": edge.parent,
                "agent": edge.agent,
                "y": edge.y,
                "N": edge.visits,
                "V": value,
            }
            append_jsonl(file, record)
    temporary.replace(path)


def log_epoch(log: BinaryIO, epoch: int, train_loss: float, report: dict[str, dict]) -> None:
    """Write the metrics of an epoch to metrics.jsonl, and print its held-out RMSE."""
    write_line(log, epoch, {"epoch": epoch, "train_loss": train_loss, "heldout": report})
    errors = ", ".join(f"{agent} {row['rmse']:.3f}" for agent, row in report.items())
    tqdm.write(f"epoch {epoch + 1}: training loss {train_loss:.4f}\n  held-out RMSE: {errors}")


def report_last_epoch(folder: Path) -> None:
    """Print how good V is on held-out labels, and the signatures of failure that it triggers."""
    last_epoch = read_jsonl(folder / "metrics.jsonl")[-1]
    heldout = read_finished_lines(folder / "heldout.jsonl")
    settings = read_config(folder)["settings"]
    signatures = value_signatures(last_epoch["train_loss"], heldout, settings)
    print(with_warnings(value_table(last_epoch["heldout"]), signatures))


def peak_memory(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB allocated on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.1f} GiB of the process"


def save_problems(file: BinaryIO, records: list[dict]) -> None:
    """Write which problems a model has seen, so that evaluate.py can refuse to test on them.

    records: each with the id, the split and the question of a problem.
    """
    for record in records:
        key = question_key(record["question"])
        append_jsonl(file, {"id": record["id"], "split": record["split"], "question_key": key})


def verify_saved(
    model: ValueModel,
    folder: Path,
    states: list[State],
    *,
    device: str,
    dtype: str,
    batch_tokens: int,
) -> None:
    """Load the saved model, compare its V with the trained one's, and mark the run as finished.

    Raises AssertionError if they differ: a head that was not saved must not go unnoticed.
    """
    loaded = ValueModel.load(folder, model.mas, device=device, dtype=dtype, must_be_finished=False)
    trained_values = model.score(states, batch_tokens=batch_tokens)
    loaded_values = loaded.score(states, batch_tokens=batch_tokens)
    differences = [abs(a - b) for a, b in zip(trained_values, loaded_values, strict=True)]
    worst = max(differences)
    print(
        f"saved to {folder}\n"
        f"loaded again, V differs by {worst:.1e} at most on {len(states)} held-out states"
    )
    if worst > 1e-4:
        raise AssertionError(f"the saved value model is not the trained one: V differs by {worst}")
    write_config(folder, read_config(folder) | {"finished": True})


if __name__ == "__main__":
    cli(parse_args, main)
