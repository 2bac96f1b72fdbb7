"""What an adapter's tensors are where it changes nothing: where the training of an adapter on an aligned model starts.

Zero factors, the base's own weights for what was trained whole, and the norms of the base's rows for DoRA's magnitudes
(Liu et al., 2024, arXiv 2402.09353: W' = m · (W + s B A) / ‖W + s B A‖ by row, so that m = ‖W‖ at B A = 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resafe.checkpoints import AdapterModule, Checkpoint, adapter_modules, base_tensor, check_plain_start
from resafe.deltas.lora import transposed
from resafe.errors import InputError, listed

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_B.bias", "lora_E", "ranknum")
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
        check_plain_start(self.adapter)  # its factors are not zero where its training starts
        if unknown := [name for name in self._roles if not self._zero(name) and self._base(name) is None]:
            raise InputError(
                f"{self.adapter.reference}: what these are where the adapter changes nothing is not known:\n"
                f"  {listed(unknown)}",
                "merge the adapter into its model (merge_and_unload of PEFT) and give the merged model",
            )

    @cached_property
    def _roles(self) -> Mapping[str, tuple[AdapterModule, str]]:
        """Tensor name → the module it changes, and as what."""
        modules = adapter_modules(list(self.adapter.tensors)).values()
        return {name: (module, role) for module in modules for role, name in module.parts.items()}

    def _zero(self, name: str) -> bool:
        module, role = self._roles[name]
        owner = module.module.rpartition(".")[2]  # of OFT, whose tensors are `oft_R.weight`
        return role in _FACTORS or role.startswith(_KINDS) or owner.startswith(_KINDS)

    def _base(self, name: str) -> str | None:
        """The base's tensor that decides the value of one that is no factor; None where none is known to."""
        module, role = self._roles[name]
        base, shape = self.adapter.base, tuple(self.adapter.tensors[name].shape)
        if base is None:
            return None
        if role in ("weight", "bias"):
            stored = base_tensor(module.module, base, shape, role)
            return stored if stored is not None and base.tensors[stored].shape == shape else None
        if role != "lora_magnitude_vector" or "lora_A" not in module.parts:  # of an embedding: by other norms
            return None
        stored = base_tensor(module.module, base)
        known = stored is not None and len(base.tensors[stored].shape) == 2
        return stored if known and shape == (base.tensors[str(stored)].shape[self._outputs],) else None

    @property
    def _outputs(self) -> int:
        """The dimension of a stored weight along which its outputs are."""
        return 1 if transposed(self.adapter) else 0

    def tensor(self, name: str) -> Tensor:
        """One tensor, float32."""
        stored = None if self._zero(name) else self._base(name)
        if stored is None:
            return torch.zeros(self.adapter.tensors[name].shape)
        assert self.adapter.base is not None  # or it would have been refused
        weight = self.adapter.base.read(stored).to(torch.float32)
        return weight if self._roles[name][1] in ("weight", "bias") else weight.norm(dim=1 - self._outputs)
