"""Stage 2: train V (the process reward model) on the search labels, or an outcome model (ORM) on the answers alone.

V(s) = tanh(w.h + b), h the last hidden state at the token that ends the newest message; a causal LM backbone with
QLoRA; Huber loss between V and y = Q(s, a) in tanh space (paper section 4.2). Paper: Qwen2.5-1.5B, rank 256, 5 epochs.

    python train_value.py                      # runs/tiny/rollouts -> runs/tiny/value
    python train_value.py --target outcome     # runs/tiny/rollouts -> runs/tiny/orm: terminal states only, targets +1 / -1
    python train_value.py --no-quantize        # LoRA on full-precision weights; does without bitsandbytes
    python train_value.py --loss rank          # not the paper's: huber (default), mse, rank (Bradley-Terry), dist (distributional head)
    accelerate launch --num_processes 2 train_value.py     # data-parallel: one step takes a batch on every process

A transcript is read causally, so one forward over a root-to-leaf path holds V of every state on it: rows are paths, and
each edge of the tree is labelled in exactly one of them.
"""

import datetime
import functools
import hashlib
import json
import logging
import os
import random
import resource
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported (by peft) it announces a kernel that it does without
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # a name that transformers has changed and peft has not yet

import numpy as np
import scipy.stats
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModel

from generate_rollouts import append_jsonl, load_pretrained, open_run, own_device, process, read_config, resume_jsonl, write_config
from mas import (HERE, MAS, InputError, Parser, State, cli, positive_float, positive_int, question_key,
                 read_jsonl, seeded)

# ---------------------------------------------------------------------------------------------------------------------
# Labels: one per visited edge


@dataclass(frozen=True)
class Edge:
    """One visited edge (s, a) of a tree: the state next(s, a) that V is asked about, and its label."""
    problem_id: str
    split: str
    parent: int            # index of s in its tree: edges with equal parents are siblings
    agent: str             # who said a
    state: State           # next(s, a)
    y: float               # the target in [-1, 1]: Q(s, a), or the reward for an outcome model
    visits: int            # N(s, a)


def tree_paths(record: dict, mas: MAS, target: str) -> list[list[Edge]]:
    """Paths from the root to each visited leaf; each path lists the edges labelled in it, none of which is in another.

    target "search": every visited edge, y = W / N. target "outcome": terminal states only, y = the reward.
    """
    nodes, states = record["nodes"], [State(record["question"], ())]
    for node in nodes[1:]:
        states.append(mas.step(states[node["parent"]], node["message"]))
    visited = [i for i, node in enumerate(nodes) if i > 0 and node["N"] > 0]
    inner = {nodes[i]["parent"] for i in visited}
    paths, labelled = [], set()
    for leaf in visited:
        if leaf in inner:
            continue
        path, at = [], leaf
        while at and at not in labelled:
            labelled.add(at)
            node = nodes[at]
            if target == "search" or "reward" in node:
                y = node["W"] / node["N"] if target == "search" else node["reward"]
                path.append(Edge(record["id"], record["split"], node["parent"], node["agent"], states[at], y, node["N"]))
            at = node["parent"]
        paths.append(path[::-1])
    return paths


@dataclass(frozen=True)
class Row:
    """One row of a training batch."""
    ids: list[int]
    positions: list[int]      # of the tokens that end the labelled messages
    targets: list[float]
    groups: list[tuple[str, str]]   # (problem, agent) of each label: what `rank` compares


def make_rows(paths: list[list[Edge]], model: "ValueModel") -> list[Row]:
    """Full view: a row per path. Local view: states are no prefixes of each other, so a row per edge."""
    rows = []
    for path in paths:
        if model.view == "full" and path:
            ids, ends = model.encode(path[-1].state)
            rows.append(Row(ids, [ends[len(edge.state.messages)] for edge in path], [edge.y for edge in path], [(edge.problem_id, edge.agent) for edge in path]))
        elif model.view == "local":
            for edge in path:
                ids, ends = model.encode(edge.state)
                rows.append(Row(ids, [ends[-1]], [edge.y], [(edge.problem_id, edge.agent)]))
    return rows


