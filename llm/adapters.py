"""LoRA adapters: small trained matrices on a frozen language model.

V is one adapter with a head (value.py). Finetuned agents (stage 5) are adapters on the model that
all agents share, the base: one for all of them, or one for each. With the adapters off, the base
itself speaks.

    RUN/agents/adapter/shared/          one adapter for all agents, or
    RUN/agents/adapter/agent_Reader/    one for each of them; peft loads each of these folders
"""

import hashlib
import logging
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

# Set before peft is imported. bitsandbytes announces a kernel that it does without, and peft uses
# a name that transformers has changed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import nn

from mas import MAS
from support.flags import InputError, Parser, positive_int
from support.records import errors_name
from support.runs import read_config


def add_lora(model: nn.Module, *, rank: int, name: str = "default") -> PeftModel:
    """Add an adapter, in float32, which changes nothing yet. Nothing else of the model is trained.

    It is on every linear layer but the output head; alpha is twice the rank.
    """
    options = {"lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return _add_adapter(model, LoraConfig(r=rank, **options), name)


def load_lora(model: nn.Module, folders: dict[str, Path]) -> tuple[PeftModel, str]:
    """Add adapters that peft has saved, name -> folder. Returns the model, and their fingerprint.

    Raises InputError if one cannot be read, or if its weights are not those of an adapter of this
    model: missing ones would be random, and others were meant for another model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, folder in folders.items():
        with errors_name(folder):
            config = LoraConfig.from_pretrained(folder.resolve())  # "a/b" may name a model
            config.inference_mode = False  # so that it can be trained
            config.base_model_name_or_path = None  # it may have been moved
            model = _add_adapter(model, config, name)
            weights = load_file(folder / "adapter_model.safetensors")
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        wrong = {(key, weight.shape) for key, weight in weights.items()}
        wrong ^= {(key, weight.shape) for key, weight in expected.items()}
        if wrong:
            trouble = f"the weights beside it do not fit: {min(wrong)[0]}"
            raise InputError(f"{folder}/adapter_config.json: {trouble}; restore both")
        set_peft_model_state_dict(model, weights, adapter_name=name)
        digest.update(save(weights, {"rank, alpha": f"{config.r}, {config.lora_alpha}"}))
    return model, digest.hexdigest()


def _add_adapter(model: nn.Module, config: LoraConfig, name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    model.add_adapter(name, config)
    return model


def add_lora_argument(parser: Parser) -> None:
    """Add the flag of the scripts that train an adapter."""
    parser.add_argument(
        "--lora-rank", type=positive_int, default=16, help="rank of an adapter (paper, for V: 256)"
    )


class AgentAdapters:
    """The adapters of the agents, on the model that they share.

    A forward of the model uses one adapter, so messages of agents with different adapters are
    sampled and read in different batches (`name_for`, `use`).

    Attributes:
        sharing: "shared", one adapter for all agents, or "per-agent", one for each.
        fingerprint: of adapters that were loaded, their weights, ranks and alphas.
    """

    def __init__(self, model: nn.Module, mas: MAS, *, sharing: str, rank: int):
        self.model = model
        self.sharing = sharing
        self.rank = rank
        self.names = list(dict.fromkeys(self.name_for(agent.name) for agent in mas.agents))

    @classmethod
    def add(cls, model: nn.Module, mas: MAS, *, sharing: str, rank: int) -> "AgentAdapters":
        """Add new adapters."""
        adapters = cls(model, mas, sharing=sharing, rank=rank)
        for name in adapters.names:
            adapters.model = add_lora(adapters.model, rank=rank, name=name)
        return adapters

    @classmethod
    def load(cls, model: nn.Module, mas: MAS, folder: Path, base: dict) -> "AgentAdapters":
        """Load the adapters of a finished stage 5 from its folder RUN/agents.

        base: the settings of `model`: "model" with its fingerprint, and "quantize_policy".

        Raises InputError if they were trained on another base or, one per agent, for other agents.
        """
        settings = read_config(folder, must_be_finished=True)["settings"]
        trouble = None
        if settings["model"]["fingerprint"] != base["model"]["fingerprint"]:
            trouble = f"trained on another model; give --model {settings['model']['name']}"
        elif settings["quantize_policy"] != base["quantize_policy"]:
            trouble = "trained with the other setting of --quantize-policy"
        elif settings["adapters"] == "per-agent" and MAS.from_dict(settings["graph"]) != mas:
            trouble = f"each of them is of an agent of the graph {settings['graph']['name']!r}"
        if trouble is not None:
            raise InputError(f"--adapter {folder}: {trouble}")
        adapters = cls(model, mas, sharing=settings["adapters"], rank=settings["lora_rank"])
        folders = {name: folder / "adapter" / name for name in adapters.names}
        adapters.model, adapters.fingerprint = load_lora(model, folders)
        return adapters

    def save(self, folder: Path) -> None:
        """Write each adapter to a folder of its own in `folder`/adapter."""
        with errors_name(f"{folder} cannot be written; is the disk full?"):
            self.model.save_pretrained(folder / "adapter", selected_adapters=self.names)

    def name_for(self, agent: str) -> str:
        """Return the name of an agent's adapter, which peft makes an attribute of layers."""
        return "shared" if self.sharing == "shared" else f"agent_{agent}"

    def use(self, agent: str) -> None:
        """Activate the adapter of this agent."""
        if self.model.active_adapter != self.name_for(agent):
            self.model.set_adapter(self.name_for(agent))

    def off(self) -> AbstractContextManager:
        """Deactivate all adapters in a `with` block: the base speaks, the reference policy."""
        return self.model.disable_adapter()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all adapters, by name."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if "lora_" in name}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the weights of all adapters, by name."""
        return {name: weight.detach().clone() for name, weight in self.parameters().items()}

    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.data.copy_(weights[name])
