"""V: the value model, what it reads, and how it is loaded and saved.

V(s) = tanh(w.h + b), with h the last hidden state of a causal language model at the token that ends
the newest message (paper section 4.2). train_value.py trains it, search.py queries it.

A transcript is read causally, so one forward over a root-to-leaf path gives V of every state on it,
and the transcripts of a tree are read together, every token once (packing.py).
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModel

from llm.adapters import load_lora
from llm.loading import beginning_ids, checkpoint_fingerprint, context_length, load_pretrained
from llm.packing import (
    Batch,
    collate,
    num_distinct_tokens,
    pack,
    packed_batches,
    sequence_columns,
    sequences_of,
    token_cost_for,
)
from mas import MAS, State
from support.flags import InputError
from support.progress import ignore
from support.runs import fingerprint, read_config

# ---- Batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A transcript to be read: a path of states that are labelled, or that are to be scored.

    Attributes:
        ids: token ids.
        positions: of the tokens that end the messages of these states.
        targets: y of each state, for training.
        groups: (problem, agent) of each state; the `rank` loss compares within a group.
        visits: N(s, a) of each label.
        weights: of each label in the loss.
    """

    ids: list[int]
    positions: list[int]
    targets: list[float] = field(default_factory=list)
    groups: list[tuple[str, str]] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def label_places(batch: Batch, rows: list[Row]) -> list[tuple[int, int]]:
    """Return (packed row, column) of every label of the rows of a batch, as in `sequences_of`."""
    places = []
    for index, (packed_index, columns) in sequence_columns(batch).items():
        for position in rows[index].positions:
            places.append((packed_index, columns[position]))
    return places


# ---- The value model -----------------------------------------------------------------------------


