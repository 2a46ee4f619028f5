"""LoRA adapters: small trained matrices on a frozen language model.

V is one adapter with a head (value.py). Finetuned agents (stage 5) are adapters on the model that
all agents share, the base: one for all of them, or one for each. With the adapters off, the base
itself speaks.

    RUN/agents/adapter/shared/          one adapter for all agents, or
    RUN/agents/adapter/agent_Reader/    one for each of them; peft loads each of these folders
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Set before peft is imported. bitsandbytes announces a kernel that it does without, and peft uses
# a name that transformers has changed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

from mas import MAS
from support.flags import InputError
from support.runs import file_fingerprint, read_config

SHARED = "shared"  # the name of an adapter that all agents share


def lora_config(rank: int) -> LoraConfig:
    """Configure LoRA on every linear layer but the output head; alpha is twice the rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def add_lora(model: nn.Module, *, rank: int) -> PeftModel:
    """Add an adapter, in float32. Nothing else of the model is trained."""
    return get_peft_model(model, lora_config(rank))


def load_lora(model: nn.Module, folder: Path) -> PeftModel:
    """Load an adapter that peft has saved, to be used as it is."""
    return PeftModel.from_pretrained(model, folder)


class AgentAdapters:
    """The adapters of the agents, on the model that they share.

    A forward of the model uses one adapter at a time, so messages of agents with different adapters
    are sampled and read in different batches (`name_for`, `merged`, `use`).

    Args:
        model: as returned by peft, with the adapters `names`.
        names: of the adapters, see `adapter_names`.
    """

    def __init__(self, model: PeftModel, names: list[str]):
        self.model = model
        self.names = names

    @classmethod
    def add(cls, model: nn.Module, mas: MAS, *, sharing: str, rank: int) -> "AgentAdapters":
        """Add new adapters, which change nothing yet. sharing: see `adapter_names`."""
        names = adapter_names(mas, sharing)
        peft_model = get_peft_model(model, lora_config(rank), adapter_name=names[0])
        for name in names[1:]:
            peft_model.add_adapter(name, lora_config(rank))
        return cls(peft_model, names)

    @classmethod
    def load(cls, model: nn.Module, mas: MAS, folder: Path, base: dict) -> "AgentAdapters":
        """Load the adapters of a finished stage 5.

        A shared adapter can be used with any graph, adapters per agent only with the agents that
        they were trained for.

        Args:
            model: the base, without adapters.
            folder: RUN/agents.
            base: the settings of the base: `model` with its fingerprint, and `quantize_policy`.

        Raises InputError if they are not finished, or were trained on another base or for other
        agents.
        """
        config = read_config(folder)
        settings = config["settings"]
        if "adapters" not in settings:
            raise InputError(f"--adapter {folder}: not a folder RUN/agents of train_agents.py")
        if not config.get("finished"):
            raise InputError(
                f"--adapter {folder}: its training is not finished; "
                f"run train_agents.py again to resume it"
            )
        if settings["model"]["fingerprint"] != base["model"]["fingerprint"]:
            raise InputError(
                f"--adapter {folder}: these adapters were trained on another model, "
                f"{settings['model']['name']}; give it as --model"
            )
        if settings["quantize_policy"] != base["quantize_policy"]:
            remedy = "give" if settings["quantize_policy"] else "leave out"
            raise InputError(
                f"--adapter {folder}: these adapters were trained on other weights of the model; "
                f"{remedy} --quantize-policy"
            )
        if settings["adapters"] == "per-agent":
            _refuse_other_agents(folder, settings["graph"], mas)
        names = adapter_names(mas, settings["adapters"])
        for name in names:
            if not (folder / "adapter" / name / "adapter_model.safetensors").is_file():
                raise InputError(f"--adapter {folder}: adapter/{name} has no weights; restore them")
        # Trainable, because stage 5 may start from them.
        peft_model = PeftModel.from_pretrained(
            model, folder / "adapter" / names[0], adapter_name=names[0], is_trainable=True
        )
        for name in names[1:]:
            peft_model.load_adapter(folder / "adapter" / name, adapter_name=name, is_trainable=True)
        return cls(peft_model, names)

    def save(self, folder: Path) -> None:
        """Write each adapter to a folder of its own in `folder`/adapter."""
        self.model.save_pretrained(folder / "adapter", selected_adapters=self.names)

    def setting(self, folder: Path) -> dict:
        """Return how adapters are recorded: their folder, and a fingerprint of what is in it."""
        paths = []
        for name in self.names:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                paths.append(folder / "adapter" / name / file)
        return {"name": str(folder), "fingerprint": file_fingerprint(paths)}

    def name_for(self, agent: str) -> str:
        """Return the name of the adapter that an agent speaks with."""
        return SHARED if self.names == [SHARED] else _agent_adapter_name(agent)

    def use(self, agent: str) -> None:
        """Activate the adapter of this agent."""
        if self.model.active_adapter != self.name_for(agent):
            self.model.set_adapter(self.name_for(agent))

    @contextmanager
    def merged(self, agent: str) -> Iterator[None]:
        """Merge the adapter of this agent into the weights of the base, inside a `with` block.

        A decoding step reads one token per message, so its time depends on the number of matrix
        products more than on their size. An adapter that is not merged adds two to every layer.

        The original weights are kept and put back, so the base stays bit-identical; meanwhile,
        linear layers take twice their memory. Only float32 weights are merged into. bfloat16 has
        no numbers near enough to a weight for a small change of it: the messages would be sampled
        from other agents than those that are trained. Quantised weights cannot be added to.
        """
        self.use(agent)
        layers = [layer for layer in self.model.modules() if isinstance(layer, lora.LoraLayer)]
        if not all(_is_float32_linear(layer) for layer in layers):
            yield
            return
        kept = []
        try:
            for layer in layers:
                weight = layer.get_base_layer().weight
                kept.append((weight, weight.data))
                change = layer.get_delta_weight(self.name_for(agent)).detach()
                weight.data = weight.data + change
            with self.off():
                yield
        finally:
            for weight, data in kept:
                weight.data = data

    def off(self) -> AbstractContextManager:
        """Deactivate all adapters in a `with` block: the base speaks, the reference policy."""
        return self.model.disable_adapter()

    @property
    def rank(self) -> int:
        """The rank of the adapters."""
        return self.model.peft_config[self.names[0]].r

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all adapters, by name."""
        parameters = {}
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameters[name] = parameter
        return parameters

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the weights of all adapters, by name."""
        return {name: weight.detach().clone() for name, weight in self.parameters().items()}

    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.data.copy_(weights[name])


def _is_float32_linear(layer: nn.Module) -> bool:
    return isinstance(layer, lora.Linear) and layer.get_base_layer().weight.dtype == torch.float32


def _refuse_other_agents(folder: Path, graph: dict, mas: MAS) -> None:
    """Raise InputError if adapters of these agents were trained for others, or other prompts."""
    if MAS.from_dict(graph).agents != mas.agents:
        raise InputError(
            f"--adapter {folder}: each of its adapters belongs to an agent of the graph "
            f"{graph['name']!r}, and these agents are others; give that --graph"
        )


def adapter_names(mas: MAS, sharing: str) -> list[str]:
    """Return the names of the adapters of a graph.

    sharing: "shared", one adapter for all agents, or "per-agent", one for each.
    """
    if sharing == "shared":
        return [SHARED]
    return [_agent_adapter_name(agent.name) for agent in mas.agents]


def _agent_adapter_name(agent: str) -> str:
    # peft makes the name an attribute: an agent may be called "layers" or "default".
    return f"agent_{agent}"
