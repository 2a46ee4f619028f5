"""V: the value model, what it reads, and how it is loaded and saved.

V(s) = tanh(w.h + b), with h the last hidden state of a causal language model at the token that ends
the newest message (paper section 4.2). train_value.py trains it, search.py queries it.

A transcript is read causally, so one forward over a root-to-leaf path gives V of every state on it,
and the transcripts of a tree are read together, every token once (llm/packing.py).
"""

import functools
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from llm.adapters import load_lora
from llm.loading import checkpoint_setting, context_length, load_pretrained
from llm.packing import (
    Batch,
    collate,
    num_distinct_tokens,
    packed_batches,
    row_width,
    sequence_columns,
)
from llm.text import TextEncoder
from mas import MAS, State
from support.flags import TINY_AGENTS, InputError, Parser
from support.records import errors_name
from support.runs import differences, fingerprint, read_config
from tree import Edge, TooLong

# ---- What V reads --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcript:
    """The text of a state, and where V of this state and of states before it is read.

    Attributes:
        ids: token ids.
        positions: of the tokens that end the messages of these states.
        edges: the labels of these states, for training.
    """

    ids: list[int]
    positions: list[int]
    edges: list[Edge] = field(default_factory=list)


def size_of(batch: Batch) -> int:
    """Return the padded size of a batch: packed rows x columns of the widest."""
    return len(batch) * max(row.width for row in batch)


# ---- The value model -----------------------------------------------------------------------------