def distinct_tokens(rows: list[Row]) -> int:
    """How many tokens would be left if a prefix shared by several rows were read once."""
    seen = set()
    for row in rows:
        prefix = 0
        for token in row.ids:
            prefix = hash((prefix, token))
            seen.add(prefix)
    return len(seen)


def token_batches(lengths: list[int], order: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut `order` into batches whose padded size, rows x longest, stays within `batch_tokens`."""
    batch, width = [], 0
    for i in order:
        width_with = max(width, lengths[i])
        if batch and (len(batch) + 1) * width_with > batch_tokens:
            yield batch
            batch, width_with = [], lengths[i]
        batch.append(i)
        width = width_with
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# The value model


def load_backbone(name: str, *, quantize: bool, device: str):
    """(backbone without its LM head, tokenizer). quantize: NF4 with double quantisation (QLoRA), which needs bitsandbytes."""
    backbone, tokenizer = load_pretrained("--backbone", name, AutoModel, quantize=quantize, device=device)
    on_gpu = torch.device(device).type == "cuda"
    return (prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=on_gpu) if quantize else backbone), tokenizer


class ValueModel(nn.Module):
    """V(s) = tanh(w.h + b) in [-1, 1]; h at the token that ends the newest message. Head and tanh are float32.

    view: what of a state is rendered, "full" or "local" (MAS.value_text).
    loss: what it is trained with; "dist" has a head of BINS outputs instead of one (not in the paper): a distribution over
    values evenly spaced in [-1, 1], whose mean is V.
    """

    BINS = 21

    def __init__(self, backbone: nn.Module, tokenizer, mas: MAS, view: str, loss: str):
        super().__init__()
        self.backbone, self.tokenizer, self.mas, self.view, self.loss = backbone, tokenizer, mas, view, loss
        self.head = nn.Linear(backbone.config.hidden_size, self.BINS if loss == "dist" else 1, device=backbone.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)  # V starts at 0, the middle of its range
        nn.init.zeros_(self.head.bias)
        self._segment_ids = functools.lru_cache(maxsize=1 << 16)(
            lambda segment: tokenizer(segment, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])

    def encode(self, state: State) -> tuple[list[int], list[int]]:
        """(token ids of value_text, position of the token that ends each segment). Never truncates."""
        ids, ends = [], []
        for segment in self.mas.value_text(state, self.view):
            ids += self._segment_ids(segment)
            ends.append(len(ids) - 1)
        room = self.backbone.config.max_position_embeddings
        if len(ids) > room:
            raise InputError(f"a transcript of {len(ids)} tokens does not fit into the value model's {room}: "
                             f"{state.question[:60]!r}...; lower --max-new-tokens or take another --backbone")
        return ids, ends

    def outputs(self, rows: list[list[int]], at: list[tuple[int, int]]) -> torch.Tensor:
        """w.h + b at each (row, position) of `at`: float32 [len(at), outputs]. Causal and padded on the right, so no mask is needed."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=self.backbone.device)
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state     # [rows, width, hidden]
        row, position = torch.tensor(at, device=self.backbone.device).T
        return self.head(hidden[row, position].float())

    def value(self, outputs: torch.Tensor) -> torch.Tensor:
        """V in [-1, 1]: float32 [len(outputs)]."""
        if self.loss == "dist":
            return outputs.softmax(-1) @ self.bins()
        return torch.tanh(outputs)[:, 0]                                             # V = tanh(w.h + b)

    def bins(self) -> torch.Tensor:
        return torch.linspace(-1, 1, self.BINS, device=self.head.weight.device)

    def forward(self, rows: list[list[int]], at: list[tuple[int, int]]) -> torch.Tensor:
        """V at each (row, position) of `at`: float32 [len(at)]."""
        return self.value(self.outputs(rows, at))

    @torch.inference_mode()
    def predict(self, rows: list[Row], *, batch_tokens: int, progress: str | None) -> list[list[float]]:
        """V at each row's positions, in batches of rows of like length. progress: the name of a progress bar, or None."""
        self.eval()
        lengths, values = [len(row.ids) for row in rows], [[] for _ in rows]
        batches = list(token_batches(lengths, sorted(range(len(rows)), key=lengths.__getitem__), batch_tokens))
        with tqdm(total=len(rows), desc=progress, leave=False, disable=progress is None) as bar:
            while batches:
                batch = batches.pop()   # the longest first: memory runs out at once or never
                at = [(i, position) for i, row in enumerate(batch) for position in rows[row].positions]
                try:
                    found = self([rows[row].ids for row in batch], at).tolist()
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise InputError(f"out of memory with one transcript of {lengths[batch[0]]} tokens; take a smaller --backbone") from None
                    tqdm.write(f"out of memory: {len(batch)} transcripts are scored in two batches", file=sys.stderr)
                    batches += [batch[:len(batch) // 2], batch[len(batch) // 2:]]
                    continue
                for (i, _), v in zip(at, found):
                    values[batch[i]].append(v)
                bar.update(len(batch))
        return values

    def score(self, states: list[State], *, batch_tokens: int) -> tuple[list[float], list[int]]:
        """(V, tokens read) per state. Equal states are read once; the first one bears the cost."""
        rows = {}
        for state in dict.fromkeys(states):
            ids, ends = self.encode(state)
            rows[state] = Row(ids, [ends[-1]], [], [])
        values = dict(zip(rows, self.predict(list(rows.values()), batch_tokens=batch_tokens, progress=None)))
        tokens = {state: len(row.ids) for state, row in rows.items()}
        return [values[state][0] for state in states], [tokens.pop(state, 0) for state in states]

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What training moves: LoRA and head."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> None:
        self.backbone.save_pretrained(folder / "adapter")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}, folder / "head.safetensors")

    @classmethod
    def load(cls, folder: Path, mas: MAS, *, device: str) -> "ValueModel":
        """A trained value model; refused where it was trained on another graph or another rendering of states."""
        config = read_config(folder)
        settings = config["settings"]
        if not config.get("finished"):
            raise InputError(f"{folder}: its training was not finished; run train_value.py again, it goes on from there")
        if settings["graph"]["name"] != mas.name or settings["graph"] != json.loads(json.dumps(asdict(mas))):
            raise InputError(f"{folder}: V was trained with the graph {settings['graph']['name']!r}, now it is {mas.name!r}"
                             f"{' with other agents or prompts' if settings['graph']['name'] == mas.name else ''}; "
                             f"give the same --graph, or train a V for this one")
        if settings["rendering"] != rendering(mas, settings["view"]):
            raise InputError(f"{folder}: V was trained with another rendering of states (value_text has changed since); train it again")
        for part in ("adapter/adapter_model.safetensors", "head.safetensors"):
            if not (folder / part).is_file():
                raise InputError(f"{folder}: {part} is missing; train_value.py writes it")
        backbone, tokenizer = load_backbone(settings["backbone"], quantize=settings["quantize"], device=device)
        model = cls(PeftModel.from_pretrained(backbone, folder / "adapter"), tokenizer, mas, settings["view"], settings["loss"])
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        return model.to(device).eval()


def rendering(mas: MAS, view: str) -> str:
    """A fingerprint of value_text: V is only valid for the rendering it was trained on."""
    state, shown = State("a question", ()), []
    while not mas.is_terminal(state):
        state = mas.step(state, f"message {len(state.messages)}")
        shown.append(mas.value_text(state, view))
    return hashlib.blake2b(json.dumps(shown).encode(), digest_size=6).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# How good is V on held-out problems?


def auc(values: list[float], right: list[bool]) -> float:
    """P(V of a right one > V of a wrong one), ties half: the area under the ROC curve."""
    ranks = scipy.stats.rankdata(values)
    positives = sum(right)
    return (sum(r for r, ok in zip(ranks, right) if ok) - positives * (positives + 1) / 2) / (positives * (len(right) - positives))


def interval(samples: list[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, over problems."""
    draws = np.random.default_rng(0).choice(np.asarray(samples), size=(2000, len(samples))).mean(1)
    return tuple(float(x) for x in np.quantile(draws, (0.025, 0.975)))


def calibration_error(v: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error in units of V: |mean V - mean Q| in ten equal bins of V, weighted by how many fall in each."""
    bins = np.minimum((v + 1) / 2 * 10, 9).astype(int)
    return float(sum(abs(v[bins == b].mean() - y[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)))


def metrics(edges: list[Edge], values: list[float]) -> dict[str, dict]:
    """Per agent: RMSE, Pearson and calibration error of V against Q; AUC within a problem; how often V's best sibling is the best.

    auc:   right (y > 0) against wrong (y < 0) states of the same agent and the same problem, averaged over the problems
           that have both: it cannot be won by telling easy problems from hard ones.
    top1:  among visited siblings with different Q, is one with the largest Q the one with the largest V? `chance` is a
           uniform pick among the same siblings.
    """
    report = {}
    for agent in dict.fromkeys(edge.agent for edge in edges):
        own = [(edge, v) for edge, v in zip(edges, values) if edge.agent == agent]
        y, v = np.array([edge.y for edge, _ in own]), np.array([v for _, v in own])
        problems, siblings = defaultdict(list), defaultdict(list)
        for edge, value in own:
            siblings[edge.problem_id, edge.parent].append((value, edge.y))
            if edge.y:
                problems[edge.problem_id].append((value, edge.y > 0))
        aucs = [auc(*zip(*pairs)) for pairs in problems.values() if len({ok for _, ok in pairs}) == 2]
        groups = [group for group in siblings.values() if len({y for _, y in group}) > 1]
        best = [max(y for _, y in group) for group in groups]
        report[agent] = {
            "n": len(own), "rmse": float(np.sqrt(np.mean((v - y) ** 2))), "rmse_of_mean": float(np.std(y)), "ece": calibration_error(v, y),
            "pearson": float(np.corrcoef(v, y)[0, 1]) if np.std(v) > 0 and np.std(y) > 0 else None,
            "auc": float(np.mean(aucs)) if aucs else None, "auc_95": interval(aucs) if aucs else None, "auc_problems": len(aucs),
            "top1": float(np.mean([max(group)[1] == top for group, top in zip(groups, best)])) if groups else None,
            "chance": float(np.mean([np.mean([y == top for _, y in group]) for group, top in zip(groups, best)])) if groups else None,
            "sibling_groups": len(groups)}
    return report


def metrics_table(report: dict[str, dict]) -> str:
    show = lambda x, form="{:.3f}": "-" if x is None else form.format(x)
    lines = ["held-out     edges   RMSE  (of mean)  calib.  Pearson    AUC    95 % interval  problems   top-1  chance  groups"]
    for agent, m in report.items():
        low, high = m["auc_95"] or (None, None)
        lines.append(f"{agent:10s} {m['n']:7d} {m['rmse']:6.3f} {m['rmse_of_mean']:10.3f} {m['ece']:7.3f} {show(m['pearson']):>8s} {show(m['auc']):>6s}  "
                     f"[{show(low)}, {show(high)}] {m['auc_problems']:9d} {show(m['top1']):>7s} {show(m['chance']):>7s} {m['sibling_groups']:7d}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def training_loss(model: ValueModel, outputs: torch.Tensor, targets: torch.Tensor, groups: list, *, huber_delta: float) -> torch.Tensor:
    """Mean loss over the labels. outputs: [n, outputs of the head]; targets: y [n]; groups: (problem, agent) per label."""
    if model.loss == "huber":
        return nn.functional.huber_loss(model.value(outputs), targets, delta=huber_delta)   # section 4.2: Huber in tanh space
    if model.loss == "mse":
        return nn.functional.mse_loss(model.value(outputs), targets)
    if model.loss == "dist":   # cross-entropy with y split between its two neighbouring bins, so that the mean is y
        place = (targets + 1) / 2 * (model.BINS - 1)
        low = place.floor().long().clamp(max=model.BINS - 2)
        share = (place - low)[:, None]
        logs = outputs.log_softmax(-1)
        return -((1 - share) * logs.gather(1, low[:, None]) + share * logs.gather(1, low[:, None] + 1)).mean()
    # rank, Bradley-Terry: -log sigmoid(difference of w.h + b) over all pairs of states of one agent in one tree with different y.
    # Siblings are among them; siblings alone would leave an agent whose copies agree without any pair.
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([names[g] for g in groups], device=targets.device)
    better, worse = ((group[:, None] == group) & (targets[:, None] > targets)).nonzero(as_tuple=True)
    return nn.functional.softplus(outputs[worse, 0] - outputs[better, 0]).sum() / max(1, len(better))


def train(model: ValueModel, rows: list[Row], *, epochs: int, lr: float, batch_tokens: int, huber_delta: float, seed: int,
          checkpoint: Path, after_epoch) -> None:
    """AdamW with warm-up and cosine decay; a step per token-budget batch (one on each process); every labelled edge counts once
    per epoch.

    The order of an epoch is a function of (seed, epoch), so a run that was killed goes on from its last whole epoch.
    after_epoch(epoch, mean training loss): called after each, on the first process.
    """
    rank, world = process()
    schedule_of_epochs = [epoch_batches(rows, batch_tokens, seeded(seed, "epoch", epoch), by_tree=model.loss == "rank") for epoch in range(epochs)]
    steps_of_epochs = [[batches[at:at + world] for at in range(0, len(batches), world)] for batches in schedule_of_epochs]
    total_steps = sum(map(len, steps_of_epochs))
    trained = model.trained_state()
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total_steps + 1, pct_start=0.05)
    start = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=model.backbone.device, weights_only=True)
        for name, parameter in trained.items():
            parameter.data.copy_(saved["trained"][name])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        start = saved["epoch"] + 1
        print(f"going on after epoch {start}")
    with tqdm(total=total_steps, initial=sum(map(len, steps_of_epochs[:start])), desc="training", unit="step", disable=rank > 0) as progress:
        for epoch in range(start, epochs):
            model.train()
            losses = []
            for step in steps_of_epochs[epoch]:
                labels = [sum(len(rows[row].targets) for row in batch) for batch in step]
                mean = 0.0
                if rank < len(step):   # the last step may have fewer batches than there are processes
                    batch = step[rank]
                    at = [(i, position) for i, row in enumerate(batch) for position in rows[row].positions]
                    targets = torch.tensor([y for row in batch for y in rows[row].targets], device=model.backbone.device)
                    loss = training_loss(model, model.outputs([rows[row].ids for row in batch], at), targets,
                                         [group for row in batch for group in rows[row].groups], huber_delta=huber_delta)
                    (loss * labels[rank] / sum(labels)).backward()
                    mean = loss.item()
                if world > 1:
                    add_gradients(trained)
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append((mean, labels[min(rank, len(step) - 1)]))
                progress.update()
                progress.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            if rank > 0:
                continue
            after_epoch(epoch, sum(loss * n for loss, n in losses) / sum(n for _, n in losses))
            temporary = checkpoint.with_suffix(".part")
            torch.save({"epoch": epoch, "trained": {n: p.detach().clone() for n, p in trained.items()},
                        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, temporary)
            temporary.replace(checkpoint)  # all or nothing


def add_gradients(trained: dict[str, torch.Tensor]) -> None:
    """The sum over processes; each has weighted its own by its share of the labels. LoRA and head are small: one message."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained.values()])
    torch.distributed.all_reduce(flat)
    for parameter, gradient in zip(trained.values(), flat.split([p.numel() for p in trained.values()])):
        parameter.grad = gradient.view_as(parameter)


def epoch_batches(rows: list[Row], batch_tokens: int, rng: random.Random, *, by_tree: bool) -> list[list[int]]:
    """Shuffled rows, sorted by length within pools of a few hundred (little padding), cut into batches, shuffled again.
    by_tree: the rows of a tree stay together instead, so that a batch has what `rank` compares."""
    lengths = [len(row.ids) for row in rows]
    if by_tree:
        trees = defaultdict(list)
        for i, row in enumerate(rows):
            trees[row.groups[0][0]].append(i)
        order = [i for tree in rng.sample(list(trees.values()), len(trees)) for i in tree]
    else:
        shuffled = rng.sample(range(len(rows)), len(rows))
        order = [i for at in range(0, len(rows), 512) for i in sorted(shuffled[at:at + 512], key=lengths.__getitem__)]
    batches = list(token_batches(lengths, order, batch_tokens))
    rng.shuffle(batches)
    return batches


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--run", default="runs/tiny", help="run folder")
    parser.add_argument("--rollouts", default=None, help="folder of the labels (default: RUN/rollouts)")
    parser.add_argument("--heldout-rollouts", default=None, help="folder of the held-out labels, so that several V meet the same ones (default: as --rollouts)")
    parser.add_argument("--target", choices=("search", "outcome"), default="search",
                        help="search: V on every visited edge; outcome: an ORM on terminal states")
    parser.add_argument("--backbone", default=os.path.relpath(HERE / "tiny" / "agents"), help="causal LM: folder or hub name (paper: Qwen2.5-1.5B)")
    parser.add_argument("--view", choices=("full", "local"), default="full", help="render the whole transcript, or what the speaker saw")
    parser.add_argument("--quantize", action="store_true", default=True, help="QLoRA: NF4 weights under the adapter (the default)")
    parser.add_argument("--no-quantize", dest="quantize", action="store_false", help="LoRA on full-precision weights")
    parser.add_argument("--lora-rank", type=positive_int, default=16, help="paper: 256")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate; suits the tiny model, give 1e-4 or so for a real one")
    parser.add_argument("--epochs", type=positive_int, default=2, help="paper: 5")
    parser.add_argument("--loss", choices=("huber", "mse", "rank", "dist"), default="huber", help="paper: huber")
    parser.add_argument("--huber-delta", type=positive_float, default=1.0, help="where the Huber loss turns linear")
    parser.add_argument("--train-batch-tokens", type=positive_int, default=4096, help="rows x longest of one training step")
    parser.add_argument("--batch-tokens", type=positive_int, default=32768, help="rows x longest of one scoring batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-threads", type=positive_int, default=min(2, os.cpu_count() or 1),
                        help="torch threads on the CPU; more than 2 do not help tiny models")
    parser.add_argument("--overwrite", action="store_true", help="start over where the folder holds another configuration")
    return parser.parse_args(argv)


def main(args) -> None:
    torch.set_num_threads(args.num_threads)
    labels = Path(args.rollouts or f"{args.run}/rollouts")
    folders = {"train": labels, "heldout": Path(args.heldout_rollouts or labels)}
    labels_from = {split: read_config(folder)["settings"] for split, folder in folders.items()}
    if labels_from["train"]["graph"] != labels_from["heldout"]["graph"]:
        raise InputError(f"{folders['heldout']} was labelled with another graph than {labels}")
    mas = MAS.from_dict(labels_from["train"]["graph"])
    records = {split: [record for record in resume_jsonl(folder / "trees.jsonl").values() if record["split"] == split]
               for split, folder in folders.items()}
    trained_on = {question_key(record["question"]) for record in records["train"]}
    if both := [record["id"] for record in records["heldout"] if question_key(record["question"]) in trained_on]:
        raise InputError(f"{folders['heldout']}: {len(both)} held-out problems ask what V would be trained on, {both[0]} for one; label other ones")
    paths = {split: [path for record in records[split] for path in tree_paths(record, mas, args.target)] for split in records}
    for split in paths:
        if not any(paths[split]):
            raise InputError(f"{folders[split] / 'trees.jsonl'}: no {split} problems; generate_rollouts.py --num-{split} N labels some")

    folder = Path(args.run) / ("value" if args.target == "search" else "orm")
    if args.overwrite:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    open_run(folder, {name: getattr(args, name) for name in ("target", "backbone", "view", "loss", "quantize", "lora_rank", "lr", "epochs",
                                                             "huber_delta", "train_batch_tokens", "seed")}
             | {"graph": asdict(mas), "rendering": rendering(mas, args.view), "rollouts": labels_from["train"], "heldout_rollouts": labels_from["heldout"],
                "digest of the trees": hashlib.blake2b(json.dumps(records).encode(), digest_size=8).hexdigest()}, overwrite=args.overwrite)
    if read_config(folder).get("finished"):
        print(f"{folder} is finished already (--overwrite trains it again)\n{metrics_table(read_jsonl(folder / 'metrics.jsonl')[-1]['heldout'])}")
        return

    rank, world = process()
    device = own_device(args.device)
    if world > 1:   # the others wait while the first one measures and saves: no time-out may end that
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(days=1))
    backbone, tokenizer = load_backbone(args.backbone, quantize=args.quantize, device=device)
    lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0, target_modules="all-linear")
    torch.manual_seed(args.seed)   # the same LoRA on every process
    model = ValueModel(get_peft_model(backbone, lora), tokenizer, mas, args.view, args.loss)
    rows = make_rows(paths["train"], model)
    heldout_rows, heldout = make_rows(paths["heldout"], model), [edge for path in paths["heldout"] for edge in path]
    trained = sum(p.numel() for p in model.trained_state().values())
    tokens = sum(len(row.ids) for row in rows)
    print(f"{sum(len(row.targets) for row in rows)} labelled states of {len(records['train'])} problems in {len(rows)} rows, "
          f"{tokens:,} tokens an epoch ({tokens / distinct_tokens(rows):.2f} times the distinct ones); {len(heldout)} held-out states; {trained:,} trained parameters")

    def after_epoch(epoch: int, loss: float) -> None:
        values = model.predict(heldout_rows, batch_tokens=args.batch_tokens, progress="held-out")
        report = metrics(heldout, [v for row in values for v in row])
        log = folder / "metrics.jsonl"
        text = log.read_text() if log.is_file() else ""
        with open(log, "w") as file:   # without what was written before a kill that made us redo this epoch
            file.writelines(text.splitlines(keepends=True)[:epoch])
            append_jsonl(file, {"epoch": epoch, "train_loss": loss, "heldout": report})
        tqdm.write(f"epoch {epoch + 1}: training loss {loss:.4f}; held-out RMSE "
                   + ", ".join(f"{agent} {m['rmse']:.3f}" for agent, m in report.items()))

    try:
        train(model, rows, epochs=args.epochs, lr=args.lr, batch_tokens=args.train_batch_tokens, huber_delta=args.huber_delta,
              seed=args.seed, checkpoint=folder / "checkpoint.pt", after_epoch=after_epoch)
    except torch.OutOfMemoryError:
        raise InputError("out of memory; lower --train-batch-tokens or --lora-rank, with --overwrite") from None
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory: {peak / 2**30:.1f} GiB {'allocated on the GPU' if device.startswith('cuda') else 'of the process'}")
    with open(folder / "problems.jsonl", "w") as file:  # so that evaluate.py can refuse to test on what V was trained on
        for record in records["train"] + records["heldout"]:
            append_jsonl(file, {"id": record["id"], "split": record["split"], "question_key": question_key(record["question"])})
    model.save(folder)
    verify_saved(model, folder, [edge.state for edge in heldout[:64]], device=device, batch_tokens=args.batch_tokens)
    (folder / "checkpoint.pt").unlink()
    print(metrics_table(read_jsonl(folder / "metrics.jsonl")[-1]["heldout"]))


def verify_saved(model: ValueModel, folder: Path, states: list[State], *, device: str, batch_tokens: int) -> None:
    """Load what was saved and compare: a head that is not saved, or an adapter that does not fit, must not go unseen."""
    write_config(folder, read_config(folder) | {"finished": True})
    loaded = ValueModel.load(folder, model.mas, device=device)
    before, after = (m.score(states, batch_tokens=batch_tokens)[0] for m in (model, loaded))
    worst = max(abs(a - b) for a, b in zip(before, after))
    print(f"saved to {folder}; loaded again, V differs by {worst:.1e} at most on {len(states)} held-out states")
    if worst > 1e-4:
        raise AssertionError(f"the saved value model is not the trained one: V differs by {worst}")


if __name__ == "__main__":
    cli(parse_args, main)
