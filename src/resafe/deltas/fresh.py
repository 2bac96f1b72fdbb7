"""What an adapter's tensors are where it changes nothing: where the training of an adapter on an aligned model starts.

Zero factors, the base's own weights for what was trained whole (tokens, too), and the norms of the base's rows for
DoRA's magnitudes (Liu et al., 2024, arXiv 2402.09353: W' = m · (W + s B A) / ‖W + s B A‖ by row, so that m = ‖W‖ at
B A = 0). What does not learn (VeRA's projections, the rank that AdaLoRA divides by) is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resafe.checkpoints import AdapterModule, Checkpoint, adapter_modules, base_tensor, check_additive, check_layers
from resafe.deltas.lora import transposed
from resafe.errors import InputError, listed

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_B.bias", "lora_E")
_CONSTANTS = ("ranknum", "vera_A", "vera_B")
_TOKENS = "trainable_tokens_delta"  # rows of the embedding, not differences of them
_KINDS = ("hada_", "lokr_", "vera_", "fourierft_", "oft_")
"""How the tensors of LoHa, LoKr, VeRA, FourierFT and OFT begin: at zeros these change nothing, as LoRA and AdaLoRA."""


@dataclass(frozen=True)
class FreshAdapter:
    """The adapter of an adapter's names and shapes that changes nothing of its base.

    Attributes:
        adapter: The adapter, on its base.
    """

    adapter: Checkpoint

    def __post_init__(self) -> None:
        check_additive(self.adapter)  # its factors are not zero where its training starts
        check_layers(self.adapter)
        odd = (name for name in self._roles if not self._zero(name) and not self._constant(name))
        if unknown := [name for name in odd if self._base(name) is None]:
            raise InputError(
                f"{self.adapter.reference}: what these are where the adapter changes nothing is not known:\n"
                f"  {listed(unknown)}",
                "take the adapter as its weights (space: weights), or merge it into its model (merge_and_unload of "
                "PEFT) and give the merged model",
            )

    @classmethod
    def known(cls, adapter: Checkpoint) -> bool:
        """Whether it is known what every tensor of an adapter is there."""
        try:
            cls(adapter)
        except InputError:
            return False
        return True

    @cached_property
    def _roles(self) -> Mapping[str, tuple[AdapterModule, str]]:
        """Tensor name → the module it changes, and as what."""
        modules = adapter_modules(list(self.adapter.tensors)).values()
        return {name: (module, role) for module in modules for role, name in module.parts.items()}

    def _zero(self, name: str) -> bool:
        module, role = self._roles[name]
        owner = module.module.rpartition(".")[2]  # of OFT, whose tensors are `oft_R.weight`
        return not self._constant(name) and (role in _FACTORS or role.startswith(_KINDS) or owner.startswith(_KINDS))

    def _constant(self, name: str) -> bool:
        return self._roles[name][1] in _CONSTANTS

    def _base(self, name: str) -> str | None:
        """The base's tensor that decides the value of one that is no factor; None where none is known to."""
        module, role = self._roles[name]
        base, shape = self.adapter.base, tuple(self.adapter.tensors[name].shape)
        if base is None:
            return None
        if role in ("weight", "bias"):
            stored = base_tensor(module.module, base, shape, role)
            return stored if stored is not None and base.tensors[stored].shape == shape else None
        if role == _TOKENS:
            vocabulary = (int(base.config.get("vocab_size", 0)), *shape[1:])
            stored = base_tensor(module.module.removesuffix(".token_adapter"), base, vocabulary)
            rows = self._tokens(name)
            known = stored is not None and rows and max(rows) < base.tensors[stored].shape[0]
            return stored if known and shape == (len(rows), *base.tensors[str(stored)].shape[1:]) else None
        stored = base_tensor(module.module, base) if role == "lora_magnitude_vector" else None
        if stored is None or len(base.tensors[stored].shape) != 2:
            return None
        return stored if shape == (base.tensors[stored].shape[self._outputs(module)],) else None

    def _tokens(self, name: str) -> list[int]:
        """The rows of the embedding that a tensor of trained tokens stands for."""
        found = self.adapter.config.get("trainable_token_indices") or self.adapter.config.get("token_indices") or []
        if isinstance(found, Mapping):
            owner = self._roles[name][0].module.removesuffix(".token_adapter")
            found = next((rows for layer, rows in found.items() if f".{owner}".endswith(f".{layer}")), [])
        return [int(row) for row in found]

    def _outputs(self, module: AdapterModule) -> int:
        """The dimension of a stored weight along which DoRA has its magnitudes: outputs, or an embedding's width."""
        return 1 if transposed(self.adapter) or "lora_embedding_A" in module.parts else 0

    def tensor(self, name: str) -> Tensor:
        """One tensor, float32."""
        if self._constant(name):
            return self.adapter.read(name).to(torch.float32)
        stored = None if self._zero(name) else self._base(name)
        if stored is None:
            return torch.zeros(self.adapter.tensors[name].shape)
        assert self.adapter.base is not None  # or it would have been refused
        weight, (module, role) = self.adapter.base.read(stored).to(torch.float32), self._roles[name]
        if role == _TOKENS:
            return weight[self._tokens(name)]
        return weight if role in ("weight", "bias") else weight.norm(dim=1 - self._outputs(module))