class ValueModel(nn.Module):
    """V(s) = tanh(w.h + b) in [-1, 1], with h at the token that ends the newest message.

    The head and tanh are float32. V starts at 0, the middle of its range.

    Args:
        backbone: a causal language model without its head.
        view: what is rendered of a state, "full" or "local" (MAS.value_text).
        loss: what V is trained with. "dist" (not in the paper) has a head with NUM_BINS outputs: a
            distribution over values evenly spaced in [-1, 1], whose mean is V.
    """

    NUM_BINS = 21
    # Larger batches leave the caches of a CPU: 32,768 tokens at once take 1.8 times as long.
    CPU_BATCH_TOKENS = 4096

    def __init__(self, backbone: nn.Module, tokenizer, mas: MAS, view: str, loss: str):
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.text_encoder = TextEncoder(tokenizer)
        self.mas = mas
        self.view = view
        self.loss = loss
        hidden_size = backbone.config.get_text_config().hidden_size
        num_outputs = self.NUM_BINS if loss == "dist" else 1
        self.head = nn.Linear(hidden_size, num_outputs, device=backbone.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.origin = f"--backbone {backbone.config.name_or_path}"  # named by errors
        self.fingerprint = None  # of trained weights that were loaded, LoRA and head
        # The BOS token, if the tokenizer begins every text with one.
        first = tokenizer("")["input_ids"][:1]
        self.beginning = first if first == [tokenizer.bos_token_id] else []
        self.row_width = row_width(backbone.config)
        self.segment_ids = functools.lru_cache(maxsize=1 << 16)(self._segment_ids)

    def _segment_ids(self, segment: str) -> list[int]:
        ids = self.text_encoder.encode(self.text_encoder.protect(segment))
        return [*ids, self.tokenizer.eos_token_id]

    def encode(self, state: State) -> tuple[list[int], list[int]]:
        """Return the token ids of value_text, and the position of the token that ends each segment.

        Nothing is ever truncated (see `fits`).
        """
        ids = list(self.beginning)
        ends = []
        for segment in self.mas.value_text(state, self.view):
            ids += self.segment_ids(segment)
            ends.append(len(ids) - 1)
        return ids, ends

    def fits(self, state: State) -> bool:
        """Return whether the transcript of a state is short enough for the backbone."""
        return len(self.encode(state)[0]) <= context_length(self.backbone)

    def outputs(self, batch: Batch, transcripts: list[Transcript]) -> torch.Tensor:
        """Return w.h + b at all positions of a batch, in order: float32 [positions, outputs]."""
        inputs = collate(batch, self.tokenizer.pad_token_id, self.backbone.device)
        hidden = self.backbone(**inputs).last_hidden_state  # [packed rows, width, hidden size]
        places = []
        for index, (row, columns) in sequence_columns(batch).items():
            places += [(row, columns[position]) for position in transcripts[index].positions]
        row, column = torch.tensor(places, device=hidden.device).T
        return self.head(hidden[row, column].float())

    def value(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return V in [-1, 1] from the outputs of the head: float32 [len(outputs)]."""
        if self.loss == "dist":
            bins = torch.linspace(-1, 1, self.NUM_BINS, device=outputs.device)
            return outputs.softmax(-1) @ bins
        return torch.tanh(outputs)[:, 0]  # V = tanh(w.h + b)

    @torch.inference_mode()
    def predict(self, transcripts: list[Transcript], *, batch_tokens: int) -> list[list[float]]:
        """Return V at the positions of each transcript.

        Out of memory halves a batch. Raises InputError if a single transcript does not fit, or if a
        value is not finite.
        """
        self.eval()
        if self.backbone.device.type == "cpu":
            batch_tokens = min(batch_tokens, self.CPU_BATCH_TOKENS)
        sequences = [transcript.ids for transcript in transcripts]
        pack = functools.partial(packed_batches, sequences, max_width=self.row_width)
        values: list[list[float]] = [[] for _ in transcripts]
        batches = pack(batch_tokens, indices=range(len(sequences)))
        while batches:
            batch = batches.pop()  # the widest first: memory runs out at once or never
            indices = list(sequence_columns(batch))
            try:
                outputs = self.outputs(batch, transcripts)
            except torch.OutOfMemoryError:
                if len(indices) == 1:
                    raise InputError("out of memory; take a smaller --backbone") from None
                print(f"out of memory: {len(indices)} transcripts are split", file=sys.stderr)
                batches += pack(size_of(batch) // 2, indices=indices)
                continue
            predicted = self.value(outputs)
            if not predicted.isfinite().all():
                raise InputError(f"{self.origin}: V is NaN; restore the weights, or lower --lr")
            values_of_batch = iter(predicted.tolist())
            for index in indices:
                values[index] = [next(values_of_batch) for _ in transcripts[index].positions]
        return values

    def score(self, states: list[State], *, batch_tokens: int) -> list[float]:
        """Return V of each state; equal ones are read once. Raises TooLong if one does not fit."""
        if not all(map(self.fits, states)):
            raise TooLong("a transcript is longer than the context of the value model")
        encoded = {state: self.encode(state) for state in states}
        transcripts = [Transcript(ids, positions=ends[-1:]) for ids, ends in encoded.values()]
        values = self.predict(transcripts, batch_tokens=batch_tokens)
        value_of = dict(zip(encoded, values, strict=True))
        return [value_of[state][0] for state in states]

    def num_tokens(self, states: list[State]) -> int:
        """Return how many tokens are read to score these states together."""
        return num_distinct_tokens([self.encode(state)[0] for state in states])

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters, LoRA and head, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def save(self, folder: Path) -> None:
        with errors_name(f"{folder} cannot be written; is the disk full?"):
            self.backbone.save_pretrained(folder / "adapter")
            save_file(self.head.state_dict(), folder / "head.safetensors")

    @classmethod
    def load(cls, folder: Path, mas: MAS, args, *, must_be_finished: bool) -> "ValueModel":
        """Load a trained V. args: --device, --dtype, --backbone and --model are used of them.

        Raises InputError if its training is not finished, if files are missing or damaged, or if it
        was trained with another graph, rendering of states or backbone.
        """
        # 1. Its backbone.
        config = read_config(folder, must_be_finished=must_be_finished)
        settings = config["settings"]
        name = find_backbone(folder, settings["backbone"], args)
        backbone, tokenizer = load_backbone(
            name, quantize=settings["quantize"], device=args.device, dtype=args.dtype
        )

        # 2. Is everything as it was when V was trained?
        now = {"graph": json.loads(json.dumps(asdict(mas)))}  # as it was read back
        now["rendering"] = rendering_fingerprint(mas, settings["view"])
        now["backbone"] = checkpoint_setting(name)
        changes = differences({key: settings[key] for key in now}, now)
        if changes:
            raise InputError(
                f"{folder}: V was trained with another {', '.join(changes)}; "
                f"give the same --graph, restore the backbone, or train V again"
            )

        # 3. What was trained.
        backbone, lora_fingerprint = load_lora(backbone, {"default": folder / "adapter"})
        model = cls(backbone, tokenizer, mas, settings["view"], settings["loss"])
        with errors_name(folder / "head.safetensors"):
            model.head.load_state_dict(load_file(folder / "head.safetensors"))
        head = [weight.tolist() for weight in model.head.parameters()]
        model.fingerprint = fingerprint([lora_fingerprint, head])
        model.origin = str(folder)
        return model


def find_backbone(folder: Path, recorded: dict, args) -> str:
    """Return where the backbone of a saved V is: where it was, or in --backbone, or in --model.

    recorded: its setting, in which a folder is named as seen from `folder`, that of V. Raises
    InputError if no folder holds this checkpoint.
    """
    name, expected = recorded["name"], recorded["fingerprint"]
    if expected.startswith(f"{name}@"):
        return name  # of the hub
    flags = [vars(args)[flag] for flag in ("backbone", "model") if flag in args]
    for path in (str(folder / name), *flags):
        if Path(path).is_dir() and checkpoint_setting(path)["fingerprint"] == expected:
            return path
    where = os.path.realpath(folder / name)
    raise InputError(f"{folder}: its backbone is no longer in {where}; give --backbone FOLDER")


def add_value_arguments(parser: Parser) -> None:
    """Add the flags of the stages that read V."""
    parser.add_argument("--value", default=None, help="folder of V (default: RUN/value)")
    help_backbone = "the backbone of V, if it was moved"
    parser.add_argument("--backbone", default=TINY_AGENTS, help=help_backbone)


def load_backbone(name: str, *, quantize: bool, device: str, dtype: str):
    """Load (backbone without its head, tokenizer). quantize: NF4 weights (QLoRA).

    The backbone is frozen and keeps its type: peft's `prepare_model_for_kbit_training` would make
    all hidden states float32. On a GPU, training computes each layer again for its gradients
    instead of keeping what is inside it (gradient checkpointing).
    """
    backbone, tokenizer = load_pretrained(
        "--backbone", name, AutoModel, quantize=quantize, device=device, dtype=dtype
    )
    # BERT and its like would read in each state of a transcript the messages still to come.
    if backbone.config.is_encoder_decoder or "MaskedLM" in str(backbone.config.architectures):
        raise InputError(f"--backbone {name}: V needs a causal language model")
    backbone.requires_grad_(False)
    if torch.device(device).type == "cuda":
        backbone.activation_checkpointing_enable()
    return backbone, tokenizer


def rendering_fingerprint(mas: MAS, view: str) -> str:
    """Fingerprint value_text by the states of an example: V only reads what it was trained on."""
    state = State("a question", ())
    renderings = []
    while not mas.is_terminal(state):
        state = mas.step(state, f"message {len(state.messages)}\nQuestion: quoted")
        renderings.append(mas.value_text(state, view))
    return fingerprint(renderings)