class ValueModel(nn.Module):
    """V(s) = tanh(w.h + b) in [-1, 1], with h at the token that ends the newest message.

    The head and tanh are float32. V starts at 0, the middle of its range.

    Args:
        backbone: a causal language model without its head.
        view: what is rendered of a state, "full" or "local" (MAS.value_text).
        loss: what V is trained with. "dist" (not in the paper) has a head with NUM_BINS outputs: a
            distribution over values evenly spaced in [-1, 1], whose mean is V.

    Attributes:
        on_rows: called with the number of rows after each scored batch, to show progress.
        free_memory: called when memory runs out while scoring; returns True if it has given back
            memory that others keep (`Decoder.free_memory`).
    """

    NUM_BINS = 21
    # Larger batches leave the caches of a CPU: 32,768 tokens at once take 1.8 times as long.
    CPU_BATCH_TOKENS = 4096

    def __init__(self, backbone: nn.Module, tokenizer, mas: MAS, view: str, loss: str):
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.beginning = beginning_ids(tokenizer)
        self.mas = mas
        self.view = view
        self.loss = loss
        self.head = nn.Linear(
            backbone.config.get_text_config().hidden_size,
            self.NUM_BINS if loss == "dist" else 1,
            device=backbone.device,
            dtype=torch.float32,
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.token_cost = token_cost_for(backbone.config)
        self.on_rows: Callable[[int], None] = ignore
        self.free_memory: Callable[[], bool | None] = ignore
        self.segment_ids = functools.lru_cache(maxsize=1 << 16)(self._segment_ids)

    def _segment_ids(self, segment: str) -> list[int]:
        ids = self.tokenizer(segment, add_special_tokens=False)["input_ids"]
        return ids + [self.tokenizer.eos_token_id]

    def encode(self, state: State) -> tuple[list[int], list[int]]:
        """Return the token ids of value_text, and the position of the token that ends each segment.

        The ids begin with the BOS token if the backbone's tokenizer adds one (`beginning_ids`).
        Raises InputError if the state does not fit into the backbone. Nothing is ever truncated.
        """
        ids = list(self.beginning)
        ends = []
        for segment in self.mas.value_text(state, self.view):
            ids += self.segment_ids(segment)
            ends.append(len(ids) - 1)
        context = context_length(self.backbone)
        if len(ids) > context:
            raise InputError(
                f"a transcript of {len(ids)} tokens does not fit into the value model's {context}: "
                f"{state.question[:60]!r}...; lower --max-new-tokens or take another --backbone"
            )
        return ids, ends

    def outputs(self, batch: Batch, places: list[tuple[int, int]]) -> torch.Tensor:
        """Return w.h + b at each (packed row, column): float32 [places, outputs of the head]."""
        inputs = collate(batch, self.tokenizer.pad_token_id, self.backbone.device)
        hidden = self.backbone(**inputs).last_hidden_state  # [packed rows, width, hidden size]
        row, column = torch.tensor(places, device=self.backbone.device).T
        return self.head(hidden[row, column].float())

    def value(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return V in [-1, 1] from the outputs of the head: float32 [len(outputs)]."""
        if self.loss == "dist":
            return outputs.softmax(-1) @ self.bins()
        return torch.tanh(outputs)[:, 0]  # V = tanh(w.h + b)

    def bins(self) -> torch.Tensor:
        return torch.linspace(-1, 1, self.NUM_BINS, device=self.head.weight.device)

    def forward(self, batch: Batch, places: list[tuple[int, int]]) -> torch.Tensor:
        """Return V at each (packed row, column): float32 [len(places)]."""
        return self.value(self.outputs(batch, places))

    @torch.inference_mode()
    def predict(self, rows: list[Row], *, batch_tokens: int) -> list[list[float]]:
        """Return V at each row's positions.

        Out of memory splits a batch in two. Raises InputError if a single row does not fit.
        """
        self.eval()
        if self.backbone.device.type == "cpu":
            batch_tokens = min(batch_tokens, self.CPU_BATCH_TOKENS)
        sequences = [row.ids for row in rows]
        batches = packed_batches(sequences, batch_tokens, token_cost=self.token_cost)
        values: list[list[float]] = [[] for _ in rows]
        while batches:
            batch = batches.pop()  # the widest first: memory runs out at once or never
            try:
                batch_values = self(batch, label_places(batch, rows)).cpu()
            except torch.OutOfMemoryError:
                if self.free_memory():
                    batches.append(batch)
                else:
                    batches += self._split(batch, sequences)
                continue
            indices = sequences_of(batch)  # in the order of `label_places`
            sizes = [len(rows[index].positions) for index in indices]
            for index, row_values in zip(indices, batch_values.split(sizes), strict=True):
                values[index] = row_values.tolist()
            self.on_rows(len(indices))
        return values

    def _split(self, batch: Batch, sequences: list[list[int]]) -> list[Batch]:
        """Split a batch that does not fit into memory. Raises InputError if it is one sequence."""
        indices = sequences_of(batch)
        if len(indices) == 1:
            tokens = len(sequences[indices[0]])
            raise InputError(
                f"out of memory with one transcript of {tokens} tokens; take a smaller --backbone"
            ) from None
        message = f"out of memory: {len(indices)} transcripts are scored in two batches"
        tqdm.write(message, file=sys.stderr)
        middle = len(indices) // 2
        widest = max(row.width for row in batch)
        halves = []
        for half in (indices[:middle], indices[middle:]):
            halves.append(
                pack(sequences, token_cost=self.token_cost, max_width=widest, indices=half)
            )
        return halves

    def score(self, states: list[State], *, batch_tokens: int) -> list[float]:
        """Return V of each state. Equal states are read once."""
        rows = {}
        for state in dict.fromkeys(states):
            ids, ends = self.encode(state)
            rows[state] = Row(ids, positions=[ends[-1]])
        predictions = self.predict(list(rows.values()), batch_tokens=batch_tokens)
        value_of = {}
        for state, [value] in zip(rows, predictions, strict=True):
            value_of[state] = value
        return [value_of[state] for state in states]

    def num_tokens(self, states: list[State]) -> int:
        """Return how many tokens are read to score these states together."""
        return num_distinct_tokens([self.encode(state)[0] for state in states])

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters, LoRA and head, by name."""
        parameters = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameters[name] = parameter
        return parameters

    def save(self, folder: Path) -> None:
        self.backbone.save_pretrained(folder / "adapter")
        tensors = {}
        for name, tensor in self.head.state_dict().items():
            tensors[name] = tensor.detach().cpu().contiguous()
        save_file(tensors, folder / "head.safetensors")

    @classmethod
    def load(
        cls, folder: Path, mas: MAS, *, device: str, dtype: str, must_be_finished: bool = True
    ) -> "ValueModel":
        """Load a trained value model.

        Raises InputError if its training is not finished, if it was trained for another graph or
        rendering of states, or if files are missing.
        """
        config = read_config(folder)
        settings = config["settings"]
        if "backbone" not in settings:
            raise InputError(f"{folder}: no value model; train_value.py trains one")
        if must_be_finished and not config.get("finished"):
            raise InputError(
                f"{folder}: its training is not finished; run train_value.py again to resume it"
            )
        _check_graph_of_value(folder, settings, mas)
        for part in ("adapter/adapter_model.safetensors", "head.safetensors"):
            if not (folder / part).is_file():
                raise InputError(f"{folder}: {part} is missing; train_value.py writes it")
        name = _name_from_here(settings["backbone"]["name"], folder)
        backbone, tokenizer = load_backbone(
            name, quantize=settings["quantize"], device=device, dtype=dtype
        )
        if checkpoint_fingerprint(name, backbone) != settings["backbone"]["fingerprint"]:
            raise InputError(
                f"{folder}: its backbone {name} has other files than when V was trained; "
                f"restore them, or train V again"
            )
        backbone = load_lora(backbone, folder / "adapter")
        model = cls(backbone, tokenizer, mas, settings["view"], settings["loss"])
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        return model.to(device).eval()


def backbone_setting(name: str, backbone: nn.Module, folder: Path) -> dict:
    """Return how a backbone is recorded: its name as seen from the folder of V, and a fingerprint.

    So V can be loaded from any working directory, and moves together with its backbone. Names of
    the hub stay the same.
    """
    name_from_folder = name
    if Path(name).is_dir():
        # "..", as the operating system reads it, leads out of the folder that a link points to.
        name_from_folder = os.path.relpath(os.path.realpath(name), os.path.realpath(folder))
    return {"name": name_from_folder, "fingerprint": checkpoint_fingerprint(name, backbone)}


def weights_fingerprint(folder: Path) -> str:
    """Fingerprint the trained weights of a saved V."""
    head = (folder / "head.safetensors").read_bytes()
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.blake2b(head + adapter, digest_size=4).hexdigest()


def _name_from_here(name: str, folder: Path) -> str:
    if not (folder / name).is_dir():
        return name
    return os.path.relpath(os.path.realpath(folder / name), os.path.realpath("."))


def load_backbone(name: str, *, quantize: bool, device: str, dtype: str):
    """Load (backbone without its head, tokenizer). quantize: NF4 weights (QLoRA).

    The backbone is frozen and keeps its type: peft's `prepare_model_for_kbit_training` would make
    embeddings, norms and all hidden states float32, which takes more memory and rules out flash
    attention. On a GPU, training keeps only the inputs of layers, and computes each layer again for
    its gradients (gradient checkpointing). This changes no gradient.
    """
    backbone, tokenizer = load_pretrained(
        "--backbone", name, AutoModel, quantize=quantize, device=device, dtype=dtype
    )
    _check_reads_left_to_right(name, backbone)
    backbone.requires_grad_(False)
    if torch.device(device).type == "cuda":
        backbone.activation_checkpointing_enable()
    return backbone, tokenizer


@torch.no_grad()
def _check_reads_left_to_right(name: str, backbone: nn.Module) -> None:
    """Raise InputError if hidden states of a token depend on later ones.

    In training V reads all states of a transcript at once. A bidirectional model, such as BERT,
    would read in each of them the messages that are still to come.
    """
    reads_both_ways = getattr(backbone.config, "is_encoder_decoder", False)
    if not reads_both_ways:
        token_ids = torch.tensor([[10, 11, 12], [10, 13, 14]], device=backbone.device)
        first, other = backbone(input_ids=token_ids).last_hidden_state[:, 0].float()
        reads_both_ways = not torch.allclose(first, other, atol=1e-3 * first.abs().max().item())
    if reads_both_ways:
        raise InputError(
            f"--backbone {name}: each token of it reads those that follow; V needs a causal "
            f"language model"
        )


def _check_graph_of_value(folder: Path, settings: dict, mas: MAS) -> None:
    """Raise InputError if V was trained for another graph, or another rendering of its states."""
    trained_graph = settings["graph"]
    if trained_graph != json.loads(json.dumps(asdict(mas))):
        same_name = trained_graph["name"] == mas.name
        difference = " with other agents or prompts" if same_name else ""
        raise InputError(
            f"{folder}: V was trained with the graph {trained_graph['name']!r}, "
            f"now it is {mas.name!r}{difference}; "
            f"give the same --graph, or train a V for this one"
        )
    if settings["rendering"] != rendering_fingerprint(mas, settings["view"]):
        raise InputError(
            f"{folder}: V was trained with another rendering of states "
            f"(value_text has changed since); train it again"
        )


def rendering_fingerprint(mas: MAS, view: str) -> str:
    """Fingerprint value_text: V is only valid for the rendering it was trained on.

    Agents whose condition does not hold for the example's messages are not rendered.
    """
    state = State("a question", ())
    renderings = []
    while not mas.is_terminal(state):
        state = mas.step(state, f"message {len(state.messages)}")
        renderings.append(mas.value_text(state, view))
    return fingerprint(renderings)
