"""Stage 2: train V (the process reward model) on search labels, or an outcome model (ORM).

V(s) = tanh(w.h + b) is a causal language model with QLoRA and a scalar head (value.py). The loss
is Huber between V(next(s, a)) and y = Q(s, a), in tanh space (paper section 4.2). Paper:
Qwen2.5-1.5B, rank 256, 5 epochs.

    python train_value.py                     # runs/tiny/rollouts -> runs/tiny/value
    python train_value.py --target outcome    # an ORM -> runs/tiny/orm: terminal states, +1 or -1
    python train_value.py --no-quantize       # LoRA on full-precision weights, no bitsandbytes
    python train_value.py --loss rank         # not in the paper: mse, rank, dist

In the full view, one forward over a root-to-leaf path gives V of every state on it. V is therefore
trained on paths, and each edge of the tree is labelled in exactly one of them.
"""

import argparse
import math
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn

from llm.adapters import add_lora, add_lora_argument
from llm.loading import checkpoint_setting, resolve_dtype
from llm.packing import Batch, PackedRow, pack, sequence_columns, token_batches
from mas import MAS, State
from support.flags import TINY_AGENTS, InputError, cli, positive_float, positive_int, stage_parser
from support.progress import Progress
from support.records import (
    append_jsonl,
    errors_name,
    open_to_append,
    read_jsonl,
    read_records,
    write_line,
)
from support.runs import (
    fingerprint,
    open_run,
    peak_memory,
    read_config,
    seeded,
    write_checkpoint,
    write_config,
)
from support.statistics import value_metrics
from tasks.problems import question_key, save_problems
from tree import Edge, tree_paths
from value import Transcript, ValueModel, load_backbone, rendering_fingerprint

# ---- Transcripts and batches ---------------------------------------------------------------------


def make_transcripts(trees: list[dict], model: ValueModel, target: str) -> list[Transcript]:
    """Encode the labelled paths of trees: each path in the full view, each edge in the local view.

    In the local view a state's text is not a prefix of its children's. States that are too long for
    the backbone are left out and counted. Raises InputError if no state is left.
    """
    transcripts, too_long = [], []
    for path in chain.from_iterable(tree_paths(tree, model.mas, target) for tree in trees):
        too_long += [edge.problem_id for edge in path if not model.fits(edge.state)]
        path = [edge for edge in path if model.fits(edge.state)]
        if path and model.view == "full":
            ids, ends = model.encode(path[-1].state)
            # Segment 0 is the question, segment i the i-th message.
            positions = [ends[len(edge.state.messages)] for edge in path]
            transcripts.append(Transcript(ids, positions, path))
        elif model.view == "local":
            for edge in path:
                ids, ends = model.encode(edge.state)
                transcripts.append(Transcript(ids, ends[-1:], [edge]))
    if too_long:
        print(f"{len(too_long)} states are too long for the backbone, of {sorted(set(too_long))}")
    if not transcripts:
        raise InputError(
            "no labelled state is left; take a --backbone or agents with a longer context"
        )
    return transcripts


def edges_of(transcripts: list[Transcript]) -> list[Edge]:
    return list(chain.from_iterable(transcript.edges for transcript in transcripts))


def pack_trees(
    transcripts: list[Transcript], model: ValueModel, batch_tokens: int
) -> list[PackedRow]:
    """Pack the transcripts of each tree (see `pack`).

    A row takes half a batch at most, so that a batch holds more than one tree.
    """
    indices_of_tree = defaultdict(list)
    for index, transcript in enumerate(transcripts):
        indices_of_tree[transcript.edges[0].problem_id].append(index)
    sequences = [transcript.ids for transcript in transcripts]
    max_width = min(model.row_width, batch_tokens // 2)
    rows = []
    for indices in indices_of_tree.values():
        rows += pack(sequences, indices=indices, max_width=max_width)
    return rows


def epoch_batches(rows: list[PackedRow], batch_tokens: int, rng: random.Random) -> list[Batch]:
    """Return the batches of one epoch, in random order.

    Packed rows are shuffled, sorted by width within pools to reduce padding, cut into batches, and
    the batches are shuffled. So a batch holds parts of several trees.
    """
    pool_size = 64
    width = attrgetter("width")
    shuffled = rng.sample(rows, len(rows))
    by_width = []
    for start in range(0, len(shuffled), pool_size):
        by_width += sorted(shuffled[start : start + pool_size], key=width)
    batches = list(token_batches(by_width, batch_tokens, length=width))
    rng.shuffle(batches)
    return batches


# ---- Losses --------------------------------------------------------------------------------------


def training_loss(
    model: ValueModel,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    groups: list[tuple[str, str]],
    *,
    huber_delta: float,
) -> torch.Tensor:
    """Return the sum of the losses of the labels in a batch.

    It is a sum, because a mean would make a label count more in a smaller batch. With e = V - y, in
    tanh space (section 4.2), the Huber loss of a label is

        e^2 / 2 if |e| <= delta, else delta * (|e| - delta / 2).

    Args:
        outputs: [n, outputs of the head].
        targets: y, [n].
        groups: (problem, agent) per label, for the `rank` loss.
    """
    if model.loss == "huber":
        values = model.value(outputs)
        losses = nn.functional.huber_loss(values, targets, delta=huber_delta, reduction="none")
    elif model.loss == "mse":
        losses = (model.value(outputs) - targets) ** 2
    elif model.loss == "rank":
        losses = ranking_losses(outputs[:, 0], targets, groups)
    elif model.loss == "dist":
        losses = distributional_losses(outputs, targets)
    else:
        raise ValueError(f"no such loss: {model.loss}")
    return losses.sum()


def ranking_losses(
    logits: torch.Tensor, targets: torch.Tensor, groups: list[tuple[str, str]]
) -> torch.Tensor:
    """Return the Bradley-Terry loss per label, [n].

    With z = w.h + b, it is the mean of -log sigmoid(z of the better label - z of the worse label)
    over the labels with another y in the batch, of the same agent in the same tree; 0 without any.
    Siblings alone would leave out an agent whose candidates are always equally good.
    """
    index_of_group = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    group_ids = torch.tensor([index_of_group[group] for group in groups], device=targets.device)
    order = (targets[:, None] - targets).sign()  # 1: the label of the row is better
    is_pair = (group_ids[:, None] == group_ids) & (order != 0)
    losses = nn.functional.softplus(-order * (logits[:, None] - logits))  # -log sigmoid(...)
    return (is_pair * losses).sum(1) / is_pair.sum(1).clamp(min=1)


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


def train(
    model: ValueModel, transcripts: list[Transcript], checkpoint: Path, args
) -> Iterator[tuple[int, float]]:
    """Train with AdamW, warm-up and cosine decay. Every label counts once per epoch.

    What a label counts does not depend on its batch, apart from gradient clipping. The order of an
    epoch is a function of (seed, epoch), so a killed run resumes after its last whole epoch.
    Yields (epoch, mean training loss) after each epoch, and then writes the checkpoint.
    """

    def loss_of(batch: Batch) -> torch.Tensor:
        """Return the summed loss of the labels in a batch."""
        batch_edges = edges_of([transcripts[index] for index in sequence_columns(batch)])
        outputs = model.outputs(batch, transcripts)
        targets = torch.tensor([edge.y for edge in batch_edges], device=outputs.device)
        groups = [(edge.problem_id, edge.agent) for edge in batch_edges]
        return training_loss(model, outputs, targets, groups, huber_delta=args.huber_delta)

    # 1. The batches of every epoch.
    rows = pack_trees(transcripts, model, args.train_batch_tokens)
    schedule = []
    for epoch in range(args.epochs):
        rng = seeded(args.seed, "epoch", epoch)
        schedule.append(epoch_batches(rows, args.train_batch_tokens, rng))
    factor = partial(learning_rate_factor, total_steps=sum(map(len, schedule)))

    # 2. Optimizer and learning rate, as they were when the last epoch ended.
    trained = model.trained_parameters()
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    first_epoch = 0
    if checkpoint.is_file():
        with errors_name(f"{checkpoint} (delete it to start over)"):
            state = torch.load(checkpoint, map_location=model.backbone.device, weights_only=True)
        for name, parameter in trained.items():
            parameter.data.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first_epoch = state["epoch"] + 1
        print(f"resuming after epoch {first_epoch}")

    # 3. Train epoch by epoch.
    progress = Progress(shown=True)
    num_labels = len(edges_of(transcripts))
    for epoch in range(first_epoch, args.epochs):
        model.train()
        batches = schedule[epoch]
        # A constant: divided by its own number, the labels of a small batch would count more.
        labels_per_step = num_labels / len(batches)
        epoch_loss = 0.0
        with progress.over(f"epoch {epoch + 1}/{args.epochs}", len(batches), unit="steps"):
            for batch in batches:
                loss = loss_of(batch)
                (loss / labels_per_step).backward()
                if not nn.utils.clip_grad_norm_(trained.values(), 1.0).isfinite():
                    raise InputError("the gradient is not finite; lower --lr, or check --backbone")
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                epoch_loss += loss.item()
                progress.advance(1, f"loss {loss.item() / labels_per_step:.3f}")
        yield epoch, epoch_loss / num_labels
        state = {"epoch": epoch, "trained": trained}
        state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        write_checkpoint(checkpoint, state)


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = stage_parser(__doc__, writes=True)
    add = parser.add_argument
    add("--rollouts", help="folder of the labels (default: RUN/rollouts)")
    add("--heldout-rollouts", help="folder of the held-out labels (default: as --rollouts)")
    add("--target", choices=("search", "outcome"), default="search", help="outcome: train an ORM")
    add("--backbone", default=TINY_AGENTS, help="folder or hub name (paper: Qwen2.5-1.5B)")
    add("--view", choices=("full", "local"), default="full", help="what V reads (MAS.value_text)")
    add("--quantize", action=argparse.BooleanOptionalAction, default=True, help="NF4: QLoRA")
    add_lora_argument(parser)
    add("--train-batch-tokens", type=positive_int, default=2048, help="padded size of a batch")
    add("--lr", type=positive_float, default=1e-3, help="peak; give 1e-4 or so for a real model")
    add("--epochs", type=positive_int, default=2, help="paper: 5")
    add(
        "--loss",
        choices=("huber", "mse", "rank", "dist"),
        default="huber",
        help="huber (paper), squared error, Bradley-Terry ranking, or a distribution over bins",
    )
    add("--huber-delta", type=positive_float, default=1.0, help="error where it becomes linear")
    return parser.parse_args(argv)


def main(args) -> None:
    torch.set_num_threads(args.num_threads)

    # 1. Load the labels, and make an untrained V: a backbone with LoRA, and a head.
    rollouts, trees = load_labels(args)
    mas = MAS.from_dict(rollouts["train"]["graph"])
    backbone, tokenizer = load_backbone(
        args.backbone, quantize=args.quantize, device=args.device, dtype=args.dtype
    )
    torch.manual_seed(args.seed)  # of LoRA
    backbone = add_lora(backbone, rank=args.lora_rank)
    model = ValueModel(backbone, tokenizer, mas, args.view, args.loss)

    # 2. Start the run folder, or resume it.
    folder = Path(args.run) / ("value" if args.target == "search" else "orm")
    settings = value_settings(args, model, folder)
    settings |= {"rollouts": rollouts["train"], "heldout_rollouts": rollouts["heldout"]}
    settings["trees"] = fingerprint(trees)
    open_run(folder, settings, device=args.device, overwrite=args.overwrite)
    if read_config(folder).get("finished"):
        print(f"{folder} is finished already (--overwrite trains it again)")
        report_last_epoch(folder)
        return

    # 3. Encode the labelled states.
    transcripts = make_transcripts(trees["train"], model, args.target)
    heldout = make_transcripts(trees["heldout"], model, args.target)
    heldout_edges = edges_of(heldout)
    print(
        f"{len(edges_of(transcripts))} labelled states of {len(trees['train'])} problems "
        f"in {len(transcripts)} transcripts; {len(heldout_edges)} held-out states"
    )

    # 4. Train, and measure V on held-out problems after each epoch.
    checkpoint = folder / "checkpoint.pt"
    try:
        with open_to_append(folder / "metrics.jsonl") as log:
            for epoch, train_loss in train(model, transcripts, checkpoint, args):
                predictions = model.predict(heldout, batch_tokens=args.batch_tokens)
                values = list(chain.from_iterable(predictions))
                write_heldout(folder / "heldout.jsonl", heldout_edges, values)
                metrics = value_metrics(heldout_edges, values)
                record = {"epoch": epoch, "train_loss": train_loss, "heldout": metrics}
                write_line(log, epoch, record)
                errors = ", ".join(f"{agent} {row['rmse']:.3f}" for agent, row in metrics.items())
                print(f"epoch {epoch + 1}: training loss {train_loss:.4f}")
                print(f"  held-out RMSE: {errors}", flush=True)
    except torch.OutOfMemoryError:
        raise InputError("out of memory; lower --train-batch-tokens or --lora-rank") from None

    # 5. Save, load again to compare, and report.
    print(f"peak memory: {peak_memory(args.device)}")
    with open(folder / "problems.jsonl", "wb") as file:
        save_problems(file, trees["train"] + trees["heldout"])
    model.save(folder)
    verify_saved(model, folder, [edge.state for edge in heldout_edges[:64]], args)
    checkpoint.unlink()
    report_last_epoch(folder)


def load_labels(args) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Return the settings of the rollouts and the labelled trees, each by split.

    Raises InputError if a split is empty, or if the two have different graphs or share a question.
    """
    train_folder = Path(args.rollouts or f"{args.run}/rollouts")
    folders = {"train": train_folder, "heldout": Path(args.heldout_rollouts or train_folder)}
    settings, trees = {}, {}
    for split, folder in folders.items():
        settings[split] = read_config(folder)["settings"]
        records = read_records(folder / "trees.jsonl").values()
        trees[split] = [record for record in records if record["split"] == split]
        for tree in trees[split]:
            tree.pop("cost", None)  # equal trees take other seconds
        if not trees[split]:
            remedy = f"generate_rollouts.py --num-{split} N labels some"
            raise InputError(f"{folder / 'trees.jsonl'}: no {split} problems; {remedy}")
    if settings["train"]["graph"] != settings["heldout"]["graph"]:
        raise InputError(f"{folders['heldout']}: labelled with another graph than {train_folder}")
    trained_on = {question_key(tree["question"]) for tree in trees["train"]}
    for tree in trees["heldout"]:
        if question_key(tree["question"]) in trained_on:
            trouble = f"V would be trained on the question of the held-out problem {tree['id']}"
            raise InputError(f"{folders['heldout']}: {trouble}; label other problems")
    return settings, trees


def value_settings(args, model: ValueModel, folder: Path) -> dict:
    """Return the settings that determine the weights of V, apart from its labels.

    folder: where V will be saved. The backbone is named as seen from there, so that V can be loaded
    from any working directory, and moves together with its backbone.
    """
    names = ("target", "view", "loss", "quantize", "lora_rank", "lr", "epochs")
    names += ("huber_delta", "train_batch_tokens", "seed")
    settings = {name: getattr(args, name) for name in names}
    settings["dtype"] = resolve_dtype(args.dtype, args.device)
    settings["backbone"] = checkpoint_setting(args.backbone)
    if Path(args.backbone).is_dir():
        # ".." leads out of the folder that a link points to, as the operating system reads it.
        path = os.path.relpath(os.path.realpath(args.backbone), os.path.realpath(folder))
        settings["backbone"]["name"] = path
    settings["graph"] = asdict(model.mas)
    settings["rendering"] = rendering_fingerprint(model.mas, args.view)
    return settings


def write_heldout(path: Path, edges: list[Edge], values: list[float]) -> None:
    """Write V beside each held-out label, a line per edge, in place of those of an older epoch."""
    with open(path, "wb") as file:
        for edge, value in zip(edges, values, strict=True):
            record = {"id": edge.problem_id, "node": edge.node, "parent": edge.parent}
            record |= {"agent": edge.agent, "y": edge.y, "N": edge.visits, "V": value}
            append_jsonl(file, record)


def verify_saved(model: ValueModel, folder: Path, states: list[State], args) -> None:
    """Load the saved model, compare its V with the trained one's, and mark the run as finished.

    Raises AssertionError if they differ: a head that was not saved must not go unnoticed.
    """
    loaded = ValueModel.load(folder, model.mas, args, must_be_finished=False)
    values = [v.score(states, batch_tokens=args.batch_tokens) for v in (model, loaded)]
    worst = max(abs(trained - again) for trained, again in zip(*values, strict=True))
    print(f"{folder}, loaded again: V differs by {worst:.1e} at most on {len(states)} states")
    if not worst <= 1e-4:  # NaN included
        raise AssertionError(f"the saved value model is not the trained one: V differs by {worst}")
    write_config(folder, read_config(folder) | {"finished": True})


def report_last_epoch(folder: Path) -> None:
    """Print how good V is on held-out labels, and what warns of trouble."""
    from report.tables import text_table, value_table
    from report.warnings import value_warnings

    last_epoch = read_jsonl(folder / "metrics.jsonl")[-1]
    heldout = read_jsonl(folder / "heldout.jsonl")
    settings = read_config(folder)["settings"]
    print(text_table(value_table([last_epoch["heldout"]])))
    for line in value_warnings(last_epoch["train_loss"], heldout, settings):
        print(line)


if __name__ == "__main__":
    cli(parse_args, main)
